"""A model as evaluation sees it: user vectors and ranking scores. Two twins, torch and released graphs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from compression.releases.registry import Artefact
from compression.training.model import Encoded, History, Recommender
from features.encoding import HistoryArrays, Vocabulary

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]


class Scorer(Protocol):
    def item_table(self) -> Float32:
        """[item_rows, dim]"""
        ...

    def user_vectors(self, histories: HistoryArrays) -> Float32:
        """[B, dim]"""
        ...

    def rank(self, histories: HistoryArrays, candidates: Int32, categories: Int32) -> Float32:
        """[B, C]"""
        ...


def row_categories(vocabulary: Vocabulary) -> Int32:
    """The category row of every item row: padding for padding, "unknown" for hash buckets."""
    buckets = np.full(vocabulary.item_buckets, vocabulary.unknown_category_row)
    return np.concatenate([[0], vocabulary.item_categories, buckets]).astype(np.int32)


class TorchScorer:
    """The network itself. `categories` is the category row of every item row."""

    def __init__(self, model: Recommender, categories: Int32) -> None:
        self._model = model
        self._categories = categories

    def item_table(self) -> Float32:
        import torch

        with torch.inference_mode():
            rows = torch.arange(len(self._categories))
            table: Float32 = self._model.item_vectors(rows, torch.from_numpy(self._categories)).numpy()
        return table

    def encode(self, histories: HistoryArrays) -> Encoded:
        import torch

        with torch.inference_mode():
            return self._model.encode(to_history(histories))

    def user_vectors(self, histories: HistoryArrays) -> Float32:
        vectors: Float32 = self.encode(histories).user_vector.numpy()
        return vectors

    def rank(self, histories: HistoryArrays, candidates: Int32, categories: Int32) -> Float32:
        import torch

        with torch.inference_mode():
            scores: Float32 = self._model.score(
                self._model.encode(to_history(histories)),
                torch.from_numpy(histories.lengths),
                torch.from_numpy(candidates),
                torch.from_numpy(categories),
            ).numpy()
        return scores


class GraphScorer:
    """Exported graphs by name, encode and rank, run by ONNX Runtime on the CPU."""

    def __init__(self, graphs: Mapping[str, bytes], item_table: Float32) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3

        def session(graph: str) -> onnxruntime.InferenceSession:
            return onnxruntime.InferenceSession(graphs[graph], options, providers=["CPUExecutionProvider"])

        self._table = item_table
        self._encode, self._rank = session("encode"), session("rank")

    def item_table(self) -> Float32:
        return self._table

    def user_vectors(self, histories: HistoryArrays) -> Float32:
        vectors: Float32 = self._encode.run(["user_vector"], histories.tensors())[0]
        return vectors

    def rank(self, histories: HistoryArrays, candidates: Int32, categories: Int32) -> Float32:
        asked = {"candidates": candidates, "candidate_categories": categories}
        scores: Float32 = self._rank.run(["scores"], histories.tensors() | asked)[0]
        return scores


class ArtefactScorer(GraphScorer):
    """A released version."""

    def __init__(self, artefact: Artefact) -> None:
        files = artefact.manifest.graphs
        super().__init__(
            {graph: artefact.read(file) for graph, file in files.items() if graph in ("encode", "rank")},
            artefact.item_table(),
        )


def to_history(histories: HistoryArrays) -> History:
    import torch

    return History(
        **{name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in histories.tensors().items()}
    )
