"""What is timed beside a long run."""

from __future__ import annotations

import time

from infra.bench import yardstick
from infra.bench.yardstick import Yardstick


def test_it_reads_the_median_of_the_same_work(monkeypatch):
    monkeypatch.setattr(yardstick, "_ROWS", 512)
    stick = Yardstick()
    # Two clock readings a repeat: 2 ms each, but for a few that were disturbed.
    took_s = [2e-3] * 20 + [0.5] * 5
    readings = iter([moment for took in took_s for moment in (0.0, took)])
    monkeypatch.setattr(time, "perf_counter", lambda: next(readings))
    assert stick.read_ms() == 2.0
    assert next(readings, None) is None


def test_two_sticks_are_alike(monkeypatch):
    monkeypatch.setattr(yardstick, "_ROWS", 512)
    one, other = Yardstick(), Yardstick()
    assert (one._places == other._places).all() and (one._table == other._table).all()
