"""`tailrace-lists`: histories of item ids in, ranked lists of item ids out, one list per user.

This is ranking as the stream has it: candidates are found where none are given, and the lists go through
the same batching, priorities and deadlines. Scores are the network's alone: the server reads what is popular,
not what follows what, so nothing is fused (`features.fusion`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final

import numpy as np

from features.sequence import MAX_EVENTS, pack
from inference.errors import InferenceError
from inference.oip.models import Answer, Question, TensorSpec
from inference.types import RankedList, RankRequest

NAME: Final = "tailrace-lists"
DEFAULT_K: Final = 10
_NONE: Final = -1  # no candidate, no item
_BEHAVIORS: Final = 4
_MAX_TIMESTAMP: Final = 2**32 - 1

# Also told whether it is known whose requests these are.
Rank = Callable[[Sequence[RankRequest], bool], Awaitable[Sequence[RankedList | InferenceError]]]


class ListModel:
    """Inputs: what each user did, oldest first, `lengths` events of the row; perhaps the candidates to
    rank (-1 fills a row up), the users' ids (without them nobody is in a canary) and how many items are
    wanted.
    Outputs: the `counts` best items, -1 and 0 beyond."""

    name = NAME
    platform = "tailrace_lists"
    inputs: Sequence[TensorSpec] = (
        TensorSpec("items", "INT64", ("users", "slots"), 0),
        TensorSpec("categories", "INT64", ("users", "slots"), 0),
        TensorSpec("behaviors", "INT32", ("users", "slots"), 0, _BEHAVIORS - 1),
        TensorSpec("timestamps", "INT64", ("users", "slots"), 0, _MAX_TIMESTAMP),
        TensorSpec("lengths", "INT32", ("users",), 0, "slots"),
        TensorSpec("candidates", "INT64", ("users", "candidates"), _NONE, optional=True),
        TensorSpec("user_ids", "INT64", ("users",), 0, optional=True),
        TensorSpec("k", "INT32", (1,), 1, 1000, optional=True),
    )
    outputs: Sequence[TensorSpec] = (
        TensorSpec("items", "INT64", ("users", "k")),
        TensorSpec("scores", "FP32", ("users", "k")),
        TensorSpec("counts", "INT32", ("users",)),
    )
    most: Mapping[str, int] = {"users": 64, "slots": MAX_EVENTS, "candidates": 1000}

    def __init__(self, version: Callable[[], str], rank: Rank) -> None:
        """`version` is the one that the model is listed under."""
        self._version = version
        self._rank = rank

    @property
    def version(self) -> str:
        return self._version()

    async def infer(self, question: Question) -> Answer:
        k = int(question.inputs["k"][0]) if "k" in question.inputs else DEFAULT_K
        answers = await self._rank(_requests(question, k), "user_ids" in question.inputs)
        items = np.full((len(answers), k), _NONE, np.int64)
        scores = np.zeros((len(answers), k), np.float32)
        counts = np.zeros(len(answers), np.int32)
        versions = set()
        for user, answer in enumerate(answers):
            if isinstance(answer, InferenceError):
                raise answer
            count = counts[user] = len(answer.items)
            items[user, :count] = answer.items
            scores[user, :count] = answer.scores
            versions.add(answer.model_version)
        return Answer({"items": items, "scores": scores, "counts": counts}, ",".join(sorted(versions)))


def _requests(question: Question, k: int) -> list[RankRequest]:
    inputs = question.inputs
    columns = (
        inputs["items"],
        inputs["categories"],
        inputs["behaviors"].astype(np.int64),
        inputs["timestamps"],
    )
    users = inputs["user_ids"].tolist() if "user_ids" in inputs else [0] * len(inputs["items"])
    requests = []
    for row, length in enumerate(inputs["lengths"].tolist()):
        candidates = inputs["candidates"][row] if "candidates" in inputs else None
        requests.append(
            RankRequest(
                user_id=users[row],
                sequence=pack(*(column[row, :length] for column in columns)) if length else None,
                k=k,
                candidates=None if candidates is None else tuple(candidates[candidates != _NONE].tolist()),
                priority=question.priority,
                deadline_s=question.deadline_s,
            )
        )
    return requests
