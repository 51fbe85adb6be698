"""How far what was exported is from ONNX Runtime on the graph that was published."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import numpy as np

from features.encoding import Vocabulary
from inference.engines.calibration import draw
from inference.types import Tensors

CANDIDATES: Final = 50
LENGTHS: Final = (1, 2, 25, 50, 99)
USERS: Final = 8

Run = Callable[[Tensors], Tensors]


def rank_inputs(vocabulary: Vocabulary, longest: int, *, seed: int = 23) -> Iterator[Tensors]:
    """Inputs of "rank": users with histories of every length up to the longest, none at all among them."""
    rng = np.random.default_rng(seed)
    for history in (*(length for length in LENGTHS if length < longest), longest):
        yield draw(vocabulary, users=USERS, history=history, candidates=CANDIDATES, rng=rng)


def reference(content: bytes) -> Run:
    """ONNX Runtime on a graph."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, session.run(names, inputs), strict=True))


def largest_difference(run: Run, published: Run, asked: Iterable[Tensors]) -> float:
    """Of any number of any output, over all that is asked."""
    worst = 0.0
    for inputs in asked:
        answers = run(inputs)
        for name, expected in published(inputs).items():
            worst = max(worst, float(np.abs(answers[name] - expected).max()))
    return worst
