"""torch, the reference: the network itself, or the networks, rebuilt from the version's weights.

On a CPU it computes in f32 or bf16. On an NVIDIA GPU it also computes in f16, and every shape it is
warmed with becomes a CUDA graph that `run` replays. No GPU was at hand when this was written: what
happens on one follows torch's documentation and is not measured here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any, Final

import torch
from torch.nn import functional as F

from compression.releases.registry import Artefact, ArtefactInvalid
from compression.retrieval.release import load_networks
from compression.retrieval.retriever import Retriever
from compression.training.model import Block, Encoded, History, Recommender
from compression.training.weights import read as read_weights
from inference.engines.base import GRAPHS, WEIGHTS, Engine, EngineOptions, Shape, outputs_of
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors

_DTYPES: Final = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

Key = tuple[Graph, tuple[tuple[str, tuple[int, ...]], ...]]


@dataclass(frozen=True, slots=True)
class _Captured:
    """A CUDA graph of one shape, and the tensors it reads and writes."""

    graph: Any
    inputs: dict[str, torch.Tensor]
    outputs: tuple[torch.Tensor, ...]


class TorchEngine(Engine):
    name = "torch"
    precisions = ("f32", "bf16", "f16")

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._network: Recommender | Retriever | None = None
        self._captured: dict[Key, _Captured] = {}
        self._pool: Any = None
        self._dtype = _DTYPES[options.precision]
        try:
            self._device = torch.device(options.device.lower())
        except RuntimeError as error:
            raise ModelUnavailable(f"torch knows no device {options.device!r}") from error
        if self._device.type not in ("cpu", "cuda"):
            raise ModelUnavailable(f"the torch engine runs on cpu or cuda, not on {options.device}")
        if self._device.type == "cpu" and options.precision == "f16":
            raise ModelUnavailable("on a CPU the torch engine computes in f32 or bf16, not f16")
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ModelUnavailable("torch finds no NVIDIA GPU here")

    def load(self, artefact: Artefact, graphs: Sequence[Graph] = GRAPHS) -> None:
        # One setting for the process: torch knows no threads per model.
        torch.set_num_threads(self.options.threads)
        self.model = artefact.manifest.model
        try:
            network = _network(artefact)
        except ArtefactInvalid as error:
            raise ModelUnavailable(str(error)) from error
        except (RuntimeError, ValueError) as error:
            raise ModelUnavailable(f"torch refused the weights: {error}") from error
        for name, weight in network.state_dict().items():
            if not torch.isfinite(weight).all():
                raise ModelUnavailable(f"torch refused the weights: {name} holds numbers that are not finite")
        self._network = network.to(self._device).eval()

    def warm_up(self, shapes: Iterable[Shape], *, repeats: int = 3) -> dict[Shape, float]:
        shapes = list(shapes)
        if self._device.type == "cuda":
            try:
                for shape in shapes:
                    self._capture(shape)
            except RuntimeError as error:
                raise EngineFailed(f"torch: no CUDA graph of {shape}: {error}") from error
        return super().warm_up(shapes, repeats=repeats)

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        if self._network is None:
            raise EngineFailed("torch: no model is loaded")
        try:
            captured = self._captured.get(_key(graph, inputs)) if self._captured else None
            outputs = self._replay(captured, inputs) if captured else self._eager(graph, inputs)
            # To the host, in f32: what a CUDA graph wrote is overwritten by its next replay.
            arrays = [output.float().cpu().numpy() for output in outputs]
        except (RuntimeError, IndexError) as error:
            raise EngineFailed(f"torch: {graph}: {error}") from error
        return dict(zip(outputs_of(graph, self.model), arrays, strict=True))

    def close(self) -> None:
        self._captured.clear()
        self._pool = None
        self._network = None

    def _eager(self, graph: Graph, inputs: Tensors) -> tuple[torch.Tensor, ...]:
        tensors = {name: torch.from_numpy(array).to(self._device) for name, array in inputs.items()}
        return self._within(graph, tensors)

    def _within(
        self, graph: Graph, tensors: dict[str, torch.Tensor], *, keep_casts: bool = True
    ) -> tuple[torch.Tensor, ...]:
        assert self._network is not None
        lower = self._dtype is not torch.float32
        with (
            torch.inference_mode(),
            torch.autocast(self._device.type, self._dtype, enabled=lower, cache_enabled=keep_casts),
        ):
            return self._compute(self._network, graph, tensors)

    def _capture(self, shape: Shape) -> None:
        """Record one shape. Casts are not shared between calls: a graph must own all that it reads."""
        example = self.example(shape)
        if self._pool is None:
            # One for all shapes: their outputs are kept, so only what lies between is written over.
            self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self._device):
            inputs = {name: torch.from_numpy(array).to(self._device) for name, array in example.items()}
            aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(aside):  # libraries choose their kernels before the recording
                for _ in range(3):
                    self._within(shape.graph, inputs, keep_casts=False)
            torch.cuda.current_stream(self._device).wait_stream(aside)
            recording = torch.cuda.CUDAGraph()
            # Another engine's thread may be using the GPU meanwhile.
            with torch.cuda.graph(recording, pool=self._pool, capture_error_mode="thread_local"):
                outputs = self._within(shape.graph, inputs, keep_casts=False)
        self._captured[_key(shape.graph, example)] = _Captured(recording, inputs, outputs)

    def _replay(self, captured: _Captured, inputs: Tensors) -> tuple[torch.Tensor, ...]:
        with torch.inference_mode():
            for name, tensor in captured.inputs.items():
                tensor.copy_(torch.from_numpy(inputs[name]))
        with torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext():
            captured.graph.replay()
        return captured.outputs

    @staticmethod
    def _compute(
        network: Recommender | Retriever, graph: Graph, tensors: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        if isinstance(network, Retriever):
            return _retrieved(network, graph, tensors)
        states = tuple(tensors[name] for name in network.shape.state_names if name in tensors)
        if graph == "score":
            encoded = Encoded(tensors["user_vector"], states)
        else:
            history = History(**{name: tensors[name] for name in History._fields})
            encoded = network.append(states, history) if graph == "append" else network.encode(history)
        if graph in ("encode", "append"):
            return (encoded.user_vector, *encoded.states)
        scores = network.score(
            encoded, tensors["lengths"], tensors["candidates"], tensors["candidate_categories"]
        )
        return (scores,) if graph == "score" else (scores, encoded.user_vector)


def _network(artefact: Artefact) -> Recommender | Retriever:
    if artefact.manifest.kind == "retrieval":
        return Retriever(load_networks(artefact))
    network = Recommender(artefact.manifest.model)
    network.load_state_dict(read_weights(artefact.read(WEIGHTS)))
    for block in network.blocks:
        block.forward = MethodType(_fused, block)
    return network


def _retrieved(
    network: Retriever, graph: Graph, tensors: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    if graph == "score":
        return (network.score(tensors["user_vector"], tensors["candidates"]),)
    vectors = network.user_vectors(History(**{name: tensors[name] for name in History._fields}))
    return (network.score(vectors, tensors["candidates"]), vectors) if graph == "rank" else (vectors,)


def _key(graph: Graph, inputs: Tensors) -> Key:
    return graph, tuple(sorted((name, array.shape) for name, array in inputs.items()))


def _fused(
    block: Block, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, reach: torch.Tensor
) -> torch.Tensor:
    """`Block.forward` without dropout, its attention one call: a fifth less time at 32 lists on a CPU."""
    asked = block.attention_norm(x)
    found = F.scaled_dot_product_attention(
        asked[:, None], key[:, None], value[:, None], attn_mask=reach[:, None], scale=1.0
    )
    x = x + found.squeeze(1)
    narrowed: torch.Tensor = block.narrow(block.widen(block.ffn_norm(x)).relu())
    return x + narrowed
