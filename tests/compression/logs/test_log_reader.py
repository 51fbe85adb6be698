"""Logs as they arrive: mostly clean, sometimes not, never fatal."""

import gzip
import random

import numpy as np
import pytest

from compression.logs.log_reader import LogInvalid, LogReader, iter_events

NOW_S = 1_600_000_000.0
GOOD = b"1,10,100,pv,1511544070\n"


def read(tmp_path, data, *, name="log.csv", **options):
    path = tmp_path / name
    path.write_bytes(data)
    reader = LogReader(path, now_s=NOW_S, **options)
    rows = []
    for chunk in reader.chunks():
        columns = (chunk.lines, chunk.users, chunk.items, chunk.categories, chunk.behaviors, chunk.timestamps)
        rows += zip(*(column.tolist() for column in columns), strict=True)
    return rows, reader.report


def test_rows_come_out_in_file_order_with_their_line_numbers(tmp_path):
    rows, report = read(tmp_path, GOOD + b"2,20,200,buy,1511544071\n1,11,100,cart,1511544072\n2,9,9,fav,1\n")
    assert rows == [
        (1, 1, 10, 100, 0, 1511544070),
        (2, 2, 20, 200, 3, 1511544071),
        (3, 1, 11, 100, 1, 1511544072),
        (4, 2, 9, 9, 2, 1),
    ]
    assert (report.rows, report.bad_rows, report.truncated) == (4, 0, None)


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + GOOD,
        GOOD.replace(b"\n", b"\r\n"),
        b'"1","10","100","pv","1511544070"\n',
        b" 1 , 10,100, pv ,1511544070 \n",
        GOOD.rstrip(b"\n"),
        b"\n\n  \n" + GOOD + b"\n\r\n",
        b"user_id,item_id,category_id,behavior,timestamp\n" + GOOD,
        b'\xef\xbb\xbf"user","item","category","type","time"\r\n' + GOOD,
    ],
    ids=["bom", "crlf", "quotes", "spaces", "no last newline", "blank lines", "header", "bom and header"],
)
def test_harmless_differences_of_form_are_understood(tmp_path, data):
    rows, report = read(tmp_path, data)
    assert [row[1:] for row in rows] == [(1, 10, 100, 0, 1511544070)]
    assert report.bad_rows == 0


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"1,10,100,pv", "fields"),
        (b"1,10,100,pv,1511544070,extra", "fields"),
        (b"just words", "fields"),
        (b"x,10,100,pv,1511544070", "not-a-number"),
        (b"1,1e3,100,pv,1511544070", "not-a-number"),
        (b"1,10,,pv,1511544070", "not-a-number"),
        (b"1,10,100,pv,yesterday", "not-a-number"),
        ("1,١٠,100,pv,1511544070".encode(), "not-a-number"),
        (b"1,\xff\xfe,100,pv,1511544070", "not-a-number"),
        (b"1,1\x000,100,pv,1511544070", "not-a-number"),
        (b"-1,10,100,pv,1511544070", "id-range"),
        (b"1,9223372036854775808,100,pv,1511544070", "id-range"),
        (b"1,10,100,view,1511544070", "behavior"),
        (b"1,10,100,PV,1511544070", "behavior"),
        (b"1,10,100,,1511544070", "behavior"),
        (b"1,10,100,pv,0", "timestamp-zero"),
        (b"1,10,100,pv,-5", "timestamp-zero"),
        (b"1,10,100,pv,1511544070000", "timestamp-unit"),
        (b"1,10,100,pv,1700000000", "timestamp-future"),
        (b"1" * 70_000 + b",10,100,pv,1511544070", "too-long"),
    ],
)
def test_a_bad_row_is_reported_with_its_line_and_the_rest_is_served(tmp_path, line, reason):
    rows, report = read(tmp_path, GOOD + GOOD + line + b"\n" + GOOD)
    assert [row[0] for row in rows] == [1, 2, 4]
    assert report.reasons == {reason: 1}
    assert [(bad.line, bad.reason) for bad in report.bad] == [(3, reason)]
    assert len(report.bad[0].detail) < 200


def test_the_largest_id_is_read_exactly(tmp_path):
    rows, _ = read(tmp_path, b"9223372036854775807,999999999999999999,1000000000000000000,pv,1511544070\n")
    assert rows[0][1:4] == (2**63 - 1, 10**18 - 1, 10**18)


