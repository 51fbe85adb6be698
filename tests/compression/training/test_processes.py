"""Several real processes train one network: the same losses, one leader, and what happens when one dies."""

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
import psutil
import pytest
import torch
from click.testing import CliRunner

from compression.logs.dataset import build_vocabulary, leave_one_out, read_log
from compression.retraining.pipeline import retrain
from compression.retraining.runs import Run
from compression.training.checkpoint import FILE, Checkpoints, Stopped
from compression.training.goals import Goals
from compression.training.group import ALONE
from compression.training.model import Recommender
from compression.training.optimizer import Optimizer
from compression.training.processes import Local, Place, ProcessesInvalid, ProcessLost, torchrun_place
from compression.training.train import Recipe, train
from infra.commands import retraining
from infra.commands.again import again
from tests.compression.small_retraining import RECIPE, result, settings, short_log, work
from tests.support import eventually

ROOT = Path(__file__).parents[3]
# Dropout is drawn by each process for its share, so losses are the same without it only.
SMALL = replace(RECIPE, epochs=2, dropout=0.0, negatives=64, batch_windows=31)
FULL = replace(SMALL, full_softmax_items=20_000)
SAMPLED = replace(SMALL, full_softmax_items=0)


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return short_log(tmp_path_factory.mktemp("log") / "clicks.csv")


@pytest.fixture(scope="module")
def world(log):
    sequences = read_log(log).sequences
    vocabulary = build_vocabulary(sequences, max_items=10**6, item_buckets=16, category_buckets=4)
    return sequences, leave_one_out(sequences), vocabulary


class Watching(Checkpoints):
    """Keeps nothing, and notes the losses of every step."""

    def __init__(self):
        super().__init__()
        self.losses = []

    def offer(self, model, optimizers, rng, at, *, ends=False):
        self.losses.append(tuple(at.sums))


def losses_of(world, recipe, processes):
    watching = Watching()
    with Local(processes).joined() as group:
        trained = train(*world, recipe, group=group, checkpoints=watching)
    return np.array(watching.losses), trained


@pytest.mark.parametrize(
    "recipe, processes",
    [
        (replace(FULL, goals=Goals(buy=4, cart=0)), 2),
        (replace(SAMPLED, sparse_items=0), 2),
        (replace(SAMPLED, epochs=1, batch_windows=2), 3),  # a process without a window in every step
    ],
    ids=["full softmax and goals", "by rows", "empty share"],
)
def test_several_processes_have_the_losses_of_one_at_every_step(world, recipe, processes):
    alone, by_one = losses_of(world, recipe, 1)
    together, by_all = losses_of(world, recipe, processes)
    assert len(alone) == len(together) > 5
    assert together == pytest.approx(alone, rel=2e-5)
    assert [one.retrieval_ndcg for one in by_all.epochs] == pytest.approx(
        [one.retrieval_ndcg for one in by_one.epochs], abs=0.02
    )
    for ours, theirs in zip(by_all.model.parameters(), by_one.model.parameters(), strict=True):
        assert float((ours - theirs).detach().abs().max()) < 5e-3


def test_of_a_large_table_only_the_rows_of_a_step_are_sent(world):
    sequences, split, vocabulary = world
    recipe = replace(SAMPLED, epochs=1, sparse_items=0)
    large = replace(vocabulary, item_buckets=100_000)
    losses, trained = losses_of((sequences, split, large), recipe, 2)
    assert 0 < trained.sent_bytes / len(losses) < 0.05 * (4 * recipe.dim * large.item_rows)


def test_a_step_by_rows_moves_these_rows_only(world):
    _, _, vocabulary = world
    recipe = replace(SAMPLED, learning_rate=0.1)
    model = Recommender(recipe.shape(vocabulary))
    optimizer = Optimizer(model, recipe, ALONE, by_rows=True)
    before, rows = model.items.weight.detach().clone(), torch.tensor([3, 9, 3])
    # The second step has no row 9: it stands still, whatever the first one did.
    for step, touched in enumerate((rows, rows[:1])):
        optimizer.zero_grad()
        torch.autograd.backward((10 * model.items(touched)).pow(2).sum())
        assert optimizer.step(None, [torch.tensor(2.0), 1]) == [2.0, 1.0]
        moved = (model.items.weight != before).any(1).nonzero().flatten().tolist()
        assert moved == ([3, 9] if step == 0 else [3])
        before = model.items.weight.detach().clone()


def test_training_by_rows_goes_on_to_the_bit_after_it_was_stopped(world, tmp_path):
    recipe = replace(SAMPLED, sparse_items=0)
    whole = train(*world, recipe).model.state_dict()
    asked = iter(range(1000))
    with pytest.raises(Stopped):
        train(*world, recipe, checkpoints=Checkpoints(tmp_path, stopping=lambda: next(asked) > 6))
    resumed = train(*world, recipe, checkpoints=Checkpoints(tmp_path)).model.state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


