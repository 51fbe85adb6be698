"""Graphs of a retriever held against its networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from compression.evaluation.scoring import to_history
from compression.retrieval.export import graphs_of, inputs_of, outputs_of, state_names
from compression.retrieval.retriever import Retriever
from compression.training.export import ParityError
from compression.training.model import History
from features.encoding import BEHAVIOR_ROWS, GAP_ROWS, HistoryArrays

TOLERANCE: Final = 1e-4
"""Of the largest difference, relative to the largest number there is where that is above 1."""
APPENDED: Final = 3
"""So many events in a row are appended."""

_EVENT: Final = ("items", "categories", "behaviors", "gaps")
Arrays = dict[str, npt.NDArray[Any]]


def check_parity(retriever: Retriever, folder: Path, *, seed: int = 11) -> float:
    """The largest difference between the graphs and the networks, over random histories of every awkward
    length; `ParityError` above the tolerance."""
    retriever, worst = retriever.eval(), 0.0
    for graph, file in graphs_of(retriever).items():
        session = _session(folder / file)
        for users, most, candidates in ((1, 1, 1), (7, 25, 50), (9, retriever.max_history, 20)):
            slots = min(most, retriever.max_history)
            arrays = random_inputs(retriever, users=users, slots=slots, candidates=candidates, seed=seed)
            if graph == "append":
                worst = max(worst, _appended(retriever, session, arrays))
                continue
            names = outputs_of(graph, retriever)
            actual = session.run(list(names), {name: arrays[name] for name in inputs_of(graph, retriever)})
            for name, theirs in zip(names, actual, strict=True):
                worst = max(worst, _difference(graph, name, theirs, arrays[name]))
    if worst > TOLERANCE:
        raise ParityError(f"the graphs differ from the networks by {worst:.2e}, more than {TOLERANCE}")
    return worst


def random_inputs(retriever: Retriever, *, users: int, slots: int, candidates: int, seed: int) -> Arrays:
    """Inputs and outputs of every graph but append by name, for random right-padded histories from full to
    empty."""
    rng = np.random.default_rng(seed)
    rows = retriever.members[0].config.item_rows
    lengths = np.linspace(slots, 0 if users > 1 else slots, users).astype(np.int32)
    valid = np.arange(slots) < lengths[:, None]

    def drawn(high: int) -> npt.NDArray[np.int32]:
        return np.where(valid, rng.integers(1, high, valid.shape), 0).astype(np.int32)

    histories = HistoryArrays(
        items=drawn(rows),
        categories=drawn(max(2, *(network.config.category_rows for network in retriever.members), 2)),
        behaviors=drawn(BEHAVIOR_ROWS),
        gaps=drawn(GAP_ROWS),
        lengths=lengths,
    )
    asked = rng.integers(1, rows, (users, candidates)).astype(np.int32)
    states: Arrays = {}
    with torch.inference_mode():
        vectors = retriever.user_vectors(to_history(histories))
        scores = retriever.score(vectors, torch.from_numpy(asked))
        if retriever.appends:
            encoded = retriever.encode(to_history(histories))
            named = zip(state_names(retriever), encoded.states, strict=True)
            states = {name: state.numpy() for name, state in named}
    return {
        **histories.tensors(),
        **states,
        "candidates": asked,
        "candidate_categories": np.zeros_like(asked),
        "user_vector": vectors.numpy(),
        "scores": scores.numpy(),
    }


def _appended(retriever: Retriever, session: Any, arrays: Arrays) -> float:
    """The largest difference between histories encoded whole and the same whose last events are appended one
    by one, each to the states that the ones before it were given."""
    lengths, worst = arrays["lengths"], 0.0
    # What lies behind the events before is whatever was there; it must not be read.
    later = np.arange(arrays["items"].shape[1]) >= lengths[:, None] - APPENDED
    states = {
        name: np.where(later[..., None], np.float32(7.0), arrays[name]) for name in state_names(retriever)
    }
    names = outputs_of("append", retriever)
    for left in range(min(APPENDED, int(lengths.max())), 0, -1):
        users = np.flatnonzero(lengths >= left)
        before = lengths[users] - left
        event = {name: arrays[name][users, before][:, None] for name in _EVENT}
        given = event | {name: state[users] for name, state in states.items()} | {"lengths": before}
        vectors, *new = session.run(list(names), given)
        histories = {name: torch.from_numpy(arrays[name][users]) for name in _EVENT}
        with torch.inference_mode():
            whole = retriever.encode(History(**histories, lengths=torch.from_numpy(before + 1)))
        expected = (whole.user_vector.numpy(), *(arrays[name][users, before][:, None] for name in states))
        for name, theirs, ours in zip(names, (vectors, *new), expected, strict=True):
            worst = max(worst, _difference("append", name, theirs, ours))
        for state, added in zip(states.values(), new, strict=True):
            state[users, before] = added[:, 0]
    return worst


def _difference(graph: str, name: str, theirs: npt.NDArray[Any], ours: npt.NDArray[Any]) -> float:
    if theirs.shape != ours.shape or not np.isfinite(theirs).all():
        raise ParityError(f"{graph}: {name} has the wrong shape or is not finite")
    return float(np.abs(theirs - ours).max() / max(1.0, np.abs(ours).max()))


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