def test_only_the_first_bad_rows_are_kept_but_all_are_counted(tmp_path):
    _, report = read(tmp_path, b"bad\n" * 500 + GOOD, keep_bad=3)
    assert report.bad_rows == 500
    assert [bad.line for bad in report.bad] == [1, 2, 3]


@pytest.mark.parametrize("packed", [False, True])
def test_the_size_of_the_blocks_changes_nothing(tmp_path, packed):
    draw = random.Random(4)
    lines = [
        draw.choice([GOOD, b"\n", b"nonsense\n", b'"7",8,9,buy,1511544079\r\n', b"1,2,3,fav,1511544070\n"])
        for _ in range(400)
    ]
    data = b"\xef\xbb\xbf" + b"".join(lines)
    data = gzip.compress(data) if packed else data
    whole = read(tmp_path, data)
    for size in (5, 64, 1000):
        assert read(tmp_path, data, block_bytes=size) == whole


def test_a_line_without_end_does_not_fill_memory_and_what_follows_is_read(tmp_path):
    rows, report = read(tmp_path, GOOD + b"9" * 1_000_000 + b"\n" + GOOD, block_bytes=50_000)
    assert [row[0] for row in rows] == [1, 3]
    assert report.reasons == {"too-long": 1}


def packed_log(rows=20_000):
    draw = random.Random(1)
    lines = (f"{draw.randrange(10**6)},{draw.randrange(10**6)},7,pv,1511544070\n" for _ in range(rows))
    return gzip.compress("".join(lines).encode())


def test_a_gzip_file_cut_in_the_middle_serves_the_rows_before_the_cut(tmp_path):
    whole = packed_log()
    all_rows, _ = read(tmp_path, whole, name="log.csv.gz")
    rows, report = read(tmp_path, whole[: len(whole) // 2], name="cut.csv.gz")
    assert 5_000 < len(rows) < 15_000
    # The row at the cut may look whole and be wrong: it is not among those served.
    assert rows == all_rows[: len(rows)]
    assert "cut short" in report.truncated


def test_a_damaged_gzip_file_serves_the_rows_before_the_damage(tmp_path):
    whole = bytearray(packed_log())
    whole[len(whole) // 2] ^= 0xFF
    rows, report = read(tmp_path, bytes(whole), name="damaged.csv.gz")
    assert "damaged" in report.truncated
    assert rows[:5_000] == read(tmp_path, packed_log(), name="log.csv.gz")[0][:5_000]


def test_gzip_members_one_after_another_are_one_log_whatever_the_name(tmp_path):
    rows, report = read(tmp_path, gzip.compress(GOOD) + gzip.compress(GOOD), name="log.csv")
    assert [row[0] for row in rows] == [1, 2]
    assert report.truncated is None


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "is empty"),
        (b"\n\r\n", "is empty"),
        (gzip.compress(b""), "is empty"),
        (b"user_id,item_id,category_id,behavior,timestamp\n", "is empty"),
        (b"1,2\n3,4\n", "2 bad rows, the first at line 1"),
        (gzip.compress(GOOD)[:15], "cut short"),
    ],
)
def test_a_log_without_events_says_what_to_do(tmp_path, data, says):
    with pytest.raises(LogInvalid, match=says) as raised:
        read(tmp_path, data)
    assert "tailrace synth" in str(raised.value)


def test_a_log_that_is_not_there_is_a_clear_error(tmp_path):
    with pytest.raises(LogInvalid, match="No such file"):
        list(LogReader(tmp_path / "missing.csv").chunks())


def test_events_carry_ids_that_a_second_replay_repeats(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(GOOD + b"bad\n" + b"2,20,200,buy,1511544071\n")
    first, second = list(iter_events(path)), list(iter_events(path))
    assert first == second
    assert [event.event_id for event in first] == ["log.csv:1", "log.csv:3"]
    assert first[1].model_dump() == type(first[1]).model_validate(first[1].model_dump()).model_dump()
    assert (first[1].user_id, first[1].behavior) == (2, "buy")


def test_fraction_reaches_one(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(GOOD * 1000)
    reader = LogReader(path)
    assert reader.fraction == 0.0
    assert np.concatenate([chunk.users for chunk in reader.chunks()]).sum() == 1000
    assert reader.fraction == 1.0
