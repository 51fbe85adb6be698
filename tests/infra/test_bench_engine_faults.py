"""What `bench engine-faults` does to an engine, and what it says of a fault."""

from __future__ import annotations

import time

import numpy as np
import pytest

from inference.errors import EngineFailed
from infra.bench.engine_faults import FAULTS, NONE, SLOW, FaultyEngine, _result
from infra.bench.in_process import Outcomes

OUTPUTS = {"scores": np.ones((1, 3), np.float32)}


class Well:
    took_s = 0.005

    def run(self, graph, inputs):
        time.sleep(self.took_s)
        return dict(OUTPUTS)


@pytest.fixture
def engine() -> FaultyEngine:
    return FaultyEngine(Well())


def test_the_control_changes_nothing(engine):
    engine.tell(NONE)
    assert engine.run("score", {})["scores"] is OUTPUTS["scores"]


def test_each_fault_is_what_it_is_called_and_ends(engine):
    engine.tell("crash")
    with pytest.raises(EngineFailed):
        engine.run("score", {})
    engine.tell("NaN")
    assert np.isnan(engine.run("score", {})["scores"]).all()
    engine.tell(SLOW)
    began_s = time.perf_counter()
    engine.run("score", {})
    assert time.perf_counter() - began_s >= 9 * Well.took_s
    engine.tell("")
    assert engine.run("score", {})["scores"] is OUTPUTS["scores"]
    assert set(FAULTS) == {NONE, "hang", "crash", "NaN", SLOW}


def outcomes(before_s: float, first_s: float, after_s: float) -> Outcomes:
    """A round of four seconds before a fault and four of it."""
    due_s = np.arange(0.0, 8.5, 0.01)
    took_s = np.select([due_s < 4, due_s < 6], [before_s, first_s], after_s)
    return Outcomes(due_s, took_s, np.full(len(due_s), "", "U24"))


def test_what_comes_within_two_seconds_of_a_fault_is_not_held_against_it():
    rounds = [outcomes(0.010, 0.500, 0.014), outcomes(0.010, 0.500, 0.016)]
    result = _result("hang", rounds, 4.0)
    assert (result.steady_p99_ms, result.first_p99_ms, result.after_p99_ms) == (10.0, 500.0, 16.0)
    assert result.ratio.by_round == (1.4, 1.6) and result.ratio.value == 1.6
    assert not result.back_after
    assert _result("hang", rounds[:1], 4.0).back_after
