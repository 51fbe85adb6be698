"""torch, the reference: the network itself, rebuilt from the manifest and its weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from safetensors.torch import load as load_safetensors

from compression.model import Encoded, History, Recommender
from compression.registry import Artefact
from inference.engines.base import GRAPHS, OUTPUTS, WEIGHTS, Engine, EngineOptions
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors


class TorchEngine(Engine):
    name = "torch"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._network: Recommender | None = None
        self._device = torch.device(options.device.lower())
        self._dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32

    def load(self, artefact: Artefact, graphs: Sequence[Graph] = GRAPHS) -> None:
        # One setting for the process: torch knows no threads per model.
        torch.set_num_threads(self.options.threads)
        self.model = artefact.manifest.model
        try:
            network = Recommender(self.model)
            network.load_state_dict(load_safetensors(artefact.read(WEIGHTS)))
        except (RuntimeError, ValueError) as error:
            raise ModelUnavailable(f"torch refused the weights: {error}") from error
        self._network = network.to(self._device).eval()

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        if self._network is None:
            raise EngineFailed("torch: no model is loaded")
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        lower = self._dtype is not torch.float32
        try:
            with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=lower):
                outputs = self._compute(self._network, graph, tensors)
        except (RuntimeError, IndexError) as error:
            raise EngineFailed(f"torch: {graph}: {error}") from error
        return {
            name: output.float().cpu().numpy() for name, output in zip(OUTPUTS[graph], outputs, strict=True)
        }

    @staticmethod
    def _compute(
        network: Recommender, graph: Graph, tensors: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        if graph == "append":
            event = History(**{name: tensors[name] for name in History._fields})
            return tuple(network.append(tensors["keys"], tensors["values"], event))
        if graph == "score":
            encoded = Encoded(tensors["user_vector"], tensors["keys"], tensors["values"])
        else:
            encoded = network.encode(History(**{name: tensors[name] for name in History._fields}))
        if graph == "encode":
            return tuple(encoded)
        scores = network.score(
            encoded, tensors["lengths"], tensors["candidates"], tensors["candidate_categories"]
        )
        return (scores,) if graph == "score" else (scores, encoded.user_vector)

    def close(self) -> None:
        self._network = None
