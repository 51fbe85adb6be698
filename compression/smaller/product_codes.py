"""Item tables as product codes: an item is a few code numbers, each of which picks a piece of its vector.

A row of d values in `splits` pieces takes as many bytes; the pieces themselves, `splits` tables of at most
256 rows, are shared by all items and trained like any embedding. Codes come from what items are to users
before anything is trained (RecJPQ, Petrov and Macdonald, WSDM 2024), or from a table that is there.
"""

from __future__ import annotations

from typing import Final, cast

import faiss
import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds
from torch import Tensor, nn

MOST: Final = 256  # pieces per split, so that a code is a byte

Int64 = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint8]


class ProductTable(nn.Module):
    """Stands in for `nn.Embedding`: rows [...] to vectors [..., d]. Row 0 is padding and stays zero."""

    codes: Tensor

    def __init__(self, codes: Codes, width: int, pieces: int = MOST) -> None:
        """`codes` [rows, splits] below `pieces`; each piece has `width` values."""
        super().__init__()
        if int(codes.max(initial=0)) >= pieces or pieces > MOST:
            raise ValueError(
                f"codes up to {codes.max(initial=0)} do not fit {pieces} pieces of at most {MOST}"
            )
        splits = codes.shape[1]
        self.register_buffer("codes", torch.from_numpy(codes.copy()))
        self.pieces = nn.Parameter(torch.randn(splits, pieces, width) * (splits * width) ** -0.5)

    @property
    def weight(self) -> Tensor:
        """[rows, d]: the table that the codes stand for."""
        return cast(Tensor, self(torch.arange(len(self.codes), device=self.codes.device)))

    @property
    def stored_bytes(self) -> int:
        """A byte per code, four per value of a piece."""
        return self.codes.numel() + 4 * self.pieces.numel()

    def forward(self, rows: Tensor) -> Tensor:
        codes = self.codes[rows].long()
        splits = torch.arange(codes.shape[-1], device=codes.device)
        return self.pieces[splits, codes].flatten(-2) * (rows > 0)[..., None]


def item_factors(
    users: Int64, rows: Int64, table_rows: int, splits: int, *, seed: int
) -> npt.NDArray[np.float64]:
    """[table_rows, splits]: items in the directions in which users differ most (truncated SVD of who had
    what). A little noise parts items that nobody had."""
    had = csr_array((np.ones(len(rows)), (users, rows)), shape=(int(users.max()) + 1, table_rows))
    had.data[:] = 1.0
    rng = np.random.default_rng(seed)
    _, sizes, directions = svds(had, k=splits, v0=rng.random(min(had.shape)))
    factors = directions.T * sizes
    return np.asarray(factors + 1e-9 * rng.standard_normal(factors.shape), np.float64)


def quantile_codes(factors: npt.NDArray[np.float64], pieces: int = MOST) -> Codes:
    """By split, the place of each item among all, in `pieces` parts of equal size."""
    places = np.argsort(np.argsort(factors, axis=0, kind="stable"), axis=0, kind="stable")
    return (places * pieces // len(factors)).astype(np.uint8)


def from_table(table: Tensor, splits: int) -> ProductTable:
    """Codes and pieces nearest to a table that is there (k-means of each split)."""
    rows, dim = table.shape
    if dim % splits:
        raise ValueError(f"{splits} splits do not divide {dim} dimensions")
    values = np.ascontiguousarray(table.detach().float().numpy())
    bits = min(8, int(np.log2(max(2, rows // 40))))
    quantizer = faiss.ProductQuantizer(dim, splits, bits)
    quantizer.train(values)
    pieces = faiss.vector_to_array(quantizer.centroids).reshape(splits, 2**bits, dim // splits)
    # faiss packs codes below 8 bits; here each has a byte.
    parts = values.reshape(rows, splits, -1)
    codes = np.stack([_nearest(parts[:, split], pieces[split]) for split in range(splits)], 1)
    made = ProductTable(codes, dim // splits, 2**bits)
    with torch.no_grad():
        made.pieces.copy_(torch.from_numpy(pieces))
    return made


def _nearest(values: npt.NDArray[np.float32], pieces: npt.NDArray[np.float32]) -> Codes:
    distances = (pieces**2).sum(1) - 2 * values @ pieces.T
    return np.asarray(distances.argmin(1), np.uint8)
