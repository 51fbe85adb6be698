"""Item tables as product codes: an item is a few code numbers, each of which picks a piece of its vector.

A row of d values in `splits` pieces takes as many bytes; the pieces themselves, `splits` tables of at most
256 rows, are shared by all items and trained on like any embedding (as in RecJPQ, Petrov and Macdonald,
WSDM 2024). Codes come from a table that is there.
"""

from __future__ import annotations

from typing import Final, cast

import faiss
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

MOST: Final = 256  # pieces per split, so that a code is a byte

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

    def forward(self, rows: Tensor) -> Tensor:
        codes = self.codes[rows].long()
        splits = torch.arange(codes.shape[-1], device=codes.device)
        return self.pieces[splits, codes].flatten(-2) * (rows > 0)[..., None]


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
