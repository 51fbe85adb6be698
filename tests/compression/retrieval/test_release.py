"""What is released is what was trained: evaluated from the registry it gives the same figures."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from compression.errors import ArtefactInvalid
from compression.evaluation.catalogue import catalogue_ranks
from compression.evaluation.predictors import Statistics
from compression.evaluation.targets import Targets, metrics
from compression.evaluation.transitions import COMBINED
from compression.releases.registry import Registry
from compression.retrieval.ensemble import mean_of
from compression.retrieval.judge import Judge
from compression.retrieval.recipe import RetrievalRecipe
from compression.retrieval.release import load_config, load_networks
from compression.retrieval.table import catalogue_scores
from infra.bench.accuracy import command as accuracy
from infra.commands.training import evaluate
from tests.compression.retrieval.worlds import RECIPE, parts, write


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    log, recipe, out = write(folder), folder / "recipe.json", folder / "out.json"
    fields = RECIPE.model_dump(mode="json") | {"epochs": 3}
    recipe.write_text(json.dumps(fields))
    options = ["--log", log, "--registry", folder / "models", "--recipe", recipe, "--seeds", "1,2"]
    answer = CliRunner().invoke(accuracy, [str(one) for one in (*options, "--json", out)])
    assert answer.exit_code == 0, answer.output
    return log, folder / "models", json.loads(out.read_text()), answer.output, options


def evaluated(log, registry, version, *more):
    options = ["--log", log, "--registry", registry, "--version", version, *more]
    return CliRunner().invoke(evaluate, [str(one) for one in options])


def test_every_seed_is_released_under_both_protocols(benched):
    _, registry, kept, output, _ = benched
    assert [(run["seed"], run["fitted"]) for run in kept["runs"]] == [
        (seed, fitted) for seed in (1, 2) for fitted in ("train", "train+validation")
    ]
    assert sorted(run["version"] for run in kept["runs"]) == Registry(registry).versions()
    assert RetrievalRecipe(**kept["recipe"]).epochs == 3
    assert "±" in output and "fusion" in output and "item-to-item" in output


def test_evaluate_gives_the_figures_of_the_training(benched):
    log, registry, kept, _, _ = benched
    for run in kept["runs"][:2]:
        answer = evaluated(log, registry, run["version"], "--filter-seen", "--json")
        assert answer.exit_code == 0, answer.output
        report = json.loads(answer.stdout)
        trained = Registry(registry).manifest(run["version"]).metrics
        for name in ("popularity", "item_to_item", "recent", "transitions", "retrieval", "fusion"):
            assert report[name] == trained[name] == run[name]
        assert set(report["fusion"]) == {"hr@10", "ndcg@10", "hr@50", "ndcg@50", "mrr"}
        assert report["fusion"]["ndcg@10"] > report["popularity"]["ndcg@10"]


def test_counts_know_the_validation_items_where_the_model_does(benched):
    runs = benched[2]["runs"]
    assert runs[0]["transitions"] != runs[1]["transitions"]
    assert runs[0]["popularity"] != runs[1]["popularity"]
    assert runs[0]["fusion_weight"] == runs[1]["fusion_weight"]


def test_evaluate_shows_one_table_to_a_person(benched):
    log, registry, kept, _, _ = benched
    answer = evaluated(log, registry, kept["runs"][0]["version"], "--filter-seen")
    assert answer.exit_code == 0
    assert "Full catalogue" in answer.output and "Among 50" not in answer.output


def test_a_second_bench_trains_nothing(benched, monkeypatch):
    from compression.retrieval import trainer

    monkeypatch.setattr(trainer._Run, "_epoch", lambda *_: pytest.fail("trained"))
    _, _, kept, _, options = benched
    again = [str(one) for one in (*options[:-1], "1", "--protocol", "a")]
    answer = CliRunner().invoke(accuracy, again)
    assert answer.exit_code == 0, answer.output
    assert f"{kept['runs'][0]['fusion']['ndcg@10']:.4f}" in answer.output


def test_seeds_as_one_are_one_version_of_networks_trained_before(benched, monkeypatch, tmp_path):
    from compression.retrieval import trainer

    monkeypatch.setattr(trainer._Run, "_epoch", lambda *_: pytest.fail("trained"))
    _, registry, kept, _, options = benched
    out = tmp_path / "out.json"
    ours, state = tmp_path / "models", registry.parent / "trainings"
    again = [*options, "--as-one", "--protocol", "a", "--registry", ours, "--state", state, "--json", out]
    answer = CliRunner().invoke(accuracy, [str(one) for one in again])
    assert answer.exit_code == 0, answer.output
    assert "seed 1 + 2," in answer.output and "±" not in answer.output
    (run,) = json.loads(out.read_text())["runs"]
    each = [one for one in kept["runs"] if one["fitted"] == "train"]
    assert run["core_minutes"] == pytest.approx(sum(one["core_minutes"] for one in each), abs=0.02)

    def tables(folder, version):
        artefact = Registry(folder).open(version, kind="retrieval")
        return [network.items.weight for network in load_networks(artefact)]

    for table, alone in zip(tables(ours, run["version"]), each, strict=True):
        assert table.equal(tables(registry, alone["version"])[0])


@pytest.fixture(scope="module")
def ensemble(benched, tmp_path_factory):
    """As above, with a second network of another shape, and other counts."""
    folder = tmp_path_factory.mktemp("ensemble")
    fields = RECIPE.model_dump(mode="json") | {
        "epochs": 3,
        "members": [{}, {"dim": 8, "epochs": 2}],
        "fused_counts": "combined",
        "fused_weights": [1.5],
    }
    recipe, out = folder / "recipe.json", folder / "out.json"
    recipe.write_text(json.dumps(fields))
    options = [
        *("--log", benched[0], "--registry", folder / "models", "--recipe", recipe, "--seeds", "1"),
        *("--state", benched[1].parent / "trainings"),
    ]
    answer = CliRunner().invoke(accuracy, [str(one) for one in (*options, "--json", out)])
    assert answer.exit_code == 0, answer.output
    return folder / "models", json.loads(out.read_text())


def test_an_ensemble_is_one_version_that_evaluate_reproduces(benched, ensemble):
    registry, kept = ensemble
    for run in kept["runs"]:
        artefact = Registry(registry).open(run["version"], kind="retrieval")
        assert [network.config.dim for network in load_networks(artefact)] == [16, 8]
        assert load_config(artefact).counts == COMBINED
        answer = evaluated(benched[0], registry, run["version"], "--filter-seen", "--json")
        assert answer.exit_code == 0, answer.output
        report = json.loads(answer.stdout)
        assert report["retrieval"] == run["retrieval"] and report["fusion"] == run["fusion"]
    assert [run["epochs"] for run in kept["runs"]] == [
        [3, 2],
        [max(chosen) for chosen in kept["runs"][0]["selected_epochs"]],
    ]


def test_its_first_network_is_the_one_trained_alone(benched, ensemble):
    alone = Registry(benched[1]).open(benched[2]["runs"][0]["version"], kind="retrieval")
    first = Registry(ensemble[0]).open(ensemble[1]["runs"][0]["version"], kind="retrieval")
    for name, tensor in load_networks(alone)[0].state_dict().items():
        assert tensor.equal(load_networks(first)[0].state_dict()[name])


def test_an_ensemble_scores_by_the_mean_of_log_chances(benched, ensemble):
    sequences, split, vocabulary = parts(benched[0])
    run = ensemble[1]["runs"][0]
    networks = load_networks(Registry(ensemble[0]).open(run["version"], kind="retrieval"))
    known = len(vocabulary.item_ids)
    models = [catalogue_scores(network, sequences, vocabulary, known) for network in networks]
    at = split.test[:5]
    expected = sum(torch.log_softmax(torch.from_numpy(model(at)), 1) for model in models) / 2
    assert mean_of(models)(at) == pytest.approx(expected.numpy(), abs=1e-4)
    statistics = Statistics(sequences, split, vocabulary)
    targets = Targets.draw(sequences, split.test, vocabulary, limit=10**6, seed=1)
    ranks = catalogue_ranks(mean_of(models), targets, known, statistics.seen)
    assert metrics(ranks, (10,))["ndcg@10"] == run["retrieval"]["ndcg@10"]
    judge = Judge(sequences, split, vocabulary, statistics, RetrievalRecipe(**ensemble[1]["recipe"]).fused())
    verdict = judge(*networks)
    assert asdict(verdict) == run["validation"] and verdict.weight in (0.0, 1.5)


def test_a_trained_ensemble_is_promoted_and_ranks_as_it_was_judged(benched, ensemble):
    from features.memory_store import MemoryStore
    from features.sequence import pack
    from features.statistics import ItemStatistics
    from inference.ranker import Ranker
    from inference.settings import InferenceSettings
    from inference.types import RankRequest
    from infra.cli import main

    registry, kept = ensemble
    version = kept["runs"][0]["version"]
    answer = CliRunner().invoke(main, ["models", "promote", version, "--registry", str(registry)])
    assert answer.exit_code == 0, answer.output
    manifest = Registry(registry).manifest(version)
    lists = manifest.metrics["lists"]
    assert manifest.fusion is not None and manifest.fusion.model_dump() == lists["weights"]
    assert lists["fused"]["ndcg@10"] >= lists["network"]["ndcg@10"] - 0.02 and lists["fitted"] == "train"
    assert 0 <= manifest.metrics["parity"] <= 1e-4
    sequences, split, vocabulary = parts(benched[0])
    known = len(vocabulary.item_ids)
    networks = load_networks(Registry(registry).open())
    judged = mean_of([catalogue_scores(one, sequences, vocabulary, known) for one in networks])
    at = split.test[:6]
    requests = []
    for position in at.tolist():
        past = sequences.before(np.array([position]), 20)
        columns = (past.items, past.categories, past.behaviors, past.timestamps)
        candidates = tuple(vocabulary.item_ids.tolist())
        requests.append(RankRequest(position, pack(*columns), k=known, candidates=candidates))
    settings = InferenceSettings(
        engine="onnx", runners=1, fusion=0.0, histories=(20,), candidate_sizes=(50,), batches=(1, 8)
    )
    ranker = Ranker.open(registry, settings=settings)
    warmed = ranker.warm("onnx")
    answers = ranker.rank(warmed, requests, ItemStatistics(MemoryStore()))
    warmed.close()
    for chances, ranked in zip(judged(at), answers, strict=True):
        served = chances[np.searchsorted(vocabulary.item_ids, ranked.items)]
        assert len(served) == known and (np.diff(served) <= 1e-5).all()


def test_a_version_whose_second_network_is_missing_is_refused(ensemble, tmp_path):
    import shutil

    registry, kept = ensemble
    shutil.copytree(registry, tmp_path / "models")
    version = kept["runs"][0]["version"]
    (tmp_path / "models" / "versions" / version / "weights-2.safetensors").unlink()
    with pytest.raises((ArtefactInvalid, OSError)):
        load_networks(Registry(tmp_path / "models").open(version, kind="retrieval"))


def republished(registry, version, folder, name, **changes):
    """The same files, some left out, under a manifest with changes; the registry they are in."""
    import shutil

    left_out = shutil.ignore_patterns("manifest.json", *changes.pop("without", ()))
    manifest = Registry(registry).manifest(version)
    shutil.copytree(registry / "versions" / version, folder / name, ignore=left_out)
    model = manifest.model.model_copy(update=changes.pop("model", {}))
    ours = Registry(folder / "models")
    ours.publish(folder / name, manifest.model_copy(update={"version": name, "model": model, **changes}))
    return ours


def test_a_retrieval_model_without_graphs_is_evaluated_and_never_served(benched, tmp_path):
    log, registry, kept, _, _ = benched
    run = kept["runs"][0]
    ours = republished(
        registry,
        run["version"],
        tmp_path,
        "before",
        graphs={},
        model={"states": True},
        without=("*.onnx", "item_table.npy"),
    )
    for attempt in (ours.open, ours.promote, lambda version: ours.canary(version, 5.0)):
        with pytest.raises(ArtefactInvalid, match="retrieval model without graphs"):
            attempt("before")
    assert ours.state() is None
    answer = evaluated(log, ours.root, "before", "--filter-seen", "--json")
    assert json.loads(answer.stdout)["fusion"] == run["fusion"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"graphs": {"encode": "encode.onnx", "rank": "rank.onnx"}}, "no graph named score"),
        ({"without": ("item_table.npy",)}, r"item_table\.npy is missing"),
        ({"without": ("score.onnx",)}, r"score\.onnx is missing"),
        (
            {
                "graphs": {name: f"{name}.onnx" for name in ("encode", "score", "rank")}
                | {"append": "rank.onnx"}
            },
            "states",
        ),
    ],
)
def test_a_version_that_lacks_what_serves_it_is_not_published(benched, tmp_path, changes, sentence):
    _, registry, kept, _, _ = benched
    with pytest.raises(ArtefactInvalid, match=sentence):
        republished(registry, kept["runs"][0]["version"], tmp_path, "bad", **changes)


def test_networks_that_are_not_the_manifests_are_refused(benched, tmp_path):
    _, registry, kept, _, _ = benched
    ours = republished(registry, kept["runs"][0]["version"], tmp_path, "wide", model={"dim": 32})
    with pytest.raises(ArtefactInvalid, match="user vector"):
        load_networks(ours.open("wide"))
    with pytest.raises(ArtefactInvalid, match=r"item_table\.npy"):
        ours.open("wide").item_table()


def test_an_altered_release_is_refused(benched, tmp_path):
    import shutil

    _, registry, kept, _, _ = benched
    shutil.copytree(registry, tmp_path / "models")
    version = kept["runs"][0]["version"]
    path = tmp_path / "models" / "versions" / version / "network.json"
    path.write_text(path.read_text().replace('"fusion_weight"', '"fusion_wait"'))
    with pytest.raises(ArtefactInvalid, match=r"network\.json"):
        Registry(tmp_path / "models").open(version, kind="retrieval")
    artefact = Registry(registry).open(version, kind="retrieval")
    assert load_config(artefact).fitted == "train"
    assert [one.config for one in load_networks(artefact)] == [load_config(artefact).network]


def test_the_bench_says_what_is_wrong(benched):
    log = str(benched[0])
    for options, sentence in (
        (["--recipe", "huge"], "huge"),
        (["--seeds", "one"], "whole numbers"),
    ):
        answer = CliRunner().invoke(accuracy, ["--log", log, *options])
        assert answer.exit_code != 0 and sentence in answer.output and "Traceback" not in answer.output
