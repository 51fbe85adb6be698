"""A retraining that is killed, stopped or paused goes on to the result it would have had."""

import multiprocessing
import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from compression.evaluation.verdict import GateLimits, GateRefused
from compression.releases.registry import Registry
from compression.retraining.pipeline import retrain
from compression.retraining.runs import Run, RunInvalid, prune, runs
from compression.retraining.steps import STEPS, steps_of
from compression.smaller.plan import PLANS
from compression.training.checkpoint import Checkpoints, Standing, Stopped
from tests.compression.small_retraining import RECIPE, result, settings, short_log, work

KILLS = 10
MOMENT_S = 0.6
COMPRESSED = {
    "recipe": replace(RECIPE, epochs=2, compression=replace(PLANS["all"], round_share=0.5, aware_share=0.5)),
    "limits": GateLimits(teacher_loss=1.0),
}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return short_log(tmp_path_factory.mktemp("log") / "clicks.csv")


@pytest.fixture(scope="module")
def whole(log, tmp_path_factory):
    """What a run that nobody disturbs publishes."""
    folder = tmp_path_factory.mktemp("whole")
    work(folder, log)
    return result(folder)


def test_killed_at_ten_random_moments_it_ends_with_the_same_result(log, whole, tmp_path):
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.compression.small_retraining"])
    rng, died = random.Random(11), set()
    for _ in range(KILLS):
        said = processes.Event()
        child = processes.Process(target=work, args=(tmp_path, log, said))
        child.start()
        assert said.wait(60)
        child.join(rng.uniform(0.0, MOMENT_S))
        child.kill()
        child.join()
        assert child.exitcode == -9, "it was through before it was killed: the moments are too late"
        state = Run.find(tmp_path / "runs", "night").state
        died.add(next(step for step in STEPS if step not in state.steps))
        assert Registry(tmp_path / "models").versions() in ([], [state.version])
    assert "train" in died
    work(tmp_path, log)
    assert result(tmp_path) == whole
    assert Run.find(tmp_path / "runs", "night").state.attempts >= 2


class Killed(BaseException):
    """As sudden as a signal: nothing catches it to tidy up."""


def dies_after(step, run):
    def told(name, fraction, note):
        if run.done(step) is not None:
            raise Killed

    return told


@pytest.mark.parametrize("step", ["read", "train", "gate"])
def test_what_was_done_before_it_died_is_not_done_again(log, whole, tmp_path, step):
    begun, run = [], Run.begin(tmp_path / "runs", "night")
    with pytest.raises(Killed):
        retrain(settings(tmp_path, log), dies_after(step, run), run=run)
    retrain(
        settings(tmp_path, log),
        lambda name, fraction, note: begun.append(name),
        run=Run.begin(tmp_path / "runs", "night"),
    )
    assert list(dict.fromkeys(begun)) == list(STEPS[STEPS.index(step) + 1 : -1])
    assert result(tmp_path) == whole


@pytest.fixture(scope="module")
def compressed(log, tmp_path_factory):
    """What a run that compresses publishes when nobody disturbs it."""
    folder = tmp_path_factory.mktemp("compressed")
    work(folder, log, **COMPRESSED)
    return result(folder)


def test_killed_at_random_moments_of_its_compression_it_ends_with_the_same_result(log, compressed, tmp_path):
    run = Run.begin(tmp_path / "runs", "night")
    with pytest.raises(Killed):
        retrain(settings(tmp_path, log, **COMPRESSED), dies_after("train", run), run=run)
    processes = multiprocessing.get_context("forkserver")
    rng, died, steps = random.Random(5), set(), steps_of(COMPRESSED["recipe"])
    for _ in range(KILLS):
        said = processes.Event()
        child = processes.Process(target=work, args=(tmp_path, log, said), kwargs=COMPRESSED)
        child.start()
        assert said.wait(60)
        child.join(rng.uniform(0.0, MOMENT_S))
        child.kill()
        child.join()
        state = Run.find(tmp_path / "runs", "night").state
        if state.outcome == "published":
            break
        died.add(next(step for step in steps if step not in state.steps))
    assert died & set(PLANS["all"].stages), died
    if state.outcome != "published":
        work(tmp_path, log, **COMPRESSED)
    assert result(tmp_path) == compressed


def test_stopped_within_every_stage_it_ends_with_the_same_result(log, compressed, tmp_path):
    rng, stopped = random.Random(3), set()
    for _ in range(200):
        asked = iter(range(rng.randrange(4, 16)))
        run = Run.begin(tmp_path / "runs", "night")
        try:
            retrain(
                settings(tmp_path, log, **COMPRESSED | {"checkpoint_s": 1e9}),
                run=run,
                stopping=lambda asked=asked: next(asked, None) is None,
            )
            break
        except Stopped:
            stopped.add(next(step for step in steps_of(COMPRESSED["recipe"]) if step not in run.state.steps))
    assert stopped >= {"distil", "prune-1"}
    assert result(tmp_path) == compressed


