"""An item table to start from: what the log's counts say before anything is trained.

Positive pointwise mutual information of items that occur near each other, factored: Levy and Goldberg,
"Neural word embedding as implicit matrix factorization" (NIPS 2014), contexts smoothed to the power 0.75
as in Levy, Goldberg and Dagan (TACL 2015). With S = C + C^T of the transition counts C and r its row sums::

    M(b, a) = max(0, log(S(b, a) · sum of r^0.75 / (r_b · r_a^0.75)))
    M ≈ U · diag(s) · V^T, and row b starts as U(b) · sqrt(s), scaled
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from compression.evaluation.predictors import Statistics
from compression.evaluation.transitions import TransitionSettings, pair_counts
from compression.retrieval.network import RetrievalNetwork

STD: Final = 0.05
_NOISE: Final = 0.1
_SMOOTHED: Final = 0.75

Float32 = npt.NDArray[np.float32]


def start_table(
    network: RetrievalNetwork, statistics: Statistics, settings: TransitionSettings, seed: int
) -> None:
    """Overwrite the rows of known items with the counts' factors, whose standard deviation is `STD`, and
    a tenth of that as noise of the seed, so that items never counted differ too."""
    positions = statistics.trained
    users = statistics.sequences.user_of(positions)
    counts = pair_counts(statistics.rows[positions], users, statistics.known_items, settings)
    rng = np.random.default_rng(seed)
    table = factors(association(counts[1:, 1:]), network.config.dim, rng)
    table *= STD / max(float(table.std()), 1e-9)
    table += rng.normal(0.0, _NOISE * STD, table.shape)
    with torch.no_grad():
        network.items.weight[1 : len(table) + 1] = torch.from_numpy(table.astype(np.float32))


def association(counts: Any) -> Any:
    """M of the formula, sparse, from counts [V, V]."""
    from scipy import sparse

    both = (counts + counts.T).tocoo()
    often = np.asarray(both.sum(1), np.float64).ravel()
    smoothed = often**_SMOOTHED
    with np.errstate(divide="ignore"):
        mutual = np.log(both.data * smoothed.sum() / (often[both.row] * smoothed[both.col]))
    return sparse.csr_matrix((np.maximum(mutual, 0.0), (both.row, both.col)), shape=both.shape)


def factors(matrix: Any, dim: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """U · sqrt(s) [V, dim]; columns beyond what the matrix has are zero. Signs are set so that the largest
    number of a column is positive: the same matrix gives the same table."""
    from scipy.sparse.linalg import svds

    kept = min(dim, min(matrix.shape) - 1)
    table = np.zeros((matrix.shape[0], dim))
    if kept < 1 or matrix.nnz == 0:
        return table
    left, values, _ = svds(matrix, k=kept, v0=rng.normal(size=min(matrix.shape)))
    largest = np.abs(left).argmax(0)
    left *= np.where(left[largest, np.arange(kept)] < 0, -1.0, 1.0)
    table[:, :kept] = left * np.sqrt(np.maximum(values, 0.0))
    return table
