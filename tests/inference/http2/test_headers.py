"""Header blocks: what is remembered means what it meant, and what makes no request is refused."""

from __future__ import annotations

import pytest
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from inference.http2.frames import Code, ConnectionFailed, StreamFailed
from inference.http2.headers import Fields, HeaderReader, changes_table, check_request, literal
from inference.http2.heads import Head, head_of, timeout_of
from inference.http2.limits import BLOCKS_KEPT, MAX_METADATA_BYTES
from inference.http2.status import Failure, Status

GOOD = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/a/B"),
    (b"content-type", b"application/grpc"),
]


class Reader:
    """Counts what is parsed."""

    def __init__(self) -> None:
        self.parsed: list[Fields] = []
        self.reader = HeaderReader(self._parse)

    def _parse(self, fields: Fields) -> Fields:
        self.parsed.append(fields)
        return fields


def test_a_block_that_leaves_the_table_alone_is_decoded_once() -> None:
    encoder, reader = Encoder(), Reader()
    first, second, third = (encoder.encode([(":path", "/a/B"), ("x", "1")]) for _ in range(3))
    assert first != second
    assert second == third
    answers = [reader.reader.read(bytes(block)) for block in (first, second, third)]
    assert answers == [[(b":path", b"/a/B"), (b"x", b"1")]] * 3
    assert len(reader.parsed) == 2


def test_when_the_table_changes_equal_blocks_are_decoded_anew() -> None:
    encoder, reader = Encoder(), Reader()
    reader.reader.read(bytes(encoder.encode([("x", "1")])))
    known = bytes(encoder.encode([("x", "1")]))
    assert reader.reader.read(known) == [(b"x", b"1")]
    reader.reader.read(bytes(encoder.encode([("y", "2")])))  # now index 62 is another
    assert reader.reader.read(known) == [(b"y", b"2")]
    # Trailers change it as well.
    reader.reader.decode(bytes(encoder.encode([("z", "3")])))
    assert reader.reader.read(known) == [(b"z", b"3")]


def test_blocks_remembered_are_bounded() -> None:
    reader = Reader()
    blocks = [literal("x", str(number)) for number in range(BLOCKS_KEPT + 1)]
    for block in blocks:
        reader.reader.read(block)
    reader.reader.read(blocks[-1])
    assert len(reader.parsed) == len(blocks)
    reader.reader.read(blocks[0])
    assert len(reader.parsed) == len(blocks) + 1


NAMES = st.sampled_from(["x", "y", ":path", "content-type", "grpc-timeout", "long-" + 40 * "n"])
VALUES = st.sampled_from(["", "1", "/a/B", "application/grpc", "é", 300 * "v"])


@given(st.lists(st.lists(st.tuples(NAMES, VALUES, st.booleans()), max_size=5), max_size=20), st.booleans())
def test_the_reader_agrees_with_a_decoder_that_remembers_nothing(
    blocks: list[list[tuple[str, str, bool]]], huffman: bool
) -> None:
    encoder, decoder, reader = Encoder(), Decoder(), Reader()
    for fields in blocks:
        block = bytes(encoder.encode(fields, huffman=huffman))
        expected = [(bytes(name), bytes(value)) for name, value in decoder.decode(block, raw=True)]
        assert reader.reader.read(block) == expected


@given(st.binary(max_size=300))
def test_bytes_that_are_no_block_end_the_connection(block: bytes) -> None:
    reader = Reader()
    try:
        reader.reader.read(block)
    except ConnectionFailed as failed:
        assert failed.code in (Code.COMPRESSION_ERROR, Code.ENHANCE_YOUR_CALM)


def test_which_blocks_change_the_table() -> None:
    assert changes_table(b"\x40\x01x\x011")
    assert changes_table(b"\x20")
    assert changes_table(b"\x83" + literal("x", 200 * "v") + b"\x40\x01x\x011")
    assert not changes_table(b"\x83\x86\xff\x00" + literal("name", 200 * "v") + b"\x0f\x10\x011\x11\x012")


