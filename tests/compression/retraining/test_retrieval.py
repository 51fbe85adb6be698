"""`retrain` with a retrieval network: the same steps, the same gate, and what serves is what was trained."""

from __future__ import annotations

import numpy as np
import pytest
from click.testing import CliRunner

from compression.evaluation.verdict import GateRefused
from compression.releases.registry import Registry
from compression.retraining.pipeline import retrain
from compression.retraining.report import page
from compression.retraining.runs import Run
from compression.retraining.settings import RetrainSettings
from compression.retraining.steps import STEPS
from compression.retrieval.release import load_config, load_networks
from compression.retrieval.retriever import Retriever
from compression.training.checkpoint import Stopped
from compression.training.train import TINY
from infra.commands.retraining import retrain as command
from infra.retraining.job import Job, job
from tests.compression.retrieval.worlds import RECIPE, write

ASKED = RECIPE.model_copy(update={"epochs": 3, "members": ({}, {"dim": 8, "epochs": 2})})


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write(tmp_path_factory.mktemp("log"), events=6_000, users=200, items=150)


def asked(log, registry, **changes):
    return RetrainSettings(
        **({"log": log, "registry": registry, "recipe": TINY, "retrieval": ASKED} | changes)
    )


@pytest.fixture(scope="module")
def done(log, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrained")
    run = Run.begin(folder / "runs", "first")
    return retrain(asked(log, folder / "models"), run=run), run, folder


def test_every_step_is_done_and_the_version_serves(done):
    made, run, folder = done
    registry = Registry(folder / "models")
    state = Run.find(folder / "runs", "first").state
    assert set(STEPS) - {"announce"} <= set(state.steps) and state.outcome == "published"
    manifest = registry.open().manifest
    assert (manifest.version, manifest.kind) == (made.manifest.version, "retrieval")
    assert set(manifest.graphs) == {"encode", "score", "rank"} and not manifest.model.states
    assert manifest.fusion.model_dump() == manifest.metrics["lists"]["weights"]
    assert manifest.data["recipe"] == ASKED.model_dump(mode="json") and manifest.data["epochs"] == 5
    figures = manifest.metrics
    assert figures["retrieval"]["hr@10"] > 2 * figures["popularity"]["hr@10"]
    assert figures["parity"] <= 1e-4 and figures["gate"]["checks"]
    assert "retrieval loss" in page(state) and not (run.folder / "staging").exists()


def test_unknown_items_score_as_the_catalogue_in_the_mean(done):
    registry = Registry(done[2] / "models")
    artefact = registry.open()
    known = len(artefact.vocabulary().item_ids)
    table = artefact.item_table()
    buckets = table[known + 1 :]
    assert len(buckets) > 1
    np.testing.assert_allclose(buckets, np.tile(table[1 : known + 1].mean(0), (len(buckets), 1)), atol=1e-6)
    assert [network.config.dim for network in load_networks(artefact)] == [16, 8]
    assert load_config(artefact).fitted == "train"


def test_it_is_gated_against_a_ranking_version_and_the_other_way_round(done, log):
    registry = done[2] / "models"
    before = Registry(registry).resolve("serving")
    with pytest.raises(GateRefused, match="accuracy"):
        retrain(
            asked(log, registry, retrieval=ASKED.model_copy(update={"epochs": 1, "members": ({},)}), seed=5)
        )
    assert Registry(registry).resolve("serving") == before
    after = retrain(asked(log, registry, retrieval=None, recipe=TINY, force="another network"))
    assert (after.manifest.kind, after.manifest.parent) == ("ranking", before)
    assert after.verdict.against == before


def test_a_run_that_was_ended_in_training_goes_on(log, tmp_path):
    notes: list[str] = []
    run = Run.begin(tmp_path / "runs", "ended")
    with pytest.raises(Stopped, match="train"):
        retrain(
            asked(log, tmp_path / "models", alias=None),
            lambda step, fraction, note: notes.append(note),
            run=run,
            stopping=lambda: any(note.startswith("epoch 2") for note in notes),
        )
    notes.clear()
    again = Run.find(tmp_path / "runs", "ended")
    made = retrain(
        asked(log, tmp_path / "models", alias=None),
        lambda step, fraction, note: notes.append(note),
        run=again,
    )
    assert made.manifest.kind == "retrieval" and made.alias is None
    first = next(note for note in notes if note.startswith("epoch"))
    assert first.startswith("epoch 2")


def test_with_the_recipe_for_streams_a_version_is_appended_to(log, tmp_path):
    options = ("--network", "retrieval", "--recipe", "stream", "--epochs", "1", "--max-minutes", "1")
    folders = ("--log", str(log), "--registry", str(tmp_path / "models"), "--runs", str(tmp_path / "runs"))
    answer = CliRunner().invoke(command, [*folders, *options])
    assert answer.exit_code == 0, answer.output
    artefact = Registry(tmp_path / "models").open()
    shape, network = artefact.manifest.model, load_config(artefact).network
    assert set(artefact.manifest.graphs) == {"encode", "score", "rank", "append"}
    assert shape.states and shape.vector_scores and shape.max_history == 100
    assert (shape.layers, shape.heads, shape.dim) == (network.layers, network.heads, network.dim)
    assert artefact.manifest.metrics["parity"] <= 1e-4
    table = Retriever(load_networks(artefact)).item_table().numpy()
    np.testing.assert_array_equal(artefact.item_table(), table)


def test_the_job_keeps_the_recipe(log, tmp_path):
    spec = job(
        log=log,
        bounds=None,
        registry=tmp_path,
        alias=None,
        recipe=TINY,
        retrieval=ASKED,
        split="leave-one-out",
        seed=1,
        max_events=10,
        from_serving=False,
    )
    kept = Job.model_validate_json(spec.model_dump_json())
    assert kept.settings("").retrieval == ASKED


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--network", "retrieval", "--compress", "all"], "leave out --compress"),
        (["--network", "retrieval", "--from-serving"], "--from-serving"),
        (["--network", "retrieval", "--recipe", "tiny"], "neither a file nor one of"),
        (["--recipe", "ml-1m"], "is not one of laptop, tiny, full"),
    ],
)
def test_what_does_not_go_together_is_said(log, tmp_path, options, sentence):
    told = [
        "--log",
        str(log),
        "--registry",
        str(tmp_path / "models"),
        "--runs",
        str(tmp_path / "runs"),
        *options,
    ]
    answer = CliRunner().invoke(command, told)
    assert answer.exit_code == 2 and sentence in " ".join(answer.output.split())
    assert not (tmp_path / "runs").exists()
