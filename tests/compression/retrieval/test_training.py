"""The retrieval network learns, goes on after a kill as if nothing had been, and averages as it says."""

import numpy as np
import pytest
import torch

from compression.errors import ArtefactInvalid
from compression.evaluation.catalogue import catalogue_ranks
from compression.evaluation.predictors import Statistics
from compression.evaluation.targets import Targets, metrics
from compression.logs.dataset import Split
from compression.retrieval import trainer
from compression.retrieval.averaging import RunningMean, best_of, mean
from compression.retrieval.judge import Judge
from compression.retrieval.recipe import RECIPES, RecipeInvalid, change, load_recipe
from compression.retrieval.step import Step, without
from compression.retrieval.table import catalogue_scores
from compression.retrieval.trainer import refit, train
from features.sequence import SequenceBatch
from tests.compression.retrieval.worlds import RECIPE, parts, write


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return parts(write(tmp_path_factory.mktemp("log")))


@pytest.fixture(scope="module")
def trained(world):
    return train(*world, RECIPE, seed=1)


def ndcg(trained, world):
    sequences, split, vocabulary = world
    statistics = Statistics(sequences, split, vocabulary)
    targets = Targets.draw(sequences, split.test, vocabulary, limit=10_000, seed=1)
    model = catalogue_scores(trained.network, sequences, vocabulary, statistics.known_items)
    return tuple(
        metrics(catalogue_ranks(scores, targets, statistics.known_items), (10,))["ndcg@10"]
        for scores in (model, statistics.popularity_scores)
    )


def test_the_network_learns_what_popularity_cannot(trained, world):
    model, popularity = ndcg(trained, world)
    assert model > 2 * popularity


@pytest.mark.parametrize(
    "changes",
    [
        {"full_softmax_items": 0, "negatives": 100},
        {"event_dropout": 0.2, "positions": False},
        {"prefixes": True, "event_dropout": 0.2, "epochs": 3},
        {"behaviors": True, "gaps": True, "activation": "swiglu", "reach": False},
        {"categories": True, "recency": 1.0, "seen": "ranked", "averaged": 2},
        {"positions": False, "lateness": True, "epochs": 4},
    ],
)
def test_so_it_does_with_shared_negatives_and_other_inputs(world, changes):
    model, popularity = ndcg(train(*world, change(RECIPE, changes, "test"), seed=1), world)
    assert model > 1.5 * popularity


def test_prefixes_ask_once_for_every_training_event_but_each_first(world, monkeypatch):
    sequences, split, vocabulary = world
    asked = []

    def noted(self, states, places, rng, whole=Step._loss):
        asked.append(places.numpy() + 1)
        return whole(self, states, places, rng)

    monkeypatch.setattr(Step, "_loss", noted)
    train(*world, change(RECIPE, {"prefixes": True, "epochs": 1}, "test"), seed=1)
    trained = np.setdiff1d(split.train_positions(sequences), sequences.offsets)
    assert sorted(np.concatenate(asked)) == sorted(vocabulary.item_rows_of(sequences.items[trained]))


def test_the_selection_is_no_worse_than_the_best_epoch(trained, world):
    best = max(epoch.verdict.fused for epoch in trained.epochs)
    assert trained.selection.verdict.fused >= best
    sequences, split, vocabulary = world
    judge = Judge(sequences, split, vocabulary, Statistics(sequences, split, vocabulary), RECIPE)
    assert judge(trained.network) == trained.selection.verdict


class Killed(Exception):
    pass


def test_a_training_that_was_killed_ends_as_one_that_was_not(world, trained, tmp_path, monkeypatch):
    def killed_in_the_third(self, number, tell, whole=trainer._Run._epoch):
        if number == 3:
            whole(self, number, tell)
            raise Killed
        return whole(self, number, tell)

    with monkeypatch.context() as patched:
        patched.setattr(trainer._Run, "_epoch", killed_in_the_third)
        with pytest.raises(Killed):
            train(*world, RECIPE, seed=1, folder=tmp_path)
    resumed = train(*world, RECIPE, seed=1, folder=tmp_path)
    assert [epoch.loss for epoch in resumed.epochs] == pytest.approx(
        [epoch.loss for epoch in trained.epochs], abs=1e-3
    )
    assert resumed.selection.epochs == trained.selection.epochs
    for name, weights in trained.network.state_dict().items():
        torch.testing.assert_close(resumed.network.state_dict()[name], weights, atol=1e-3, rtol=0)
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors")]


def test_a_finished_training_is_not_trained_again(world, tmp_path, monkeypatch):
    recipe = change(RECIPE, {"epochs": 2}, "test")
    first = train(*world, recipe, seed=1, folder=tmp_path)
    monkeypatch.setattr(trainer._Run, "_epoch", lambda *_: pytest.fail("trained"))
    again = train(*world, recipe, seed=1, folder=tmp_path)
    assert again.selection == first.selection and again.epochs == first.epochs


def test_a_training_of_more_epochs_goes_on_where_fewer_ended(world, tmp_path):
    longer, shorter = (change(RECIPE, {"epochs": epochs}, "test") for epochs in (3, 2))
    train(*world, shorter, seed=1, folder=tmp_path)
    on = train(*world, longer, seed=1, folder=tmp_path)
    anew = train(*world, longer, seed=1)
    assert [(e.number, e.loss) for e in on.epochs] == [(e.number, e.loss) for e in anew.epochs]
    assert on.selection == anew.selection


