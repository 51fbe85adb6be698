"""Runs inside Triton's Python backend, in Triton's own venv: one of our graphs in ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb


class TritonPythonModel:
    """`graph.onnx` beside this file; the requests that Triton batched go through it at once."""

    def initialize(self, args: dict[str, str]) -> None:
        settings = ort.SessionOptions()
        settings.intra_op_num_threads = settings.inter_op_num_threads = 1
        settings.log_severity_level = 3
        folder = Path(args["model_repository"]) / args["model_version"]
        self._session = ort.InferenceSession(
            (folder / "graph.onnx").read_bytes(), settings, providers=["CPUExecutionProvider"]
        )
        config = json.loads(args["model_config"])
        self._inputs = [tensor["name"] for tensor in config["input"]]

    def execute(self, requests: list[Any]) -> list[Any]:
        given = [
            {name: pb.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            for request in requests
        ]
        wanted = [request.requested_output_names() for request in requests]
        names = sorted({name for names in wanted for name in names})
        inputs = {name: np.concatenate([tensors[name] for tensors in given]) for name in self._inputs}
        outputs = dict(zip(names, self._session.run(names, inputs), strict=True))
        responses, row = [], 0
        for tensors, asked in zip(given, wanted, strict=True):
            rows = slice(row, row + len(tensors[self._inputs[0]]))
            row = rows.stop
            responses.append(pb.InferenceResponse([pb.Tensor(name, outputs[name][rows]) for name in asked]))
        return responses
