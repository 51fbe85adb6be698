"""numpy: the same network in plain arrays, for tests and for reading. Needs nothing but numpy.

Slow, deterministic, and independent of every exporter: where it agrees with torch, so do the graphs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from compression.registry import Artefact, ModelShape
from features.encoding import CANDIDATE_BEHAVIOR
from inference.engines.base import GRAPHS, WEIGHTS, Engine, EngineOptions
from inference.errors import EngineFailed, ModelUnavailable
from inference.types import Graph, Tensors

_MASKED: Final = np.float32(-1e9)
_EPSILON: Final = np.float32(1e-6)

Float32 = npt.NDArray[np.float32]
Rotation = tuple[Float32, Float32]  # cos and sin of some positions
Ints = npt.NDArray[np.integer[Any]]


class NumpyEngine(Engine):
    name = "numpy"

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options)
        self._network: _Network | None = None

    def load(self, artefact: Artefact, graphs: Sequence[Graph] = GRAPHS) -> None:
        if self.options.precision != "f32":
            raise ModelUnavailable(f"the numpy engine computes in f32, not {self.options.precision}")
        self.model = artefact.manifest.model
        self._network = _Network(self.model, read_safetensors(artefact.read(WEIGHTS)))

    def run(self, graph: Graph, inputs: Tensors) -> Tensors:
        if self._network is None:
            raise EngineFailed("numpy: no model is loaded")
        network, given = self._network, inputs
        try:
            if graph == "score":
                return {"scores": network.score(given)}
            encoded = network.encode(given)
            if graph == "encode":
                return encoded
            return {"scores": network.score({**given, **encoded}), "user_vector": encoded["user_vector"]}
        except (ValueError, IndexError, KeyError) as error:
            raise EngineFailed(f"numpy: {graph}: {error!r}") from error

    def close(self) -> None:
        self._network = None


class _Network:
    """`compression.model.Recommender` without gradients; read that page first."""

    def __init__(self, shape: ModelShape, weights: Mapping[str, Float32]) -> None:
        self._shape = shape
        self._weights = weights
        half = shape.dim // shape.heads // 2
        frequencies = 10_000.0 ** (-np.arange(half, dtype=np.float32) / half)
        angles = np.outer(np.arange(shape.max_history + 1, dtype=np.float32), frequencies)
        self._cos = np.cos(angles).astype(np.float32)
        self._sin = np.sin(angles).astype(np.float32)

    def encode(self, given: Tensors) -> Tensors:
        lengths = given["lengths"].astype(np.int64)
        slots = given["items"].shape[1]
        rotation = self._rotation(np.arange(slots))
        x = self._items(given["items"], given["categories"])
        x = x + self._row("behaviors", given["behaviors"]) + self._row("gaps", given["gaps"])
        future = np.triu(np.ones((slots, slots), np.bool_), 1)
        keys, values = [], []
        last = self._shape.layers - 1
        for layer in range(last):
            query, key, value = self._projected(layer, x, rotation)
            weights = _softmax(_hide(_scores(query, key), future))
            x = self._finish(layer, x, weights @ value)
            keys.append(key)
            values.append(value)
        _, key, value = self._projected(last, x, rotation)
        keys.append(key)
        values.append(value)
        newest = np.maximum(lengths - 1, 0)
        turn = newest[:, None, None]
        state = self._isolated(
            last, x[np.arange(len(x)), newest][:, None], self._rotation(turn), (key, value), turn
        )
        state = np.where(lengths[:, None] > 0, state[:, 0], self._weights["no_history"])
        return {
            "user_vector": self._norm("final_norm", state),
            "keys": np.stack(keys, 1),
            "values": np.stack(values, 1),
        }

    def score(self, given: Tensors) -> Float32:
        vectors = self._items(given["candidates"], given["candidate_categories"])
        position = given["lengths"].astype(np.int64)[:, None, None]
        rotation = self._rotation(position)
        x = vectors + self._weights["behaviors.weight"][CANDIDATE_BEHAVIOR] + self._weights["gaps.weight"][0]
        for layer in range(self._shape.layers):
            key, value = given["keys"][:, layer], given["values"][:, layer]
            x = self._isolated(layer, x, rotation, (key, value), position)
        read = self._linear("readout.2", _gelu(self._linear("readout.0", self._norm("final_norm", x))))
        affinity = (vectors * given["user_vector"][:, None]).sum(-1)
        return np.asarray(read[..., 0] + self._weights["affinity_scale"] * affinity, np.float32)

    def _isolated(
        self, layer: int, x: Float32, rotation: Rotation, history: tuple[Float32, Float32], visible: Ints
    ) -> Float32:
        """Tokens that each attend to the first `visible` events and to themselves."""
        key, value = history
        query, own_key, own_value = self._projected(layer, x, rotation)
        hidden = (np.arange(key.shape[2]) >= visible)[:, None]
        to_self = (query * own_key).sum(-1, keepdims=True) * np.float32(own_key.shape[-1] ** -0.5)
        weights = _softmax(np.concatenate([_hide(_scores(query, key), hidden), to_self], -1))
        return self._finish(layer, x, weights[..., :-1] @ value + weights[..., -1:] * own_value)

    def _projected(self, layer: int, x: Float32, rotation: Rotation) -> tuple[Float32, ...]:
        """Rotated queries, rotated keys, and values: each [users, heads, tokens, dim/heads]."""
        normed = self._norm(f"blocks.{layer}.attention_norm", x)
        query = self._linear(f"blocks.{layer}.query", normed)
        key, value = np.split(self._linear(f"blocks.{layer}.key_value", normed), 2, axis=-1)
        heads = self._heads
        return _rotate(heads(query), rotation), _rotate(heads(key), rotation), heads(value)

    def _finish(self, layer: int, x: Float32, mixed: Float32) -> Float32:
        joined = mixed.swapaxes(1, 2).reshape(x.shape)
        x = x + self._linear(f"blocks.{layer}.output", joined)
        hidden = _gelu(self._linear(f"blocks.{layer}.ffn.0", self._norm(f"blocks.{layer}.ffn_norm", x)))
        return x + self._linear(f"blocks.{layer}.ffn.2", hidden)

    def _rotation(self, positions: Ints) -> Rotation:
        return self._cos[positions], self._sin[positions]

    def _heads(self, x: Float32) -> Float32:
        return x.reshape(*x.shape[:2], self._shape.heads, -1).swapaxes(1, 2)

    def _items(self, items: Ints, categories: Ints) -> Float32:
        return self._row("items", items) + self._row("categories", categories)

    def _row(self, table: str, rows: Ints) -> Float32:
        return self._weights[f"{table}.weight"][rows]

    def _norm(self, name: str, x: Float32) -> Float32:
        scale = 1 / np.sqrt(np.square(x).mean(-1, keepdims=True) + _EPSILON)
        return np.asarray(x * scale * self._weights[f"{name}.weight"], np.float32)

    def _linear(self, name: str, x: Float32) -> Float32:
        return x @ self._weights[f"{name}.weight"].T + self._weights.get(f"{name}.bias", np.float32(0))


def read_safetensors(content: bytes) -> dict[str, Float32]:
    """float32 tensors by name. The format is a JSON header and raw bytes: no library is needed."""
    try:
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        body = memoryview(content)[8 + size :]
        tensors: dict[str, Float32] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] != "F32":
                raise ModelUnavailable(f"weights: {name} is {entry['dtype']}, not F32")
            start, end = entry["data_offsets"]
            tensors[name] = np.frombuffer(body[start:end], "<f4").reshape(entry["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelUnavailable(f"weights: not safetensors: {error}") from error
    return tensors


def _scores(query: Float32, key: Float32) -> Float32:
    return query @ key.swapaxes(-1, -2) * np.float32(key.shape[-1] ** -0.5)


def _hide(scores: Float32, hidden: npt.NDArray[np.bool_]) -> Float32:
    return np.where(hidden, _MASKED, scores)


def _softmax(x: Float32) -> Float32:
    grown = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(grown / grown.sum(-1, keepdims=True), np.float32)


def _gelu(x: Float32) -> Float32:
    inner = np.float32(0.7978845608) * (x + np.float32(0.044715) * x * x * x)
    return np.asarray(np.float32(0.5) * x * (1 + np.tanh(inner)), np.float32)


def _rotate(x: Float32, rotation: Rotation) -> Float32:
    cos, sin = rotation
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