@pytest.mark.timeout(400)
def test_stopped_and_killed_two_processes_end_with_the_same_result(log, tmp_path):
    recipe = replace(RECIPE, epochs=3, full_softmax_items=0, negatives=64)
    work(tmp_path / "whole", log, processes=2, recipe=recipe)
    folder = tmp_path / "disturbed"
    asked = iter(range(1000))
    with pytest.raises(Stopped):
        retrain(
            settings(folder, log, recipe=recipe, checkpoint_s=1e9),
            run=Run.begin(folder / "runs", "night"),
            stopping=lambda: next(asked) > 6,
            team=Local(2),
        )
    checkpoint = folder / "runs" / "night" / FILE
    stopped_at = checkpoint.stat().st_mtime_ns
    processes = multiprocessing.get_context("forkserver")
    leader = processes.Process(target=work, args=(folder, log), kwargs={"processes": 2, "recipe": recipe})
    leader.start()
    eventually(lambda: checkpoint.stat().st_mtime_ns > stopped_at, 90, what="a later checkpoint")
    helpers = psutil.Process(leader.pid).children()
    leader.kill()
    leader.join()
    eventually(lambda: not any(one.is_running() for one in helpers), what="helpers end with their leader")
    assert len(helpers) == 1
    assert "train" not in Run.find(folder / "runs", "night").state.steps
    work(folder, log, processes=2, recipe=recipe)
    assert result(folder) == result(tmp_path / "whole")
    assert result(folder)[2]["processes"] == 2


def test_a_process_that_dies_ends_the_training_in_a_sentence(log, tmp_path):
    def kills(step, fraction, note):
        if step == "train" and fraction > 0.1:
            for child in psutil.Process().children():
                if "compression.training.processes" in child.cmdline():
                    child.kill()

    run = Run.begin(tmp_path / "runs", "night")
    with pytest.raises(ProcessLost, match="process 1 of the training ended with signal 9"):
        retrain(settings(tmp_path, log), kills, run=run, team=Local(2))
    state = Run.find(tmp_path / "runs", "night").state
    assert (state.outcome, list(state.steps)) == ("failed", ["read"])


def test_torchrun_starts_the_processes_and_the_first_one_publishes(log, tmp_path):
    options = [
        "--log",
        log,
        "--registry",
        tmp_path / "models",
        "--runs",
        tmp_path / "runs",
        "--recipe",
        "tiny",
    ]
    starts = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    asked = ["--", "infra.cli", "retrain", *map(str, options), "--epochs", "1", "--goal", "buy=4", "--json"]
    done = subprocess.run(
        [*starts, *asked],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (said,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (said["data"]["processes"], said["data"]["goals"]["buy"]) == (2, 4.0)
    assert said["metrics"]["by_behavior"]["pv"]["targets"] > 0
    (run,) = (tmp_path / "runs").glob("*/run.json")
    assert json.loads(run.read_bytes())["outcome"] == "published"


ALONE_IN_A_GROUP = """
import os, torch
from compression.training.processes import Launched, Place
at = torch.nn.Parameter(torch.zeros(1))
with Launched(Place(0, 1, 0)) as team, team.joined():
    torch.distributed.all_reduce(at.data)
    at.sum().backward()
    torch.optim.AdamW([at]).step()
print(*sorted(open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are read from /proc")
def test_no_thread_of_a_group_outlives_it():
    """One that does may free a tensor while the interpreter ends, which aborts the process."""
    place = WHOLE | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    said = subprocess.run(
        [sys.executable, "-c", ALONE_IN_A_GROUP],
        cwd=ROOT,
        env=os.environ | place | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert "gloo" not in said.stdout, said.stdout


WHOLE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "29500",
}


def test_a_place_is_what_torchrun_says_or_none():
    assert torchrun_place(WHOLE) == Place(1, 2, 1)
    assert torchrun_place({"MASTER_ADDR": "localhost"}) is None


@pytest.mark.parametrize(
    "change, says",
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is not"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is not"),
        ({"RANK": "one"}, "RANK is a number"),
        ({"RANK": "2"}, "do not go together"),
        ({"RANK": "0"}, "do not go together"),
        ({"WORLD_SIZE": "1000"}, "from 1 to 64"),
        ({"MASTER_PORT": "70000"}, "is a port"),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused_in_a_sentence(change, says, log, monkeypatch):
    told = {name: value for name, value in (WHOLE | change).items() if value}
    with pytest.raises(ProcessesInvalid, match=says):
        torchrun_place(told)
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    answer = CliRunner().invoke(retraining.retrain, ["--log", str(log)])
    assert answer.exit_code == 2
    assert says in " ".join(answer.output.replace("│", "").split())


@pytest.mark.parametrize("options", [["--processes", "2"], ["--schedule", "0 * * * *"]])
def test_torchrun_goes_with_no_other_way_to_start_processes(options, log, monkeypatch):
    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    answer = CliRunner().invoke(retraining.retrain, ["--log", str(log), *options])
    assert answer.exit_code == 2
    assert "torchrun" in answer.output


def test_a_schedule_passes_on_every_goal():
    with (
        retraining.retrain.make_context(
            "retrain", ["--topic", "clicks", "--goal", "buy=4", "--goal", "cart=2", "--processes", "2"]
        ) as context,
        click.Context.scope(context),
    ):
        words = again(*retraining.OF_SERVICE)
    assert words[-6:] == ["--goal", "buy=4", "--goal", "cart=2", "--processes", "2"]


def test_a_run_of_before_there_were_goals_is_read():
    assert Recipe.of({"dim": 64, "epochs": 30}) == Recipe()