def test_the_state_of_another_training_is_refused(world, tmp_path):
    recipe = change(RECIPE, {"epochs": 1}, "test")
    train(*world, recipe, seed=1, folder=tmp_path)
    with pytest.raises(ArtefactInvalid, match="another"):
        train(*world, recipe, seed=2, folder=tmp_path)


def test_arithmetic_is_ieee_again_after_a_training(world):
    train(*world, change(RECIPE, {"epochs": 1}, "test"), seed=1)
    smallest = float(np.nextafter(0.0, 1.0))
    assert smallest * len("x") > 0


def test_patience_ends_a_training_that_no_longer_gets_better(world):
    recipe = change(RECIPE, {"learning_rate": 1e-9, "ema": 0.0, "patience": 2}, "test")
    done = train(*world, recipe, seed=1)
    assert done.stopped == "validation" and len(done.epochs) < RECIPE.epochs


def test_time_ends_a_training_and_its_last_epoch_is_judged(world):
    recipe = change(RECIPE, {"max_core_minutes": 1e-6, "judge_every": 5}, "test")
    done = train(*world, recipe, seed=1)
    assert done.stopped == "time"
    assert [epoch.verdict is not None for epoch in done.epochs] == [True]


def test_a_refit_learns_the_validation_items_and_nothing_else_does(world, trained):
    sequences, split, vocabulary = world
    both = split.with_validation(sequences)
    assert set(both.train_positions(sequences)) - set(split.train_positions(sequences)) == set(
        split.validation
    )
    assert not set(both.train_positions(sequences)) & set(split.test)
    again = refit(*world, RECIPE, trained.selection, seed=1)
    assert len(again.epochs) == max(trained.selection.epochs)
    targets = Targets.draw(sequences, split.validation, vocabulary, limit=10_000, seed=1)
    known = len(vocabulary.item_ids)
    before, after = (
        metrics(
            catalogue_ranks(catalogue_scores(one.network, sequences, vocabulary, known), targets, known),
            (10,),
        )["ndcg@10"]
        for one in (trained, again)
    )
    assert after > before


def test_without_validation_events_a_split_is_as_it_was():
    split = Split("leave-one-out", np.array([2]), np.array([], np.int64), np.array([], np.int64))

    class Nobody:
        def user_of(self, positions):
            return positions

    assert split.with_validation(Nobody()).train_ends.tolist() == [2]


def test_means_of_weights():
    first, second = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([3.0, 6.0])}
    assert mean([first, second])["w"].tolist() == [2.0, 4.0]
    network = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(network.weight, 0.0)
    running = RunningMean(network, 0.5)
    for value in (10.0, 20.0):
        torch.nn.init.constant_(network.weight, value)
        running.update()
    # decay min(0.5, 1/10), then min(0.5, 2/11)
    after_one = 0.1 * 0.0 + 0.9 * 10.0
    assert running.weights["weight"].item() == pytest.approx(2 / 11 * after_one + 9 / 11 * 20.0)
    assert best_of([(1, 0.2), (2, 0.3), (3, 0.3), (4, 0.1)], 3) == [2, 3, 1]


def test_windows_lose_a_share_of_their_events_but_never_all():
    lengths = np.array([2, 50, 1, 200])
    column = np.arange(lengths.sum())
    batch = SequenceBatch(lengths, column, column, column, column)
    kept = without(batch, 0.4, np.random.default_rng(0))
    assert kept.lengths.sum() == len(kept.items)
    assert kept.lengths.tolist()[0] == 2 and kept.lengths.tolist()[2] == 1
    assert 0.5 < len(kept.items) / len(column) < 0.7
    assert (np.diff(kept.items) > 0).all()
    ends = np.cumsum(kept.lengths)
    users = np.searchsorted(np.cumsum(lengths), kept.items, side="right")
    assert users.tolist() == np.repeat(np.arange(4), kept.lengths).tolist()
    assert ends[-1] == len(kept.items)


def test_members_are_recipes_of_one_network_and_no_part_of_how_another_trains():
    whole = change(RECIPE, {"members": [{}, {"dim": 8}], "fused_counts": "combined"}, "test")
    first, second = whole.of_members()
    assert first == RECIPE and first.digest() == whole.digest() == RECIPE.digest()
    assert second == change(RECIPE, {"dim": 8}, "test") and second.digest() != first.digest()


def test_recipes_have_names_or_are_files(tmp_path):
    assert load_recipe("beauty") is RECIPES["beauty"]
    path = tmp_path / "mine.json"
    path.write_text('{"base": "ml-1m", "dim": 96}')
    assert load_recipe(str(path)) == RECIPES["ml-1m"].model_copy(update={"dim": 96})
    for text, sentence in (
        ('{"dims": 96}', "dims"),
        ('{"dim": 10, "heads": 3}', "heads"),
        ('{"members": [{}, {"dim": 10, "heads": 3}]}', "heads"),
        ('{"members": [{"max_history": 10}]}', "members: .*max_history"),
        ('{"members": [{"dims": 10}]}', "members: .*dims"),
        ('{"members": []}', "members"),
        ('{"base": "mine"}', "base"),
        ("[1]", "not a JSON object"),
        ("{", "mine.json"),
    ):
        path.write_text(text)
        with pytest.raises(RecipeInvalid, match=sentence):
            load_recipe(str(path))
    with pytest.raises(RecipeInvalid, match="neither a file"):
        load_recipe("huge")
