"""The synthetic log: of the right form, the same for the same seed, and not just noise."""

import numpy as np
import pytest

from compression.logs.log_reader import LogReader
from compression.logs.synth import BEHAVIOR_SHARES, SynthSettings, synthesize, write_log

SMALL = SynthSettings(events=20_000, users=400, items=500, categories=20, seed=3)


def columns(log):
    return [log.users, log.items, log.categories, log.behaviors, log.timestamps]


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_the_reader_reads_every_row_that_was_written(tmp_path, name):
    log = synthesize(SMALL)
    write_log(tmp_path / name, log)
    reader = LogReader(tmp_path / name)
    chunks = list(reader.chunks())
    assert reader.report.bad_rows == 0
    for ours, field in zip(
        columns(log), ("users", "items", "categories", "behaviors", "timestamps"), strict=True
    ):
        assert (np.concatenate([getattr(chunk, field) for chunk in chunks]) == ours).all()


def test_a_seed_gives_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a.csv.gz", 3), ("b.csv.gz", 3), ("c.csv.gz", 4)):
        write_log(tmp_path / name, synthesize(SynthSettings(2_000, 50, 100, 5, seed)))
    first, again, other = ((tmp_path / f"{name}.csv.gz").read_bytes() for name in "abc")
    assert first == again != other


def test_it_has_the_shape_it_was_asked_for():
    log = synthesize(SMALL)
    assert all(len(column) == SMALL.events for column in columns(log))
    assert (np.diff(log.timestamps) >= 0).all()
    assert len(np.unique(log.users)) <= SMALL.users and len(np.unique(log.items)) <= SMALL.items
    assert len(np.unique(log.categories)) <= SMALL.categories
    shares = np.bincount(log.behaviors, minlength=4) / SMALL.events
    assert np.allclose(shares, BEHAVIOR_SHARES, atol=0.01)
    pairs = np.unique(np.stack([log.items, log.categories]), axis=1)
    assert len(pairs.T) == len(np.unique(log.items)), "an item has one category"


def test_a_few_items_have_most_of_the_events():
    counts = np.sort(np.unique(synthesize(SMALL).items, return_counts=True)[1])[::-1]
    assert counts[: len(counts) // 10].sum() > 0.35 * SMALL.events
    assert counts[len(counts) // 2 :].sum() < 0.20 * SMALL.events


def test_the_next_item_follows_from_the_last_far_more_often_than_by_popularity():
    log = synthesize(SMALL)
    order = np.lexsort((log.timestamps, log.users))
    users, items, categories = log.users[order], log.items[order], log.categories[order]
    same = users[1:] == users[:-1]
    assert (categories[1:] == categories[:-1])[same].mean() > 0.75
    last, following = items[:-1][same], items[1:][same]
    half = len(last) // 2
    best = {}
    for item in np.unique(last[:half]):
        after, counts = np.unique(following[:half][last[:half] == item], return_counts=True)
        best[item] = after[counts.argmax()]
    hits = np.mean([best.get(a) == b for a, b in zip(last[half:], following[half:], strict=True)])
    commonest = np.bincount(following[:half]).argmax()
    assert hits > 5 * (following[half:] == commonest).mean()
    assert hits > 0.2


@pytest.mark.parametrize("settings", [(1, 1, 1, 1), (5, 1, 3, 3), (3, 100, 7, 2)])
def test_the_smallest_worlds_work(settings):
    events, users, items, categories = settings
    assert len(synthesize(SynthSettings(events, users, items, categories)).users) == events


def test_a_world_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="categories"):
        SynthSettings(items=3, categories=4)
    with pytest.raises(ValueError, match="events"):
        SynthSettings(events=0)
