"""What behaviours weigh in training, and that evaluation shows it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.nn import functional as F

from compression.evaluation.evaluate import by_behavior
from compression.evaluation.predictors import Statistics
from compression.evaluation.scoring import row_categories, to_history
from compression.evaluation.targets import metrics
from compression.logs.dataset import build_vocabulary, leave_one_out, read_log
from compression.logs.synth import SynthSettings, synthesize, write_log
from compression.training.goals import Goals
from compression.training.lesson import Lesson
from compression.training.losses import Losses
from compression.training.model import Recommender
from compression.training.train import TINY, Recipe, train
from features.encoding import encode_histories
from infra.commands import retraining
from topics.messages import BEHAVIORS

RECIPE = replace(TINY, dim=16, ffn=32, dropout=0.0, item_dropout=0.0, negatives=64, judge_limit=100)
ALONE = {name: Goals(**dict.fromkeys(BEHAVIORS, 0.0) | {name: 1.0}) for name in BEHAVIORS}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.csv"
    write_log(path, synthesize(SynthSettings(4_000, 100, 200, 10, seed=3)))
    sequences = read_log(path).sequences
    split = leave_one_out(sequences)
    return sequences, split, build_vocabulary(sequences, max_items=10**6, item_buckets=16, category_buckets=4)


def losses_of(world, goals, full_softmax_items=20_000):
    """The losses of the last events of 32 users by a network at its start, and what they are losses of."""
    sequences, split, vocabulary = world
    recipe = replace(RECIPE, goals=goals, full_softmax_items=full_softmax_items)
    torch.manual_seed(1)
    model = Recommender(recipe.shape(vocabulary))
    rng = np.random.default_rng(2)
    losses = Losses(vocabulary, Statistics(sequences, split, vocabulary), recipe, rng, Lesson())
    ends = sequences.offsets[1:33]
    starts = np.maximum(sequences.offsets[:32], ends - 20)
    windows = encode_histories(sequences.windows(starts, ends), vocabulary, 20)
    drawn = losses.draw(windows)
    retrieval, ranking, _ = losses(model, drawn)
    return float(retrieval.detach()), float(ranking.detach()), windows, drawn, model


@pytest.mark.parametrize("full_softmax_items", [20_000, 0])
def test_a_loss_is_the_mean_of_the_behaviours_by_their_weights(world, full_softmax_items):
    goals = Goals(pv=1, cart=0.5, fav=2, buy=5)
    *found, windows, drawn, _ = losses_of(world, goals, full_softmax_items)
    targets = windows.behaviors[:, 1:]
    asked = np.take_along_axis(targets, drawn.turn, axis=1)
    for head, behaviors in enumerate((targets, asked)):
        counts = {name: (behaviors == 1 + code).sum() for code, name in enumerate(BEHAVIORS)}
        assert min(counts.values()) > 0
        each = {name: losses_of(world, ALONE[name], full_softmax_items)[head] for name in BEHAVIORS}
        weight = {name: getattr(goals, name) * counts[name] for name in BEHAVIORS}
        expected = sum(weight[name] * each[name] for name in BEHAVIORS) / sum(weight.values())
        assert found[head] == pytest.approx(expected, rel=1e-5)


def test_the_retrieval_loss_of_purchases_is_their_cross_entropy(world):
    found, _, windows, _, model = losses_of(world, ALONE["buy"])
    _, _, vocabulary = world
    with torch.no_grad():
        shorter = replace(
            windows,
            **{name: getattr(windows, name)[:, :-1] for name in ("items", "categories", "behaviors", "gaps")},
            lengths=windows.lengths - 1,
        )
        history = to_history(shorter)
        rows = torch.arange(vocabulary.item_rows)
        table = model.item_vectors(rows, torch.from_numpy(row_categories(vocabulary)))
        seen = torch.ones(len(windows), 1, dtype=torch.long)
        states, _ = model(history, table[None, :1].expand(len(windows), 1, -1), seen)
        trained = 1 + np.flatnonzero(Statistics(*world).counts[1:])
        bought = torch.from_numpy(windows.behaviors[:, 1:] == 4)
        target = torch.from_numpy(np.searchsorted(trained, windows.items[:, 1:]))[bought]
        expected = F.cross_entropy(states[bought] @ table[trained].T, target)
    assert found == pytest.approx(float(expected), rel=1e-5)


def test_only_proportions_count(world):
    """Weights that are all 1 take a shorter way through the code."""
    unit, twice = (
        train(*world, replace(RECIPE, epochs=2, goals=goals)).epochs[-1]
        for goals in (Goals(), Goals(2, 2, 2, 2))
    )
    assert Goals().alike and not Goals(2, 2, 2, 2).alike
    assert twice.retrieval_loss == pytest.approx(unit.retrieval_loss, abs=2e-4)
    assert twice.ranking_loss == pytest.approx(unit.ranking_loss, abs=2e-4)


def test_a_batch_without_a_target_that_counts_teaches_nothing(world):
    sequences, split, vocabulary = world
    alone = replace(sequences, behaviors=np.zeros_like(sequences.behaviors))
    before = train(alone, split, vocabulary, replace(RECIPE, epochs=1, goals=Goals(pv=0)))
    assert before.epochs[0].retrieval_loss == 0.0
    assert all(bool(torch.isfinite(p).all()) for p in before.model.parameters())


def test_training_for_purchases_finds_them_and_loses_views(world):
    """Purchases of item n follow views of item n, as nothing else does."""
    sequences, split, vocabulary = world
    rng = np.random.default_rng(4)
    items = sequences.items.copy()
    bought = rng.random(len(items)) < 0.3
    bought[sequences.offsets[:-1]] = False
    items[bought] = np.where(bought, np.roll(items, 1), items)[bought]
    told = replace(sequences, items=items, behaviors=np.where(bought, BEHAVIORS.index("buy"), 0))
    losses = {
        name: train(told, split, vocabulary, replace(RECIPE, epochs=4, goals=goals)).epochs[-1]
        for name, goals in (("views", ALONE["pv"]), ("purchases", ALONE["buy"]))
    }
    assert losses["purchases"].retrieval_loss < 0.9 * losses["views"].retrieval_loss


def test_figures_by_behaviour_are_those_of_all_taken_apart():
    rng = np.random.default_rng(1)
    ranks, behaviors = rng.integers(1, 40, 300).astype(float), rng.integers(0, 3, 300)
    found = by_behavior(behaviors, {"retrieval": ranks}, {"ranking_50": ranks})
    assert list(found) == ["pv", "cart", "fav"]
    assert sum(figures["targets"] for figures in found.values()) == 300
    for name, value in metrics(ranks).items():
        mean = sum(f["targets"] * f["retrieval"][name] for f in found.values()) / 300
        assert mean == pytest.approx(value, abs=1e-4)
    assert found["cart"]["ranking_50"]["hr@5"] == pytest.approx(np.mean(ranks[behaviors == 1] <= 5), abs=1e-5)


def test_goals_are_read_from_words_and_json():
    assert Goals.parse(["buy=4", "cart=0.5"]) == Goals(buy=4, cart=0.5)
    recipe = Recipe(goals=Goals(buy=3), precision="bf16")
    assert Recipe.of({"dim": 64, "goals": {"pv": 1.0, "buy": 3}, "precision": "bf16"}) == recipe
    assert Recipe.of({"dim": 64}) == Recipe()
    with pytest.raises(ValueError, match="f16"):
        Recipe(precision="f16")


@pytest.mark.parametrize(
    "words, says",
    [
        (["bye=4"], "one of pv, cart, fav, buy"),
        (["buy"], "number"),
        (["buy=four"], "number"),
        (["buy=nan"], "0 to 10000"),
        (["buy=-1"], "0 to 10000"),
        (["buy=1", "buy=2"], "twice"),
        (["pv=0", "cart=0", "fav=0", "buy=0"], "nothing to learn"),
    ],
)
def test_goals_that_make_no_sense_are_refused_in_a_sentence(words, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        Goals.parse(words)
    (tmp_path / "log.csv").write_text("1,2,3,pv,1511600000\n")
    options = [option for word in words for option in ("--goal", word)]
    command = next(one for one in retraining.commands if one.name == "retrain")
    answer = CliRunner().invoke(command, ["--log", str(tmp_path / "log.csv"), *options])
    assert answer.exit_code == 2
    assert says in " ".join(answer.output.replace("│", "").split())


def test_half_precision_learns_what_full_precision_learns(world):
    full, half = (
        train(*world, replace(RECIPE, epochs=2, precision=precision)) for precision in ("f32", "bf16")
    )
    assert half.epochs[-1].retrieval_loss == pytest.approx(full.epochs[-1].retrieval_loss, rel=0.02)
    assert not torch.equal(half.model.items.weight, full.model.items.weight)
    assert {p.dtype for p in half.model.parameters()} == {torch.float32}
