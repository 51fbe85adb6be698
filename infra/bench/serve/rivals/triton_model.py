"""What Triton's Python backend loads: the ranker, over all requests of a batch together."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton_python_backend_utils as backend

from infra.bench.serve.rivals.session import Ranker

NAMES = ("items", "categories", "behaviors", "gaps", "lengths", "candidates", "candidate_categories")


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        self._ranker = Ranker()

    def execute(self, requests: list[Any]) -> list[Any]:
        inputs = {
            name: [backend.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in NAMES
        }
        sizes = [len(array) for array in inputs["items"]]
        scores = self._ranker.run({name: np.concatenate(arrays) for name, arrays in inputs.items()})
        parts = np.split(scores, np.cumsum(sizes)[:-1])
        return [backend.InferenceResponse([backend.Tensor("scores", part)]) for part in parts]
