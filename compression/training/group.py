"""The processes that train one network together: each takes its share of every batch.

All draw the same windows, candidates and negatives from the same seed, so neither they nor the rows of the
item table that a step touches need to be told: only sums of gradients travel, in one message a step. The
first process leads: it keeps the checkpoint, and its clock decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch import distributed as dist

MAX_TOLD_BYTES: Final = 2**24


class GroupBroken(RuntimeError):
    """The processes no longer do the same; the sentence says what differs."""


class Group:
    """One process's place among `size`. Nothing is sent where it is alone."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, torch.device(device)
        self.sent_bytes = 0  # of sums over all processes, as one process hands them over

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @property
    def share(self) -> slice:
        """Of the rows of a batch. Windows of like length lie side by side, so every share is as long."""
        return slice(self.rank, None, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """Of every process's tensor, in place; the same bits everywhere."""
        if self.size > 1:
            dist.all_reduce(tensor)
            self.sent_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def whole(self, part: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.float64]:
        """Of `count` values of which each process has made its `share`."""
        if self.size == 1:
            return part
        values = np.zeros(count)
        values[self.share] = part
        return self.sum(torch.from_numpy(values)).numpy()

    def agreed(self, said: bool) -> bool:
        """What the first process says."""
        if self.size == 1:
            return said
        word = torch.tensor([said], dtype=torch.uint8)
        dist.broadcast(word, 0)
        return bool(word)

    def handed(
        self, told: dict[str, Any], tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The first process's plain values (through JSON) and tensors; what the others give is ignored."""
        if self.size == 1:
            return told, dict(tensors)
        kinds = {
            name: [str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in tensors.items()
        }
        header = json.dumps({"told": told, "tensors": kinds}).encode() if self.leads else b""
        length = torch.tensor([len(header)])
        dist.broadcast(length, 0)
        if int(length) > MAX_TOLD_BYTES:
            raise GroupBroken(f"{int(length)} bytes are more than one process tells another")
        text = torch.frombuffer(bytearray(header), dtype=torch.uint8) if header else None
        text = torch.empty(int(length), dtype=torch.uint8) if text is None else text
        dist.broadcast(text, 0)
        heard = json.loads(text.numpy().tobytes())
        found: dict[str, Tensor] = {}
        for name, (dtype, shape) in heard["tensors"].items():
            ours = (
                tensors[name].contiguous() if self.leads else torch.empty(shape, dtype=getattr(torch, dtype))
            )
            if ours.numel():
                dist.broadcast(ours, 0)
            found[name] = ours
        return heard["told"], found

    def same_weights(self, model: torch.nn.Module) -> None:
        """The first process's, in all of them."""
        if self.size > 1:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)

    def check(self, model: torch.nn.Module) -> None:
        """`GroupBroken` where the weights of two processes differ in a bit."""
        if self.size == 1:
            return
        ours = torch.stack([p.detach().cpu().view(torch.int32).sum() for p in model.parameters()])
        least, most = ours.clone(), ours.clone()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        if not torch.equal(least, most):
            raise GroupBroken("the processes' weights have come apart: do all run the same build of torch?")


ALONE: Final = Group()