@pytest.mark.parametrize("step", ["distil", "prune-2", "quantize"])
def test_a_stage_that_was_done_before_it_died_is_not_done_again(log, compressed, tmp_path, step):
    begun, run = [], Run.begin(tmp_path / "runs", "night")
    with pytest.raises(Killed):
        retrain(settings(tmp_path, log, **COMPRESSED), dies_after(step, run), run=run)
    retrain(
        settings(tmp_path, log, **COMPRESSED),
        lambda name, fraction, note: begun.append(name),
        run=Run.begin(tmp_path / "runs", "night"),
    )
    steps = steps_of(COMPRESSED["recipe"])
    assert list(dict.fromkeys(begun)) == list(steps[steps.index(step) + 1 : -1])
    assert result(tmp_path) == compressed


def test_a_version_that_was_published_just_before_the_end_is_taken_as_it_is(log, whole, tmp_path):
    run = Run.begin(tmp_path / "runs", "night")

    def dies(name, fraction, note):
        if run.done("publish") is not None:
            run.forget("publish")
            run.save()
            raise Killed

    with pytest.raises(Killed):
        retrain(settings(tmp_path, log), dies, run=run)
    work(tmp_path, log)
    assert result(tmp_path) == whole


def test_asked_to_stop_it_keeps_the_step_it_was_at(log, whole, tmp_path):
    stopped = 0
    while stopped < 100:
        asked = iter(range(1000))
        try:
            retrain(
                settings(tmp_path, log, checkpoint_s=1e9),
                run=Run.begin(tmp_path / "runs", "night"),
                stopping=lambda asked=asked: next(asked) > 15,
            )
            break
        except Stopped:
            stopped += 1
    assert stopped >= 2
    assert result(tmp_path) == whole


def test_nothing_but_the_account_is_left_of_a_run_that_has_ended(log, tmp_path):
    work(tmp_path, log)
    folder = tmp_path / "runs" / "night"
    assert {path.name for path in folder.iterdir()} == {"run.json", "progress.json", ".lock"}


def test_a_run_is_worked_on_by_one_process(log, tmp_path):
    with (
        Run.begin(tmp_path / "runs", "night"),
        pytest.raises(RunInvalid, match="at work"),
    ):
        work(tmp_path, log)
    with pytest.raises(RunInvalid, match="no run"):
        Run.find(tmp_path / "runs", "../night")


def test_a_refused_run_can_be_forced_with_a_note_and_is_not_trained_again(log, tmp_path):
    limits = GateLimits(max_bytes=10)
    with pytest.raises(GateRefused, match="size"):
        work(tmp_path, log, limits=limits)
    run = Run.find(tmp_path / "runs", "night")
    assert (run.state.outcome, Registry(tmp_path / "models").versions()) == ("refused", [])
    began_s = time.monotonic()
    work(tmp_path, log, limits=limits, force="the disk is large")
    assert time.monotonic() - began_s < sum(step.seconds for step in run.state.steps.values())
    manifest = Registry(tmp_path / "models").open("serving").manifest
    assert manifest.data["forced"] == "the disk is large"
    assert manifest.metrics["gate"]["forced"]


def test_ended_runs_are_kept_up_to_a_number_and_unfinished_ones_always(tmp_path):
    for number in range(5):
        run = Run.begin(tmp_path, f"run-{number}")
        if number != 1:
            run.end("published")
    prune(tmp_path, keep=2)
    assert [run.state.run for run in runs(tmp_path)] == ["run-1", "run-3", "run-4"]


def test_a_checkpoint_of_another_training_is_not_taken_up(tmp_path):
    network = torch.nn.Linear(2, 2)
    optimizer = [torch.optim.AdamW(network.parameters())]
    rng = np.random.default_rng(1)
    Checkpoints(tmp_path, "one", every_s=0.0).offer(network, optimizer, rng, Standing(epoch=3))
    assert Checkpoints(tmp_path, "one").restore(network, optimizer).epoch == 3
    assert Checkpoints(tmp_path, "two").restore(network, optimizer).epoch == 0
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert Checkpoints(tmp_path, "one").restore(network, optimizer).epoch == 0


def test_the_recipe_of_these_tests_is_not_ended_by_a_clock():
    assert RECIPE.max_minutes >= 30
