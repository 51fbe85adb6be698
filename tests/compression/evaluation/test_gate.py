"""What the gate refuses, and for which reason."""

from dataclasses import replace

import numpy as np
import pytest

from compression.evaluation.comparison import paired_bootstrap
from compression.evaluation.gate import coverage, size
from compression.evaluation.verdict import GateLimits, GateRefused
from compression.releases.registry import Registry
from compression.retraining.pipeline import retrain
from compression.retraining.runs import Run
from features.encoding import Vocabulary
from tests.compression.small_retraining import RECIPE, settings, short_log


def vocabulary(items):
    ids = np.array(sorted(items), np.int64)
    return Vocabulary(ids, np.ones(len(ids), np.int32), np.array([5]), 4, 2)


def gains(mean, count=4_000, users=1_000, seed=1):
    """Differences whose users agree with themselves: four of a user are hardly more than one."""
    rng = np.random.default_rng(seed)
    who = np.repeat(np.arange(users), count // users)
    return mean + rng.normal(0, 0.3, users)[who] + rng.normal(0, 0.05, count), who


def test_the_interval_is_that_of_users_and_not_of_their_clicks():
    differences, users = gains(0.0)
    low, high = paired_bootstrap(differences, users)
    alone_low, alone_high = paired_bootstrap(differences, np.arange(len(differences)))
    assert high - low == pytest.approx(2 * 1.96 * 0.3 / np.sqrt(1_000), rel=0.15)
    assert (high - low) > 1.7 * (alone_high - alone_low)
    assert low < differences.mean() < high


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for seed in range(60):
        low, high = paired_bootstrap(*gains(0.1, count=800, users=200, seed=seed), resamples=200)
        held += low <= 0.1 <= high
    assert 0.85 <= held / 60 < 1.0


def test_users_are_told_apart_by_who_they_are_and_not_by_their_number():
    differences, users = gains(0.0, count=400, users=100)
    assert paired_bootstrap(differences, users) == paired_bootstrap(differences, 7 * users + 3)


def test_coverage_counts_the_latest_clicks_and_what_was_served_before():
    from compression.logs.dataset import Sequences

    sequences = Sequences(
        users=np.array([1]),
        offsets=np.array([0, 10]),
        items=np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, 9]),
        categories=np.full(10, 5),
        behaviors=np.zeros(10, np.int64),
        timestamps=np.arange(1, 11),
    )
    recent, catalogue = coverage(vocabulary([1, 2]), vocabulary([1, 2, 3, 4]), sequences, GateLimits())
    assert (recent.outcome, recent.value) == ("refused", 0.0)
    assert (catalogue.outcome, catalogue.value) == ("passed", 0.5)
    recent, catalogue = coverage(vocabulary([1, 9]), None, sequences, GateLimits())
    assert (recent.outcome, catalogue.outcome) == ("passed", "skipped")


def test_size_is_all_files_together(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(bytes(60))
    assert size(tmp_path, GateLimits(max_bytes=119)).outcome == "refused"
    assert size(tmp_path, GateLimits(max_bytes=120)).outcome == "passed"


def test_limits_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("GATE_LATENCY_MS", "7.5")
    assert GateLimits().latency_ms == 7.5


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder whose registry has a version that serves, and the log that it learnt from."""
    folder = tmp_path_factory.mktemp("served")
    log = short_log(folder / "clicks.csv")
    retrain(settings(folder, log, recipe=replace(RECIPE, learning_rate=4e-3, epochs=6)))
    return folder, log


def again(served, tmp_path, **changes):
    """Another version of the same log, in a run that can be asked for its verdict."""
    folder, log = served
    run = Run.begin(tmp_path / "runs")
    before = Registry(folder / "models").resolve("serving")
    try:
        return retrain(settings(folder, log, **{"alias": None} | changes), run=run), before
    except GateRefused as error:
        assert Registry(folder / "models").resolve("serving") == before
        assert run.state.version not in Registry(folder / "models").versions()
        assert Run.find(tmp_path / "runs", run.state.run).state.outcome == "refused"
        return error, before


def test_an_equal_version_passes_and_its_manifest_says_how(served, tmp_path):
    done, before = again(served, tmp_path, recipe=replace(RECIPE, learning_rate=4e-3, epochs=6))
    told = done.manifest.metrics["gate"]
    assert told["against"] == before
    checks = {check["name"]: check for check in told["checks"]}
    assert set(checks) >= {"retrieval accuracy", "ranking accuracy", "latency", "size", "finite", "catalogue"}
    assert {check["outcome"] for check in told["checks"]} == {"passed"}
    figures = checks["retrieval accuracy"]["figures"]
    assert figures["low"] <= 0.0 <= figures["high"]
    assert figures["serving"] == pytest.approx(figures["candidate"], abs=1e-6)


def test_a_version_that_learnt_nothing_is_refused_for_its_accuracy(served, tmp_path):
    error, _ = again(served, tmp_path, recipe=replace(RECIPE, epochs=1, learning_rate=1e-6))
    assert isinstance(error, GateRefused)
    assert "accuracy" in str(error) and "worse than" in str(error)


def test_a_slow_version_is_refused_for_its_latency(served, tmp_path):
    error, _ = again(served, tmp_path, limits=GateLimits(latency_ms=0.001, margin=1.0))
    assert isinstance(error, GateRefused)
    assert [refusal.split(":")[0] for refusal in error.verdict.refusals] == ["latency"]


def test_a_version_that_has_become_nan_is_refused_before_it_is_compared(served, tmp_path, monkeypatch):
    from compression.retraining import steps

    def spoilt(model, vocabulary, folder, **how):
        graphs = stage(model, vocabulary, folder, **how)
        table = np.load(folder / "item_table.npy")
        table[3, 0] = np.nan
        np.save(folder / "item_table.npy", table)
        return graphs

    stage = steps.stage
    monkeypatch.setattr(steps, "stage", spoilt)
    error, _ = again(served, tmp_path)
    assert isinstance(error, GateRefused)
    assert error.verdict.refusals == ["finite: 1 numbers that are not finite"]
