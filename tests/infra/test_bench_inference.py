"""The benches of the inference plane that need no other server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from infra.bench.cache import WORKLOADS
from infra.bench.cli import bench
from infra.bench.dispatch import MAX_BATCH, measure


@pytest.mark.parametrize("group", [32, 1])
async def test_what_dispatching_costs_is_measured_on_full_batches(group: int) -> None:
    cpu_s, took_s, mean_batch = await measure(group, 4_096)
    assert mean_batch > 0.8 * MAX_BATCH
    assert 0 < cpu_s < 1e-3
    assert took_s > 0


def test_the_cost_model_is_fitted_to_the_released_model(registry: Path, tmp_path: Path) -> None:
    told = ["--registry", str(registry), "--rounds", "1", "--repeats", "1"]
    files = ["--json", str(tmp_path / "cost.json"), "--plot", str(tmp_path / "cost.png")]
    ran = CliRunner().invoke(bench, ["cost-model", *told, *files], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    kept = json.loads((tmp_path / "cost.json").read_text())
    for name in ("encode", "score", "list"):
        assert name in ran.output
        # Ours has the paper's form in it, and fits at least as well.
        residuals = kept["residuals"][name]
        assert residuals["ours"]["median_error"] <= residuals["paper"]["median_error"] + 0.05
    assert len(kept["measured_s"]) == 90
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")


def test_an_arm_that_does_not_exist_is_named(registry: Path) -> None:
    ran = CliRunner().invoke(bench, ["serve", "--arms", "mosec,nobody", "--registry", str(registry)])
    assert ran.exit_code == 2
    assert "no arm is called 'nobody'" in ran.output


def test_bench_cache_has_a_row_for_every_workload_and_batch(registry: Path, tmp_path: Path) -> None:
    file = tmp_path / "cache.json"
    CliRunner().invoke(
        bench,
        ["cache", "--registry", str(registry), "--rounds", "2", "--json", str(file)],
        catch_exceptions=False,
    )
    kept = json.loads(file.read_text())
    assert kept["appends"] and kept["cache_users_at_most"] > kept["users"]
    ratios = {(cost["workload"], cost["batch"]): cost["ratio"] for cost in kept["costs"]}
    assert set(ratios) == {(name, batch) for name in WORKLOADS for batch in (1, 32)}
    assert min(ratios.values()) > 0


@pytest.mark.parametrize(
    "name", ["overload", "swap", "engine-faults", "cache", "cost-model", "batching", "engines", "serve"]
)
def test_a_bench_without_a_version_says_how_to_get_one(tmp_path: Path, name: str) -> None:
    asked = CliRunner().invoke(bench, [name, "--registry", str(tmp_path)])
    assert asked.exit_code == 1
    assert "`tailrace retrain --log FILE` publishes one" in asked.output
