"""What `bench engine-faults` does to an engine, and what it says of a fault."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from inference.errors import EngineFailed
from infra.bench.engine_faults import FAULTS, NONE, SLOW, FaultyEngine, Round, _misbehave, _result
from infra.bench.in_process import Outcomes
from tests.support import eventually_async

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


def test_a_fault_that_nobody_has_met_is_not_noted(engine):
    engine.run("score", {})
    assert not engine.met.is_set()
    engine.tell("NaN")
    told_s = time.perf_counter()
    engine.run("score", {})
    met_s = engine.met_s
    assert told_s <= met_s <= time.perf_counter() - Well.took_s
    engine.run("score", {})
    assert engine.met_s == met_s


async def test_the_busier_engine_is_at_fault_and_is_so_from_where_it_is_met():
    idle, busy = FaultyEngine(Well()), FaultyEngine(Well())
    for _ in range(100):
        busy.run("score", {})
    idle.run("score", {})
    began_s = time.perf_counter()
    misbehaving = asyncio.create_task(_misbehave([idle, busy], "NaN", 0.2))
    await eventually_async(lambda: busy.fault == "NaN")
    await asyncio.sleep(0.1)  # the engine has nothing to do meanwhile
    busy.run("score", {})
    assert await misbehaving is busy
    assert (idle.fault, busy.fault) == ("", "")
    assert time.perf_counter() >= busy.met_s + 0.2 > began_s + 0.5


def one_round(before_s: float, first_s: float, after_s: float, began_s: float = 4.0) -> Round:
    """Four seconds before a fault, and what is left of twelve."""
    due_s = np.arange(0.0, 12.5, 0.01)
    took_s = np.select([due_s < began_s, due_s < began_s + 2], [before_s, first_s], after_s)
    return Round(Outcomes(due_s, took_s, np.full(len(due_s), "", "U24")), began_s, True)


def test_what_comes_within_two_seconds_of_a_fault_is_not_held_against_it():
    rounds = [one_round(0.010, 0.500, 0.014), one_round(0.010, 0.500, 0.016, began_s=5.5)]
    result = _result("hang", rounds, 4.0)
    assert (result.steady_p99_ms, result.first_p99_ms, result.after_p99_ms) == (10.0, 500.0, 16.0)
    assert result.ratio.by_round == (1.4, 1.6) and result.ratio.value == 1.6
    assert not result.back_after
    assert _result("hang", rounds[:1], 4.0).back_after