def test_a_small_block_that_means_much_is_a_bomb() -> None:
    encoder, reader = Encoder(), Reader()
    bomb = ("x", 3_900 * "v")
    reader.reader.read(bytes(encoder.encode([bomb])))
    block = bytes(encoder.encode([bomb] * 20))
    assert len(block) == 20
    with pytest.raises(ConnectionFailed) as failed:
        reader.reader.read(block)
    assert failed.value.code == Code.ENHANCE_YOUR_CALM


@pytest.mark.parametrize(
    "fields",
    [
        GOOD[1:],
        [*GOOD[:2], GOOD[3]],
        [*GOOD, (b":path", b"/late")],
        [GOOD[0], *GOOD],
        [(b":status", b"200"), *GOOD],
        [*GOOD, (b"Upper", b"x")],
        [*GOOD, (b"", b"x")],
        [*GOOD, (b"a b", b"x")],
        [*GOOD, (b"connection", b"keep-alive")],
        [*GOOD, (b"transfer-encoding", b"chunked")],
        [*GOOD, (b"te", b"gzip")],
        [*GOOD, (b"x", b"a\r\nb")],
        [(b":path", b"/a\0"), *GOOD[:2]],
    ],
)
def test_fields_that_make_no_request_are_refused(fields: Fields) -> None:
    check_request([*GOOD, (b"te", b"trailers")])
    with pytest.raises(StreamFailed) as failed:
        check_request(fields)
    assert failed.value.code == Code.PROTOCOL_ERROR


def told(head: Head) -> dict[str, str]:
    return dict(Decoder().decode(head.refusal))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({b":method": b"GET"}, {":status": "405"}),
        ({b"content-type": b"text/html"}, {":status": "415"}),
        ({b":path": b"/a/C"}, {":status": "200", "grpc-status": "12"}),
        ({b":path": b"/a/\xff"}, {":status": "200", "grpc-status": "12"}),
        (
            {b"grpc-encoding": b"snappy"},
            {"grpc-status": "12", "grpc-accept-encoding": "identity,deflate,gzip"},
        ),
        ({b"grpc-timeout": b"soon"}, {"grpc-status": "13"}),
        ({b"x": b"v" * MAX_METADATA_BYTES}, {"grpc-status": "8"}),
    ],
)
def test_what_is_not_served_has_its_status(changed: dict[bytes, bytes], expected: dict[str, str]) -> None:
    method = object()
    assert head_of({"/a/B": method}, GOOD).method is method  # type: ignore[dict-item]
    said = told(head_of({"/a/B": method}, [*(dict(GOOD) | changed).items()]))  # type: ignore[dict-item]
    assert said.items() >= expected.items()


def test_times_have_units() -> None:
    texts = (b"1H", b"2M", b"3S", b"4m", b"5u", b"6n", b"99999999S", b"0m")
    assert [timeout_of(text) for text in texts] == pytest.approx(
        [3600, 120, 3, 0.004, 5e-6, 6e-9, 99_999_999, 0]
    )
    for wrong in (b"", b"S", b"1", b"1s", b"-1S", b"1.5S", b"123456789S", b" 1S", "١S".encode()):
        with pytest.raises(ValueError):
            timeout_of(wrong)


def test_a_sentence_survives_in_any_letters() -> None:
    block = Failure(Status.NOT_FOUND, "100 % naïve:\n‹x›", (("again", "5"),)).block()
    said = dict(Decoder().decode(block))
    assert said == {
        "grpc-status": "5",
        "grpc-message": "100 %25 na%C3%AFve:%0A%E2%80%B9x%E2%80%BA",
        "again": "5",
    }
    long = dict(Decoder().decode(Failure(Status.UNKNOWN, "x" * 10_000).block()))
    assert long["grpc-message"] == "x" * 1_000
