"""Which lane is chosen, by what it is predicted to take; time and costs are given."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from inference.dispatcher import Dispatcher, Lane
from inference.engines.base import EngineOptions
from inference.lanes import LanesInvalid, parse_lanes
from inference.profile import LatencyProfile
from inference.settings import InferenceSettings


def lane(name: str, cost_s: float, **told: Any) -> Lane:
    return Lane(name, lambda key, items: items, profile=LatencyProfile({1: cost_s, 1024: cost_s}), **told)


def test_the_lane_that_finishes_first_is_chosen_and_a_fast_busy_one_is_waited_for() -> None:
    gpu, cpu = lane("gpu", 0.002), lane("cpu", 0.020)
    dispatcher = Dispatcher([cpu, gpu])
    choice = dispatcher.choose(None, [32], 0.0)
    assert choice is not None
    assert choice.lane is gpu
    gpu.started(32, 0.0)
    assert dispatcher.choose(None, [32], 0.001) is None, "free in 1 ms, done in 3: sooner than the CPU's 20"


def test_work_spills_over_once_the_fast_lane_has_enough_and_the_head_of_the_queue_keeps_it() -> None:
    gpu, cpu = lane("gpu", 0.002), lane("cpu", 0.005)
    dispatcher = Dispatcher([gpu, cpu])
    gpu.started(32, 0.0)
    choice = dispatcher.choose(None, [32, 32, 32, 32], 0.0)
    assert choice is not None
    assert (choice.lane, choice.place) == (cpu, 1), "the second batch: the first is done by the GPU at 4 ms"


def test_a_lane_that_is_late_is_not_waited_for_for_ever() -> None:
    gpu, cpu = lane("gpu", 0.002), lane("cpu", 0.020)
    dispatcher = Dispatcher([gpu, cpu])
    gpu.started(1, 0.0)
    assert dispatcher.choose(None, [1], 0.004) is None
    choice = dispatcher.choose(None, [1], 0.022)
    assert choice is not None
    assert choice.lane is cpu


def test_the_nearest_region_serves_until_a_farther_one_is_sooner() -> None:
    near, far = lane("near", 0.004), lane("far", 0.004, hop_s=0.030, region="elsewhere")
    dispatcher = Dispatcher([far, near])
    choice = dispatcher.choose(None, [1], 0.0)
    assert choice is not None
    assert choice.lane is near
    near.started(1, 0.0)
    assert dispatcher.choose(None, [1], 0.0) is None, "the near one is done sooner, busy as it is"
    near.free_at_s = 0.050
    choice = dispatcher.choose(None, [1], 0.0)
    assert choice is not None
    assert choice.lane is far


def test_a_lane_that_is_out_or_has_no_engine_for_the_version_is_never_chosen() -> None:
    ill, other, well = lane("ill", 0.001), lane("other", 0.001, serves=lambda key: key == "b"), lane("w", 1.0)
    dispatcher = Dispatcher([ill, other, well])
    ill.failed(hung=True)
    choice = dispatcher.choose("a", [1], 0.0)
    assert choice is not None
    assert choice.lane is well
    well.failed(hung=True)
    assert dispatcher.choose("a", [1], 0.0) is None
    assert dispatcher.able("a") == []
    assert dispatcher.wait_s("a", 0, 32, 0.0) == float("inf")


def test_what_waits_for_a_thread_that_hangs_is_cancelled_and_not_done_later() -> None:
    begun, hangs, ill = threading.Event(), threading.Event(), lane("lane", 0.01)
    stuck = ill.executor.submit(lambda: (begun.set(), hangs.wait(10)))
    waits = ill.executor.submit(lambda: None)
    assert begun.wait(10)
    ill.renew_thread()
    assert waits.cancelled()
    assert ill.executor.submit(lambda: 1).result(10) == 1
    hangs.set()
    stuck.result(10)


def test_the_wait_behind_a_queue_is_shared_by_the_lanes() -> None:
    dispatcher = Dispatcher([lane("one", 0.010), lane("two", 0.010)])
    assert dispatcher.wait_s(None, 320, 32, 0.0) == pytest.approx(0.05 + 0.01)


def test_a_lane_that_slows_down_is_believed_within_a_few_batches_at_every_size() -> None:
    profile = LatencyProfile({1: 0.001, 32: 0.004})
    for _ in range(8):
        profile.observe(1, 0.010)
    assert profile.predict(1) == pytest.approx(0.010, rel=0.2)
    assert profile.predict(32) > 0.025, "one size tells of the others"
    profile.observe(1, 10.0)
    assert profile.predict(1) < 0.02, "one hiccup does not condemn it"


def test_lanes_are_read_from_one_line() -> None:
    specs = parse_lanes(
        "onnx*2; openvino,precision=bf16; torch,region=eu,hop_ms=12,threads=2", EngineOptions()
    )
    assert [spec.name for spec in specs] == ["onnx-0", "onnx-1", "openvino-bf16-0", "torch-eu-0"]
    assert (specs[2].options.precision, specs[3].hop_ms, specs[3].options.threads) == ("bf16", 12.0, 2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no lane"),
        ("onnx*0", "COUNT"),
        ("onnx,speed=9", "speed"),
        ("onnx,threads=many", "not a number"),
        ("onnx,precision=", "no value"),
    ],
)
def test_lanes_that_cannot_be_read_are_refused_with_the_place(text: str, says: str) -> None:
    with pytest.raises(LanesInvalid, match=says):
        parse_lanes(text, EngineOptions())


def test_settings_name_an_engine_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERENCE_LANES", "onnx; warp")
    with pytest.raises(ValueError, match="warp"):
        InferenceSettings()
