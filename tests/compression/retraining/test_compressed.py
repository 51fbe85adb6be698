"""A retraining that releases less than it trained: what is published, refused, and started from later."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from compression.errors import ArtefactInvalid
from compression.evaluation.scoring import ArtefactScorer, TorchScorer, row_categories
from compression.evaluation.verdict import GateLimits, GateRefused
from compression.releases.registry import Registry
from compression.retraining.pipeline import retrain
from compression.retraining.report import page
from compression.retraining.runs import Run, RunInvalid
from compression.retraining.steps import steps_of
from compression.smaller.plan import PLANS, Compression
from compression.training.model import Recommender
from compression.training.weights import read
from inference import engines
from inference.engines.base import TOLERANCE
from infra.commands.again import again
from infra.commands.retraining import OF_SERVICE
from infra.commands.retraining import retrain as command
from infra.export import parity, tables
from tests.compression.small_retraining import RECIPE, settings, short_log
from tests.compression.worlds import histories

ALL = replace(RECIPE, compression=PLANS["all"])
ANY_LOSS = GateLimits(teacher_loss=1.0, margin=1.0)
SPOILT = replace(RECIPE, compression=Compression(distil=True, student_dim=0.2, student_share=0.0))


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return short_log(tmp_path_factory.mktemp("log") / "clicks.csv")


@pytest.fixture(scope="module")
def folder(log, tmp_path_factory):
    """Of a run that compressed all it could."""
    folder = tmp_path_factory.mktemp("all")
    run = Run.begin(folder / "runs", "night")
    told = []
    retrain(
        settings(folder, log, recipe=ALL, limits=ANY_LOSS),
        lambda step, fraction, note: told.append(step),
        run=run,
    )
    assert list(dict.fromkeys(told)) == [step for step in steps_of(ALL) if step != "announce"]
    return folder


def network_of(artefact, file="weights.safetensors", shape=None):
    network = Recommender(shape or artefact.manifest.model)
    network.load_state_dict(read(artefact.read(file)))
    return network.eval()


def test_the_manifest_says_what_was_done_and_what_came_of_it(folder):
    manifest = Registry(folder / "models").open().manifest
    told = manifest.metrics["compression"]
    assert told["stages"] == list(PLANS["all"].stages)
    before, after = told["before"], told["after"]
    assert (before["shape"]["dim"], before["shape"]["ffn"]) == (RECIPE.dim, RECIPE.ffn)
    assert (manifest.model.dim, manifest.model.ffn) == (RECIPE.dim * 3 // 4, RECIPE.ffn // 2)
    assert after["shape"] == manifest.model.model_dump()
    for figure in ("parameters", "mflop"):
        assert after[figure] < before[figure]
    assert told["retrieval"]["before"] > 0
    difference, low, high = told["ranking"]["difference"]
    assert low <= difference <= high
    assert difference == pytest.approx(told["ranking"]["after"] - told["ranking"]["before"], abs=1e-5)
    checks = {check["name"]: check for check in manifest.metrics["gate"]["checks"]}
    assert {"retrieval kept", "ranking kept", "gain"} <= checks.keys()
    assert checks["gain"]["figures"]["ms"] > 0


def test_tables_are_kept_in_8_bits_and_read_as_floats_everywhere(folder):
    artefact = Registry(folder / "models").open()
    raw = np.load(artefact.path / "item_table.npy")
    assert raw["codes"].dtype == np.int8
    network = network_of(artefact)
    own = TorchScorer(network, row_categories(artefact.vocabulary())).item_table()
    table = artefact.item_table()
    assert table.shape == own.shape and table.dtype == np.float32
    assert (np.abs(table - own).max(1) <= 0.51 * np.abs(own).max(1) / 127 + 1e-7).all()
    arrays = histories([0, 3, 100], 100, item_rows=network.shape.item_rows, category_rows=5)
    graphs = ArtefactScorer(artefact)
    vectors = TorchScorer(network, row_categories(artefact.vocabulary())).user_vectors(arrays)
    assert np.abs(graphs.user_vectors(arrays) - vectors).max() < 1e-4


@pytest.mark.parametrize("name", [status.name for status in engines.usable() if status.usable])
def test_every_engine_answers_a_compressed_version_like_torch(folder, name):
    artefact = Registry(folder / "models").open()
    rng = np.random.default_rng(4)
    arrays = histories([0, 3, 90], 100, item_rows=artefact.manifest.model.item_rows, category_rows=5)
    asked = arrays.tensors() | {
        "candidates": rng.integers(1, artefact.manifest.model.item_rows, (3, 20)).astype(np.int32),
        "candidate_categories": rng.integers(1, 5, (3, 20)).astype(np.int32),
    }
    answers = []
    for one in ("torch", name):
        engine = engines.create(one)
        engine.load(artefact, ("rank",))
        answers.append(engine.run("rank", asked)["scores"])
        engine.close()
    assert np.abs(answers[0] - answers[1]).max() <= TOLERANCE["f32"]


def test_a_browser_is_given_some_of_the_rows(folder):
    artefact = Registry(folder / "models").open()
    published, rows = artefact.read("rank.onnx"), np.array([0, 9, 4, 30])
    cut = tables.narrow(tables.keep_rows(published, rows), "int16")
    arrays = histories([3, 100], 100, item_rows=4, category_rows=5)
    asked = {
        "candidates": np.array([[1, 2, 3], [3, 3, 1]], np.int32),
        "candidate_categories": np.array([[1, 2, 3], [3, 3, 1]], np.int32),
    }
    few = parity.reference(cut)(arrays.tensors() | asked)
    asked["candidates"] = rows[asked["candidates"]].astype(np.int32)
    all_rows = arrays.tensors() | {"items": rows[arrays.items].astype(np.int32)}
    assert np.abs(few["scores"] - parity.reference(published)(all_rows | asked)["scores"]).max() < 1e-3


def test_the_next_run_starts_from_the_network_before_and_compresses_anew(folder, log, tmp_path):
    registry = Registry(folder / "models")
    first = registry.open()
    assert first.manifest.data["teacher"]["dim"] == RECIPE.dim
    still = replace(ALL, learning_rate=1e-12, epochs=1)
    done = retrain(settings(folder, log, recipe=still, limits=ANY_LOSS, from_serving=True, alias=None))
    second = registry.open(done.manifest.version)
    assert done.manifest.data["started_from"] == first.version
    before, after = (read(one.read("teacher.safetensors")) for one in (first, second))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], atol=1e-3), name
    assert done.manifest.model == first.manifest.model


def test_a_version_whose_table_alone_was_rounded_is_started_from_as_it_is(log, tmp_path):
    quantized = replace(RECIPE, epochs=1, compression=PLANS["quantize"])
    first = retrain(settings(tmp_path, log, recipe=quantized, limits=ANY_LOSS))
    assert "teacher.safetensors" not in first.manifest.files
    still = replace(quantized, learning_rate=1e-12)
    second = retrain(settings(tmp_path, log, recipe=still, limits=ANY_LOSS, from_serving=True))
    one, two = (
        network_of(Registry(tmp_path / "models").open(done.manifest.version)) for done in (first, second)
    )
    assert torch.allclose(one.items.weight, two.items.weight, atol=1e-4)


def test_a_teacher_of_other_sizes_than_the_recipes_is_refused_in_a_sentence(folder, log):
    wide = replace(ALL, dim=32)
    with pytest.raises(ArtefactInvalid, match="dim 16, not 32"):
        retrain(settings(folder, log, recipe=wide, from_serving=True, alias="serving"))


def test_what_lost_too_much_is_refused_and_nothing_else_is_published_for_it(log, tmp_path):
    run = Run.begin(tmp_path / "runs", "night")
    with pytest.raises(GateRefused, match=r"retrieval kept: .* is worse than"):
        retrain(settings(tmp_path, log, recipe=SPOILT), run=run)
    assert Registry(tmp_path / "models").versions() == []
    state = Run.find(tmp_path / "runs", "night").state
    assert state.outcome == "refused"
    shown = page(state)
    assert all(words in shown for words in ("Compression", "retrieval kept", "As served", "network alone"))


def ask(*words):
    return CliRunner().invoke(command, [str(word) for word in words])


def test_a_refused_run_is_released_uncompressed_when_a_person_says_so(log, tmp_path, monkeypatch):
    monkeypatch.setenv("GATE_TEACHER_LOSS", "0")
    folders = ["--registry", tmp_path / "models", "--runs", tmp_path / "runs"]
    told = ["--recipe", "tiny", "--epochs", 2, "--run", "night", *folders]
    refused = ask("--log", log, "--compress", "distil", *told)
    assert refused.exit_code == 3, refused.output
    assert "--run night --compress none" in refused.output
    seconds = Run.find(tmp_path / "runs", "night").state.steps["train"].seconds
    answer = ask("--run", "night", "--compress", "none", "--runs", tmp_path / "runs", "--json")
    assert answer.exit_code == 0, answer.output
    done = json.loads(answer.stdout)
    assert done["model"]["dim"] == 32 and "compression" not in done["metrics"]
    assert Run.find(tmp_path / "runs", "night").state.steps["train"].seconds == seconds
    with pytest.raises(RunInvalid, match="published"):
        from infra.retraining.job import compressed

        compressed(Run.find(tmp_path / "runs", "night"), PLANS["all"])


def test_a_schedule_gives_each_run_the_compression_that_it_was_given():
    asked = ["--topic", "clicks", "--compress", "all", "--from-serving"]
    with command.make_context("retrain", [*asked, "--schedule", "0 * * * *"]) as context, context.scope():
        given = again(*OF_SERVICE)
    assert sorted(given[given.index("retrain") + 1 :]) == sorted(asked)


def test_a_repeated_run_compresses_alike(log, tmp_path, monkeypatch):
    monkeypatch.setenv("GATE_TEACHER_LOSS", "1")
    folders = ["--registry", tmp_path / "models", "--runs", tmp_path / "runs", "--json"]
    asked = ["--recipe", "tiny", "--epochs", 1, "--max-minutes", 30, "--no-promote", "--compress", "all"]
    first = ask("--log", log, *asked, "--run", "night", *folders)
    assert first.exit_code == 0, first.output
    again = ask("--repeat", "night", *folders)
    assert again.exit_code == 0, again.output
    registry = Registry(tmp_path / "models")
    files = [registry.manifest(json.loads(one.stdout)["version"]).files for one in (first, again)]
    assert files[0] == files[1]
