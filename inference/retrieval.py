"""The items nearest to a user vector: exact for a small catalogue, inverted lists beyond.

The index is built from the artefact's item table, seeded, so that every process answers alike.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import faiss
import numpy as np
import numpy.typing as npt

_SEED: Final = 7
_TRAIN_PER_LIST: Final = 64

Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class RetrievalIndex:
    """Items by the inner product of their vector with the user's."""

    def __init__(self, item_ids: Int64, index: Any, probes: int) -> None:
        self._item_ids = item_ids
        self._index = index
        self.exact = not hasattr(index, "nprobe")
        if not self.exact:
            index.nprobe = min(probes, index.nlist)

    @classmethod
    def build(
        cls, item_ids: Int64, vectors: Float32, *, exact_until: int = 20_000, probes: int = 16
    ) -> RetrievalIndex:
        """Up to `exact_until` items every one is compared; beyond, those of the `probes` nearest lists."""
        vectors = np.ascontiguousarray(vectors)
        dim = vectors.shape[1]
        faiss.omp_set_num_threads(1)
        if len(item_ids) <= exact_until:
            index: Any = faiss.IndexFlatIP(dim)
        else:
            lists = int(2 ** np.round(np.log2(np.sqrt(len(item_ids)))))
            quantizer = faiss.IndexFlatIP(dim)
            # Half precision: finds the same items in three quarters of the time, memory being the limit.
            half = faiss.ScalarQuantizer.QT_fp16
            index = faiss.IndexIVFScalarQuantizer(
                quantizer, dim, lists, half, faiss.METRIC_INNER_PRODUCT, False
            )
            index.cp.seed = _SEED
            index.cp.max_points_per_centroid = _TRAIN_PER_LIST
            index.train(vectors)
        index.add(vectors)
        return cls(item_ids, index, probes)

    def save(self, path: Path) -> None:
        faiss.write_index(self._index, str(path))

    @classmethod
    def load(cls, path: Path, item_ids: Int64, *, probes: int = 16) -> RetrievalIndex:
        """What `save` wrote, for the same items. The file is read as it is: know that it is yours."""
        try:
            index = faiss.read_index(str(path))
        except RuntimeError as error:
            raise ValueError(f"{path.name} is no index: {error}") from error
        if index.ntotal != len(item_ids):
            raise ValueError(f"{path.name} holds {index.ntotal} items, not {len(item_ids)}")
        return cls(item_ids, index, probes)

    def __len__(self) -> int:
        return len(self._item_ids)

    def search(self, user_vectors: Float32, k: int) -> tuple[Int64, Float32]:
        """Item ids and scores [users, at most k], best first; id -1 where fewer were found."""
        k = min(k, len(self))
        if not k or not len(user_vectors):
            shape = (len(user_vectors), k)
            return np.empty(shape, np.int64), np.empty(shape, np.float32)
        # The setting belongs to a thread, and the caller is a thread of an executor.
        faiss.omp_set_num_threads(1)
        scores, places = self._index.search(np.ascontiguousarray(user_vectors), k)
        return np.where(places < 0, -1, self._item_ids[places]), scores
