"""What every rival shares: the released `rank` graph in ONNX Runtime, and the form of a body.

A body is one row of little-endian int32 per list (`shape.row_ints`): items, categories, behaviors and
gaps [slots each], length [1], candidates and their categories [50 each]. How many slots is the client's
choice, for each request. The answer is float32 scores, [50] per list.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from infra.bench.serve.shape import CANDIDATES, COLUMNS, ROW, row_ints

MODEL = os.environ.get("RIVAL_MODEL", "")
PORT = int(os.environ.get("RIVAL_PORT", "8000"))
WORKERS = int(os.environ.get("RIVAL_WORKERS", "1"))
# In requests: 32 lists, whatever number of lists a request has.
MAX_BATCH = int(os.environ.get("RIVAL_MAX_BATCH", "32"))
LISTS = int(os.environ.get("RIVAL_LISTS", "1"))  # of a request
WAIT_MS = float(os.environ.get("RIVAL_WAIT_MS", "2"))


class Ranker:
    """One session with one thread, warmed: the options of `inference.engines.onnx_engine`."""

    def __init__(self, model: str = MODEL, lists: int = LISTS) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        self._lists = lists
        for batch in (1, 2, 4, 8, 16, 32):
            self.run(_inputs(np.zeros((batch, ROW), np.int32)))

    def rank(self, bodies: Sequence[bytes]) -> list[bytes]:
        """Scores of each body, all through the model together, as long as the longest of them."""
        if len({len(body) for body in bodies}) == 1:
            inputs = _inputs(np.frombuffer(b"".join(bodies), "<i4").reshape(len(bodies) * self._lists, -1))
        else:
            inputs = _together([np.frombuffer(body, "<i4").reshape(self._lists, -1) for body in bodies])
        answer = self.run(inputs).tobytes()
        size = 4 * CANDIDATES * self._lists
        return [answer[start : start + size] for start in range(0, len(answer), size)]

    def run(self, inputs: dict[str, Any]) -> Any:
        """[lists, CANDIDATES] of the graph's inputs, by name."""
        return self._session.run(["scores"], inputs)[0]


def _inputs(rows: Any) -> dict[str, Any]:
    """Of rows [lists, row_ints(slots)]."""
    slots = (rows.shape[1] - row_ints(0)) // len(COLUMNS)
    inputs = {
        name: np.ascontiguousarray(rows[:, place * slots : (place + 1) * slots])
        for place, name in enumerate(COLUMNS)
    }
    rest = rows[:, len(COLUMNS) * slots :]
    inputs["lengths"] = np.ascontiguousarray(rest[:, 0])
    inputs["candidates"] = np.ascontiguousarray(rest[:, 1 : 1 + CANDIDATES])
    inputs["candidate_categories"] = np.ascontiguousarray(rest[:, 1 + CANDIDATES :])
    return inputs


def _together(requests: list[Any]) -> dict[str, Any]:
    """Rows of requests that differ in slots, padded to the most."""
    parts = [_inputs(rows) for rows in requests]
    lists, slots = sum(map(len, requests)), max(part["items"].shape[1] for part in parts)
    inputs = {
        name: np.concatenate([part[name] for part in parts])
        for name in ("lengths", "candidates", "candidate_categories")
    }
    for name in COLUMNS:
        filled, row = np.zeros((lists, slots), np.int32), 0
        for part in parts:
            column = part[name]
            filled[row : row + len(column), : column.shape[1]] = column
            row += len(column)
        inputs[name] = filled
    return inputs
