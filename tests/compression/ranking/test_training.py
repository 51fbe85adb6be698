"""A ranker learns a log's structure, and a student what its teacher knows."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from compression.ranking.descent import Effort
from compression.ranking.network import CandidateRanker
from compression.ranking.training import fit, fit_retrieval
from compression.ranking.weights import untrained
from compression.retrieval.network import RetrievalNetwork
from compression.training.checkpoint import Checkpoints
from infra.bench.table1.shapes import QUICK
from infra.bench.table1.steps import data

EFFORT = Effort(epochs=99.0, max_steps=60, learning_rate=5e-3, negatives=128)


def test_a_ranker_and_its_student_learn_and_nothing_that_was_not_asked_for_changes():
    log = data(QUICK, 1)
    config = QUICK.config(log.vocabulary.item_rows)
    teacher, kept = untrained(config, 1), []
    before = log.judge(teacher)
    assert fit(teacher, log, EFFORT, after_step=lambda: kept.append(1)) == len(kept) == 60
    after = log.judge(teacher)
    assert after["hr@50"] > 2 * before["hr@50"]
    assert after["within_ndcg@10"] > before["within_ndcg@10"]
    weights = {name: one.clone() for name, one in teacher.state_dict().items()}
    student = untrained(QUICK.student(log.vocabulary.item_rows), 2)
    fit(student, log, EFFORT, teacher=teacher)
    assert log.judge(student)["hr@50"] > 2 * before["hr@50"]
    assert all(torch.equal(weights[name], one) for name, one in teacher.state_dict().items())
    assert not any(layer.attention.keep_map for layer in student.layers)


def test_a_students_maps_come_closer_to_its_teachers_than_alone():
    log = data(QUICK, 1)
    rows = log.vocabulary.item_rows
    teacher = untrained(QUICK.config(rows), 1)
    with torch.no_grad():
        for layer in teacher.layers:
            layer.reach[:, :3] += 4.0  # looks at the newest three events
    maps = {}
    for weight in (0.0, 10.0):
        student = untrained(QUICK.student(rows), 2)
        fit(
            student,
            log,
            Effort(epochs=99.0, max_steps=60, learning_rate=1e-2, candidates_every=1, maps=weight),
            teacher=teacher,
        )
        student.layers[0].attention.keep_map = True
        history = _history(log)
        with torch.no_grad():
            maps[weight] = student.network.states(history)[1][0].mean(1)[0, 15]
    assert float(maps[10.0][13:16].sum()) > float(maps[0.0][13:16].sum()) + 0.1


def test_a_network_learns_the_catalogue_alone():
    log = data(QUICK, 1)
    torch.manual_seed(0)
    network = RetrievalNetwork(QUICK.config(log.vocabulary.item_rows))
    before = log.judge_retrieval(network)["hr@50"]
    assert fit_retrieval(network, log, EFFORT) == 60
    assert log.judge_retrieval(network)["hr@50"] > 2 * before
    assert log.judge(CandidateRanker(network))["hr@50"] > 2 * before


def test_a_student_lists_what_its_teacher_lists_where_the_catalogue_is_too_large_to_be_compared_whole():
    log = data(QUICK, 1)
    rows = log.vocabulary.item_rows
    effort = replace(EFFORT, full_softmax_items=10, negatives=16, opinions=4.0)
    teacher = untrained(QUICK.config(rows), 1)
    fit(teacher, log, EFFORT)
    alike = {}
    for listed in (0, 64):
        student = untrained(QUICK.student(rows), 2)
        fit(student, log, replace(effort, listed=listed), teacher=teacher)
        alike[listed] = _shared(_lists(log, student), _lists(log, teacher))
    assert alike[64] > alike[0] + 0.03


def test_teachers_beside_the_first_say_what_they_think_too():
    log = data(QUICK, 1)
    rows = log.vocabulary.item_rows
    teachers = [untrained(QUICK.config(rows), seed) for seed in (1, 2)]
    for teacher in teachers:
        fit(teacher, log, EFFORT)
    effort = replace(EFFORT, taught=1.0)
    alike = {}
    for beside in ([], teachers[1:]):
        student = untrained(QUICK.student(rows), 3)
        fit(student, log, effort, teacher=teachers[0], beside=beside)
        alike[len(beside)] = _shared(_lists(log, student), _lists(log, teachers[1]))
    assert alike[1] > alike[0] + 0.03
    assert not any(layer.attention.keep_map for layer in student.layers)


def _lists(log, ranker):
    """The ten items that come first for each user [N, 10]."""
    from compression.evaluation.targets import histories_before
    from compression.ranking.judging import _RankingScorer

    scorer = _RankingScorer(ranker.eval())
    histories = histories_before(log.sequences, log.vocabulary, QUICK.history)(log.targets.positions)
    scores = scorer.user_vectors(histories) @ scorer.item_table()[1 : log.known + 1].T
    return np.argsort(-scores, 1)[:, :10]


def _shared(lists, others):
    return float((lists[:, :, None] == others[:, None]).any(2).mean())


def _history(log):
    from compression.evaluation.scoring import to_history
    from compression.evaluation.targets import histories_before

    positions = log.targets.positions[
        log.targets.positions - log.sequences.offsets[log.sequences.user_of(log.targets.positions)] >= 16
    ]
    return to_history(histories_before(log.sequences, log.vocabulary, 16)(positions[:1]))


class Killed(Exception):
    """As a process that ends between two steps."""


def test_a_training_that_was_killed_goes_on_to_the_weights_it_would_have_had(tmp_path):
    log = data(QUICK, 1)
    config = QUICK.config(log.vocabulary.item_rows)
    # Steps of more than one pass, so that an epoch before the one that was left counts too.
    effort, taken = Effort(epochs=2.5, batch_windows=16, negatives=64), []
    teacher = untrained(config, 3)
    whole = untrained(config, 1)
    steps = fit(whole, log, effort, teacher=teacher, after_step=lambda: taken.append(1))
    assert steps == len(taken)

    def train(made, until):
        count = []

        def after_step():
            count.append(1)
            if len(count) == until:
                raise Killed

        kept = Checkpoints(tmp_path, "one", every_s=0.0)
        return fit(made, log, effort, teacher=teacher, after_step=after_step, checkpoints=kept), len(count)

    with pytest.raises(Killed):
        train(untrained(config, 1), until=int(0.7 * steps))
    again = untrained(config, 2)
    done, left = train(again, until=-1)
    assert done == steps and 0 < left < steps
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert train(untrained(config, 2), until=-1) == (steps, 0)
