"""A search at a toy shape: what is found is within the limits, and a search that was stopped goes on."""

import json

import pytest
import torch
from click.testing import CliRunner
from optuna.trial import TrialState

from compression.errors import ArtefactInvalid
from compression.ranking.graph import FORMS
from compression.ranking.weights import TABLE, untrained
from infra.bench.table1.shapes import QUICK
from infra.bench.table1.steps import Steps, data
from infra.commands.tune import tune
from infra.tuning import network
from infra.tuning.recipe import Recipe
from infra.tuning.study import Limits, Search


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    return Steps(QUICK, tmp_path_factory.mktemp("tune"), 4, 1).baseline()


@pytest.fixture(scope="module")
def validation():
    return data(QUICK, 1, judged=100, part="validation")


def search(folder, baseline, validation, **limits):
    limits = Limits(**({"loss": 0.5, "epochs": 0.5} | limits))
    return Search(
        folder,
        baseline.ranker,
        baseline.bytes,
        validation,
        limits,
        form="shared history",
        candidates=20,
        seed=1,
    )


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(kind="shrunk", layers=1, heads=2, channels=16, dim=20, zeros=0.3, rank=3, table_bits=5),
        Recipe(kind="student", layers=1, heads=4, channels=32, dim=8, matrix_bits=6, table_bits=4),
    ],
)
def test_a_recipes_network_is_what_it_says_stored_and_loaded(recipe, baseline, validation, tmp_path):
    made = network.begin(recipe, baseline.ranker, 1)
    network.teach(recipe, made, baseline.ranker, validation, epochs=0.2, seed=1)
    layer = made.layers[0]
    assert len(made.layers) == recipe.layers and made.network.config.dim == recipe.dim
    assert layer.attention.heads == recipe.heads and layer.ffn.widen.out_features == recipe.channels
    table = made.network.items.weight[1:]
    assert float((table == 0).float().mean()) == pytest.approx(recipe.zeros, abs=0.1)
    assert max(row.unique().numel() for row in table) <= 2**recipe.table_bits + 1
    size = network.store(recipe, made, tmp_path / "a.packed")
    assert size < baseline.bytes / 3
    again = network.load(recipe, baseline.ranker, tmp_path / "a.packed")
    assert again.state_dict().keys() == made.state_dict().keys()
    for name, weight in made.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight)


def test_layers_that_share_and_codes_are_stored_once_and_loaded(baseline, validation, tmp_path):
    recipe = Recipe(kind="shrunk", layers=2, heads=5, channels=40, dim=20, rank=3, distinct=1, splits=10)
    own = recipe.model_copy(update={"distinct": 0, "splits": 0})
    made = network.begin(recipe, baseline.ranker, 1)
    network.teach(recipe, made, baseline.ranker, validation, epochs=0.2, seed=1)
    assert made.layers[0] is made.layers[1]
    size = network.store(recipe, made, tmp_path / "a.packed")
    apart = network.store(own, network.begin(own, baseline.ranker, 1), tmp_path / "b.packed")
    # The layers' weights once instead of twice, and 10 codes a row instead of 20.
    assert size < 0.7 * apart
    again = network.load(recipe, baseline.ranker, tmp_path / "a.packed")
    assert again.layers[0] is again.layers[1]
    assert torch.equal(again.network.items.codes, made.network.items.codes)
    for name, weight in made.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight)
    with pytest.raises(ArtefactInvalid, match=r"b\.packed is not of this recipe"):
        network.load(recipe, baseline.ranker, tmp_path / "b.packed")


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_of_low_rank_maps_shared_layers_and_product_codes_answers_as_torch_does(form):
    from infra.bench.table1.measure import _in_torch

    whole = untrained(QUICK.config(60), 1)
    recipe = Recipe(kind="shrunk", layers=2, heads=5, channels=40, dim=20, rank=4, distinct=1, splits=10)
    made = network.begin(recipe, whole, 1).eval()
    watch = network.Stopwatch(made, form, 7, 1)
    (scores,) = watch._whole()
    assert abs(scores - _in_torch(made, watch._feed)).max() < 1e-5
    share, took_ms = watch.share(made, {})
    assert 0.2 < share < 5 and took_ms > 0
    # Every name of a shared map is rounded where it is computed.
    assert {name.split(".")[2] for name in network.grids(recipe, made)} == {"0", "1"}


