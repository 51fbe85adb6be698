"""The network as three ONNX graphs, checked against torch before anybody sees them.

encode and score are the two halves for a cache of encoded histories; rank is both in one.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from compression.model import Encoded, History, Recommender
from compression.scoring import to_history
from features.encoding import HistoryArrays

OPSET: Final = 18
TOLERANCE: Final = 1e-4
GRAPHS: Final = {"encode": "encode.onnx", "score": "score.onnx", "rank": "rank.onnx"}
PARITY_LENGTHS: Final = (0, 1, 2, 25, 50, 99, 100)

_HISTORY: Final = ("items", "categories", "behaviors", "gaps", "lengths")
_CANDIDATES: Final = ("candidates", "candidate_categories")
Arrays = dict[str, npt.NDArray[Any]]


class ParityError(RuntimeError):
    """An exported graph does not answer as the network does."""


class Encode(nn.Module):
    inputs, outputs = _HISTORY, ("user_vector", "keys", "values")

    def __init__(self, model: Recommender) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model.encode(History(*tensors)))


class Score(nn.Module):
    inputs, outputs = ("keys", "values", "lengths", "user_vector", *_CANDIDATES), ("scores",)

    def __init__(self, model: Recommender) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> Tensor:
        keys, values, lengths, user_vector, items, categories = tensors
        return self.model.score(Encoded(user_vector, keys, values), lengths, items, categories)


class Rank(nn.Module):
    inputs, outputs = (*_HISTORY, *_CANDIDATES), ("scores", "user_vector")

    def __init__(self, model: Recommender) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        history = History(*tensors[:5])
        encoded = self.model.encode(history)
        return self.model.score(encoded, history.lengths, *tensors[5:]), encoded.user_vector


def export(model: Recommender, folder: Path) -> dict[str, str]:
    """Write the graphs, each in one file, every batch dimension dynamic; graph name to file name."""
    model = model.eval()
    arrays = random_inputs(model, users=2, slots=5, candidates=3, seed=0)
    for graph, module in _graphs(model).items():
        (folder / GRAPHS[graph]).write_bytes(_to_onnx(module, arrays))
    return dict(GRAPHS)


def check_parity(model: Recommender, folder: Path, *, seed: int = 11) -> float:
    """The largest difference between the graphs and the network, over random histories of every
    awkward length; `ParityError` above the tolerance."""
    import onnxruntime

    worst = 0.0
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    for graph, module in _graphs(model.eval()).items():
        session = onnxruntime.InferenceSession(
            (folder / GRAPHS[graph]).read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        for users, slots, candidates in ((1, 1, 1), (7, 25, 50), (9, model.shape.max_history, 20)):
            arrays = random_inputs(model, users=users, slots=slots, candidates=candidates, seed=seed)
            with torch.inference_mode():
                expected = module(*(torch.from_numpy(arrays[name]) for name in module.inputs))
            expected = expected if isinstance(expected, tuple) else (expected,)
            actual = session.run(list(module.outputs), {name: arrays[name] for name in module.inputs})
            for name, ours, theirs in zip(module.outputs, expected, actual, strict=True):
                if theirs.shape != tuple(ours.shape) or not np.isfinite(theirs).all():
                    raise ParityError(f"{graph}: {name} has the wrong shape or is not finite")
                worst = max(worst, float(np.abs(theirs - ours.numpy()).max()))
    if worst > TOLERANCE:
        raise ParityError(f"the graphs differ from the network by {worst:.2e}, more than {TOLERANCE}")
    return worst


def random_inputs(model: Recommender, *, users: int, slots: int, candidates: int, seed: int) -> Arrays:
    """Inputs of every graph by name, for random right-padded histories."""
    rng, shape = np.random.default_rng(seed), model.shape
    allowed = [length for length in PARITY_LENGTHS if length <= slots]
    lengths = np.array([allowed[user % len(allowed)] for user in range(users)][::-1], np.int32)
    valid = np.arange(slots) < lengths[:, None]

    def rows(low: int, high: int) -> npt.NDArray[np.int32]:
        return np.where(valid, rng.integers(low, high, valid.shape), 0).astype(np.int32)

    histories = HistoryArrays(
        items=rows(1, shape.item_rows),
        categories=rows(1, shape.category_rows),
        behaviors=rows(1, 5),
        gaps=rows(1, 32),
        lengths=lengths,
    )
    with torch.inference_mode():
        encoded = model.encode(to_history(histories))
    return {
        **histories.tensors(),
        "candidates": rng.integers(1, shape.item_rows, (users, candidates)).astype(np.int32),
        "candidate_categories": rng.integers(1, shape.category_rows, (users, candidates)).astype(np.int32),
        "user_vector": encoded.user_vector.numpy(),
        "keys": encoded.keys.numpy(),
        "values": encoded.values.numpy(),
    }


def _graphs(model: Recommender) -> dict[str, Encode | Score | Rank]:
    return {"encode": Encode(model), "score": Score(model), "rank": Rank(model)}


def _to_onnx(module: Encode | Score | Rank, arrays: Arrays) -> bytes:
    dims = {name: torch.export.Dim(name, min=1) for name in ("users", "slots", "candidates")}

    def dynamic(name: str) -> dict[int, Any]:
        if name in {"keys", "values"}:
            return {0: dims["users"], 3: dims["slots"]}
        if name in _CANDIDATES:
            return {0: dims["users"], 1: dims["candidates"]}
        return (
            {0: dims["users"]} if name in {"lengths", "user_vector"} else {0: dims["users"], 1: dims["slots"]}
        )

    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(torch.from_numpy(arrays[name]) for name in module.inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(module.inputs),
            output_names=list(module.outputs),
            dynamic_shapes={"tensors": tuple(dynamic(name) for name in module.inputs)},
            verbose=False,
        )
    if program is None:
        raise ParityError("the exporter gave no graph")
    data: bytes = program.model_proto.SerializeToString()
    return data
