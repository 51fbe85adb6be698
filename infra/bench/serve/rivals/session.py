"""What every rival shares: the released `rank` graph in ONNX Runtime, and the form of a body.

A body is one row of little-endian int32 per list (`shape.ROW`): items, categories, behaviors and gaps
[100 each], length [1], candidates and their categories [50 each]. The answer is float32 scores, [50] per
list.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort

from infra.bench.serve.shape import CANDIDATES, COLUMNS, HISTORY, ROW

MODEL = os.environ.get("RIVAL_MODEL", "")
PORT = int(os.environ.get("RIVAL_PORT", "8000"))
WORKERS = int(os.environ.get("RIVAL_WORKERS", "1"))
# In requests: 32 lists, whatever number of lists a request has.
MAX_BATCH = int(os.environ.get("RIVAL_MAX_BATCH", "32"))
WAIT_MS = float(os.environ.get("RIVAL_WAIT_MS", "2"))


class Ranker:
    """One session with one thread, warmed: the options of `inference.engines.onnx_engine`."""

    def __init__(self, model: str = MODEL) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        for lists in (1, 2, 4, 8, 16, 32):
            self.scores(np.zeros((lists, ROW), np.int32))

    def rank(self, bodies: Sequence[bytes]) -> list[bytes]:
        """Scores of each body, all through the model together."""
        rows = np.frombuffer(b"".join(bodies), "<i4").reshape(-1, ROW)
        answer = self.scores(rows).tobytes()
        ends = np.cumsum([len(body) // (4 * ROW) for body in bodies]) * 4 * CANDIDATES
        return [answer[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def scores(self, rows: Any) -> Any:
        """[lists, CANDIDATES] of [lists, ROW]."""
        inputs = {
            name: np.ascontiguousarray(rows[:, place * HISTORY : (place + 1) * HISTORY])
            for place, name in enumerate(COLUMNS)
        }
        inputs["lengths"] = np.ascontiguousarray(rows[:, 4 * HISTORY])
        inputs["candidates"] = np.ascontiguousarray(rows[:, 4 * HISTORY + 1 : -CANDIDATES])
        inputs["candidate_categories"] = np.ascontiguousarray(rows[:, -CANDIDATES:])
        return self.run(inputs)

    def run(self, inputs: dict[str, Any]) -> Any:
        """[lists, CANDIDATES] of the graph's inputs, by name."""
        return self._session.run(["scores"], inputs)[0]