def test_a_recipe_without_changes_is_the_network_and_zeros_stay_in_the_table(baseline):
    same = Recipe(kind="shrunk", layers=2, heads=5, channels=40, dim=20)
    made = network.begin(same, baseline.ranker, 1)
    for name, weight in baseline.ranker.state_dict().items():
        assert torch.equal(made.state_dict()[name], weight)
    assert list(network.masks(same, made)) == [f"{TABLE}.weight"]


def test_a_search_goes_on_where_it_was_stopped_and_keeps_what_is_within_the_limits(
    baseline, validation, tmp_path
):
    first = search(tmp_path, baseline, validation, trials=3)
    first.run()
    # As if killed in the middle of a trial.
    first.study.ask()
    second = search(tmp_path, baseline, validation, trials=6)
    assert [trial.params for trial in second.study.trials[:3]] == [t.params for t in first.study.trials[:3]]
    second.run()
    states = [trial.state for trial in second.study.trials]
    assert states.count(TrialState.FAIL) == 1 and TrialState.RUNNING not in states
    assert states.count(TrialState.COMPLETE) + states.count(TrialState.PRUNED) == 6
    assert second.front
    for trial in second.front:
        assert trial.user_attrs["loss"]["loss"] <= 0.5
        stored = (tmp_path / f"trial-{trial.number}.packed").stat().st_size
        assert trial.values[1] == pytest.approx(stored / baseline.bytes)
        assert second.network_of(trial).network.config.dim == trial.user_attrs["recipe"]["dim"]
    given_up = [trial for trial in second.study.trials if trial.state == TrialState.PRUNED]
    assert all(not (tmp_path / f"trial-{trial.number}.packed").exists() for trial in given_up)


def test_what_is_beaten_already_is_not_taught(baseline, validation, tmp_path, monkeypatch):
    found = search(tmp_path, baseline, validation, trials=1, loss=1.0)
    found.run()
    monkeypatch.setattr(found._watch, "share", lambda *_: (1e9, 1e9))
    monkeypatch.setattr(network, "store", lambda *_: 10**12)
    monkeypatch.setattr(network, "teach", None)
    found.study.optimize(found._try, n_trials=1)
    last = found.study.trials[1]
    assert last.state == TrialState.PRUNED and last.user_attrs["given_up"] == "beaten by trial 0"


def test_what_is_far_off_half_way_is_given_up(baseline, validation, tmp_path, monkeypatch):
    found = search(tmp_path, baseline, validation, trials=1, loss=0.0)
    taught = []
    monkeypatch.setattr(network, "teach", lambda recipe, ranker, *_, **__: taught.append(_spoil(ranker)))
    found.run()
    only = found.study.trials[0]
    assert only.state == TrialState.PRUNED and only.user_attrs["given_up"] == "far off" and len(taught) == 1
    assert only.constraints["loss"] > 0.05 and not found.front


def _spoil(ranker):
    with torch.no_grad():
        ranker.network.items.weight.normal_()


def test_the_command_writes_recipes_and_a_plot(monkeypatch, tmp_path):
    monkeypatch.setenv("TAILRACE_HOME", str(tmp_path))
    said, plot = tmp_path / "tune.json", tmp_path / "tune.svg"
    options = ["--shape", "quick", "--epochs", "2", "--trial-epochs", "0.5", "--trials", "3", "--loss", "0.9"]
    ran = CliRunner().invoke(
        tune, [*options, "--json", str(said), "--figure", str(plot)], catch_exceptions=False
    )
    assert ran.exit_code == 0, ran.output
    found = json.loads(said.read_text())
    assert Recipe.model_validate(found["chosen"]) and len(found["trials"]) == 3
    assert found["front"] and all(
        set(one["test_loss"]) == {"hr@50", "ndcg@50", "mrr"} for one in found["front"]
    )
    assert "<svg" in plot.read_text()
