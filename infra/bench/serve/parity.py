"""Whether an arm answers as the model does: the first requests' scores beside ONNX Runtime's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from compression.releases.registry import Artefact
from infra.bench.serve import payload

COMPARED: Final = 8  # requests


def expected_scores(artefact: Artefact, requests: Sequence[payload.Int32]) -> list[payload.Float32]:
    """What the answers to requests [lists, ROW] should be."""
    from inference import engines

    engine = engines.create("onnx")
    engine.load(artefact, ("rank",))
    scores = [engine.run("rank", payload.tensors(rows))["scores"] for rows in requests]
    engine.close()
    return scores


def difference(answers: Sequence[payload.Float32], expected: Sequence[payload.Float32]) -> float:
    """The largest of any score; infinite where an answer has not as many."""
    if [answer.shape for answer in answers] != [scores.shape for scores in expected]:
        return float("inf")
    return max(float(np.abs(answer - scores).max()) for answer, scores in zip(answers, expected, strict=True))
