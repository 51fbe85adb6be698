"""From a log to a release: what is learnt, what is published, and that the two are the same."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from compression.evaluation.evaluate import evaluate
from compression.evaluation.scoring import ArtefactScorer
from compression.evaluation.targets import metrics
from compression.logs.dataset import leave_one_out, read_log
from compression.logs.log_reader import LogInvalid
from compression.logs.synth import SynthSettings, synthesize, write_log
from compression.releases.registry import ArtefactInvalid, Registry
from compression.retraining.pipeline import retrain
from compression.retraining.settings import RetrainSettings
from compression.retraining.steps import STEPS
from compression.training.export import ParityError, check_parity, export
from compression.training.train import Recipe
from infra.commands import retraining, training
from tests.compression.worlds import model

RECIPE = Recipe(
    dim=32, ffn=64, layers=2, epochs=8, max_minutes=0.4, learning_rate=4e-3, judge_limit=300, batch_windows=16
)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.csv.gz"
    write_log(path, synthesize(SynthSettings(30_000, 600, 400, 20, seed=5)))
    return path


@pytest.fixture(scope="module")
def released(log, tmp_path_factory):
    steps = []
    settings = RetrainSettings(log, tmp_path_factory.mktemp("models"), RECIPE)
    done = retrain(
        settings,
        lambda step, fraction, note: steps.append((step, fraction)),
        announce=lambda manifest, digest, path: None,
    )
    return settings, done, steps


def command(*arguments):
    named = {command.name: command for command in (*training.commands, *retraining.commands)}
    return CliRunner().invoke(named[arguments[0]], [str(a) for a in arguments[1:]])


def test_a_tiny_model_learns_what_popularity_cannot(released):
    figures = released[1].manifest.metrics
    assert figures["retrieval"]["hr@10"] > 3 * figures["popularity"]["hr@10"]
    assert figures["retrieval"]["mrr"] > 3 * figures["popularity"]["mrr"]
    assert figures["ranking_50"]["ndcg@10"] > 1.5 * figures["popularity_50"]["ndcg@10"]


def test_the_release_says_what_online_counts_add_and_its_lists_are_better_for_it(released):
    manifest = Registry(released[0].registry).open("serving").manifest
    lists = manifest.metrics["lists"]
    assert manifest.fusion is not None
    assert manifest.fusion.model_dump() == lists["weights"]
    assert manifest.fusion.transition > 0
    assert lists["fused"]["ndcg@10"] > lists["network"]["ndcg@10"]


def test_the_release_serves_and_its_manifest_says_where_it_came_from(released, log):
    settings, done, _ = released
    artefact = Registry(settings.registry).open("serving")
    assert artefact.version == done.manifest.version
    assert artefact.manifest_sha256 == done.manifest_sha256
    assert done.announced
    assert artefact.manifest.data["events"] == 30_000
    assert artefact.manifest.data["log"] == log.name
    assert artefact.manifest.metrics["parity"] <= 1e-4
    assert not [name for name in artefact.manifest.files if name.endswith((".data", ".pkl", ".pt"))]


def test_every_step_is_announced_from_nothing_to_done(released):
    steps = released[2]
    assert list(dict.fromkeys(step for step, _ in steps)) == list(STEPS)
    for name in STEPS:
        fractions = [fraction for step, fraction in steps if step == name]
        assert fractions[0] == 0.0 and fractions[-1] == 1.0
        assert fractions == sorted(fractions)


def test_the_released_graphs_are_as_good_as_the_network_was(released, log):
    settings, done, _ = released
    artefact = Registry(settings.registry).open()
    sequences = read_log(log).sequences
    figures = evaluate(
        ArtefactScorer(artefact),
        sequences,
        leave_one_out(sequences),
        artefact.vocabulary(),
        max_history=artefact.manifest.model.max_history,
    )
    for head in ("retrieval", "ranking_50"):
        for name, value in figures[head].items():
            assert value == pytest.approx(done.manifest.metrics[head][name], abs=0.005)


def test_the_weights_rebuild_the_network(released):
    from safetensors.torch import load

    from compression.training.model import Recommender

    settings, _, _ = released
    artefact = Registry(settings.registry).open()
    network = Recommender(artefact.manifest.model).eval()
    network.load_state_dict(load(artefact.read("weights.safetensors")))
    assert check_parity(network, artefact.path) <= 1e-4


def test_graphs_of_another_network_are_not_published_for_this_one(tmp_path):
    export(model(seed=1), tmp_path)
    assert check_parity(model(seed=1), tmp_path) <= 1e-4
    with pytest.raises(ParityError, match="differ"):
        check_parity(model(seed=2), tmp_path)


def test_a_log_without_events_publishes_nothing(tmp_path):
    (tmp_path / "log.csv").write_text("")
    with pytest.raises(LogInvalid):
        retrain(RetrainSettings(tmp_path / "log.csv", tmp_path / "models", RECIPE))
    assert Registry(tmp_path / "models").versions() == []


def test_figures_are_what_their_names_say():
    figures = metrics(np.array([1, 2, 11, 2**31]), (1, 10))
    assert figures["hr@1"] == 0.25
    assert figures["hr@10"] == 0.5
    assert figures["ndcg@10"] == pytest.approx((1 + 1 / np.log2(3)) / 4, abs=1e-5)
    assert figures["mrr"] == pytest.approx((1 + 1 / 2 + 1 / 11) / 4, abs=1e-5)


def test_evaluate_prints_one_json_object_for_either_split(released, log):
    settings, done, _ = released
    for split in ("leave-one-out", "temporal"):
        options = ("--registry", settings.registry, "--split", split, "--limit", 200, "--json")
        answer = command("evaluate", "--log", log, *options)
        assert answer.exit_code == 0, answer.output
        report = json.loads(answer.stdout)
        assert (report["version"], report["split"]) == (done.manifest.version, split)
        assert report["targets"] == 200


def test_evaluate_shows_tables_to_a_person(released, log):
    answer = command("evaluate", "--log", log, "--registry", released[0].registry, "--limit", 100)
    assert answer.exit_code == 0
    assert "Full catalogue" in answer.output and "popularity" in answer.output


def test_evaluate_refuses_an_altered_release_in_one_sentence(released, log, tmp_path):
    registry = tmp_path / "models"
    shutil.copytree(released[0].registry, registry)
    path = registry / "versions" / released[1].manifest.version / "rank.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtefactInvalid):
        Registry(registry).open()
    answer = command("evaluate", "--log", log, "--registry", registry)
    assert answer.exit_code == 1
    assert "rank.onnx" in answer.output and "Traceback" not in answer.output


def test_synth_and_retrain_say_what_is_wrong(tmp_path):
    answer = command("synth", tmp_path / "log.csv", "--items", 3, "--categories", 4)
    assert answer.exit_code == 2 and "categories" in answer.output
    assert command("synth", tmp_path / "log.csv", "--events", 50, "--json").exit_code == 0
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 50
    answer = command("synth", tmp_path / "log.csv", "--events", 60)
    assert answer.exit_code == 1 and "--overwrite" in answer.output
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 50
    assert command("synth", tmp_path / "log.csv", "--events", 60, "--overwrite").exit_code == 0
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 60
    (tmp_path / "empty.csv").write_text("")
    answer = command("retrain", "--log", tmp_path / "empty.csv", "--registry", tmp_path / "models")
    assert answer.exit_code == 1 and "tailrace synth" in answer.output


def test_training_with_a_seed_can_be_repeated(log):
    from compression.logs.dataset import build_vocabulary
    from compression.training.train import train

    sequences = read_log(log, max_events=5_000).sequences
    vocabulary = build_vocabulary(sequences, max_items=10**6, item_buckets=16, category_buckets=4)
    recipe = replace(RECIPE, epochs=1, layers=1)
    first, again, other = (
        train(sequences, leave_one_out(sequences), vocabulary, recipe, seed=seed).epochs[0]
        for seed in (1, 1, 2)
    )
    assert first.retrieval_loss == pytest.approx(again.retrieval_loss, abs=1e-3)
    assert first.retrieval_loss != pytest.approx(other.retrieval_loss, abs=1e-4)


def test_sampled_softmax_learns_too(log):
    from compression.logs.dataset import build_vocabulary
    from compression.training.train import train

    sequences = read_log(log).sequences
    vocabulary = build_vocabulary(sequences, max_items=10**6, item_buckets=16, category_buckets=4)
    recipe = replace(RECIPE, epochs=3, full_softmax_items=0, negatives=128)
    epochs = train(sequences, leave_one_out(sequences), vocabulary, recipe).epochs
    assert epochs[-1].retrieval_ndcg > 0.03
    assert epochs[-1].retrieval_loss < epochs[0].retrieval_loss
