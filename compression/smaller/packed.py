"""Weights as small as they really are: zeros as a bit mask, codes of 2 to 8 bits, frequent ones in fewer.

One safetensors file. A tensor is stored as

    dense       its values, f32, f16 or, of what are bytes, u8
    sparse      NAME.mask, a bit per value, and NAME.values, those that are not zero
    quantized   NAME.codes, codes of the values (of those that are not zero, where there is a mask) counted
                from the lowest of the tensor or row; NAME.low and NAME.step

Codes lie side by side, `bits` each, or, where that is smaller, in a Huffman code as in Han et al., Deep
Compression (2016): a raw deflate stream of nothing but literals, which are the codes modulo 256, uncounted,
so that those near zero are frequent in all rows.

The file's metadata say which, with shapes and a checksum over all parts. What is read back is, bit
for bit, what was to be stored: for quantized tensors code * step in float32.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
import safetensors
import safetensors.numpy
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from compression.errors import ArtefactInvalid
from compression.files import read_plain, write_whole
from compression.smaller.quantization import Grid, Quantized, quantize

MAX_BYTES: Final = 4 * 2**30
MAX_VALUES: Final = 2**31
MAX_TENSORS: Final = 4096
_WORTH_A_MASK: Final = 0.05  # of zeros, below which the mask would take more than it saves

Parts = dict[str, npt.NDArray[Any]]
Size = Annotated[int, Field(ge=1, le=MAX_VALUES)]


class _Entry(BaseModel):
    """How one tensor is stored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: Annotated[list[Size], Field(max_length=8)]
    kind: Literal["dense", "quantized"]
    masked: bool = False
    bits: Annotated[int, Field(ge=2, le=8)] | None = None
    huffman: bool = False


class _Contents(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tensors: Annotated[dict[str, _Entry], Field(max_length=MAX_TENSORS)]


@dataclass(frozen=True, slots=True)
class Half:
    """Store in 16 instead of 32 bits."""


def write(path: Path, tensors: Mapping[str, Tensor], how: Mapping[str, Grid | Half] | None = None) -> int:
    """Store tensors, those named in `how` on a grid or in half precision, the rest as they are; whatever
    has zeros enough gets a mask. The bytes of the file."""
    how = how or {}
    parts: Parts = {}
    entries: dict[str, _Entry] = {}
    for name, tensor in sorted(tensors.items()):
        chosen = how.get(name)
        if isinstance(chosen, Grid):
            entries[name] = _put_quantized(parts, name, quantize(tensor, chosen), chosen.bits)
        else:
            entries[name] = _put_dense(parts, name, tensor, half=chosen is not None)
    contents = _Contents(sha256=_digest(parts), tensors=entries)
    data = safetensors.numpy.save(parts, {"tailrace": contents.model_dump_json(exclude_defaults=True)})
    write_whole(path, data)
    return len(data)


def read(path: Path) -> dict[str, Tensor]:
    """The tensors, dense and in float32, or `ArtefactInvalid` with the reason."""
    name = path.name
    data = read_plain(path, MAX_BYTES, name)
    if len(data) > MAX_BYTES:
        raise ArtefactInvalid(f"{name}: more than {MAX_BYTES} bytes")
    try:
        parts = safetensors.numpy.load(data)
        contents = _Contents.model_validate_json(_metadata(data))
    except (safetensors.SafetensorError, ValidationError, KeyError, ValueError) as error:
        raise ArtefactInvalid(f"{name} is no file of packed tensors: {error}") from None
    if _digest(parts) != contents.sha256:
        raise ArtefactInvalid(f"{name}: what it holds is not what was stored")
    try:
        return {key: _get(parts, key, entry) for key, entry in contents.tensors.items()}
    except (KeyError, ValueError) as error:
        raise ArtefactInvalid(f"{name}: {error}") from None


def _put_dense(parts: Parts, name: str, tensor: Tensor, *, half: bool) -> _Entry:
    values = tensor.detach().cpu().numpy()
    if tensor.dtype != torch.uint8:
        values = values.astype(np.float16 if half else np.float32)
    masked = bool((values == 0).mean() > _WORTH_A_MASK) if values.size else False
    if masked:
        parts[f"{name}.mask"] = np.packbits(values != 0)
        values = values[values != 0]
    else:
        values = values.reshape(-1)
    parts[f"{name}.values"] = values
    return _Entry(shape=list(tensor.shape), kind="dense", masked=masked)


def _put_quantized(parts: Parts, name: str, made: Quantized, bits: int) -> _Entry:
    codes = made.codes.numpy()
    low, high = (
        np.broadcast_to(made.low.numpy(), codes.shape),
        np.broadcast_to(made.high.numpy(), codes.shape),
    )
    # Without a mask zeros need a code of their own, which the range of what is not zero may lack.
    outside = bool(((codes == 0) & ((low > 0) | (high < 0))).any())
    masked = outside or bool((codes == 0).mean() > 1.0 / bits)
    counted = (codes - low).astype(np.uint8)
    if masked:
        there = codes != 0
        parts[f"{name}.mask"] = np.packbits(there)
        codes, counted = codes[there], counted[there]
    packed, coded = pack(counted.reshape(-1), bits), _huffman(codes.astype(np.uint8))
    huffman = len(coded) < len(packed)
    parts[f"{name}.codes"] = coded if huffman else packed
    parts[f"{name}.low"] = made.low.numpy().reshape(-1)
    parts[f"{name}.step"] = made.step.numpy().reshape(-1)
    shape = list(made.codes.shape)
    return _Entry(shape=shape, kind="quantized", masked=masked, bits=bits, huffman=huffman)


def _get(parts: Parts, name: str, entry: _Entry) -> Tensor:
    shape = tuple(entry.shape)
    total = int(np.prod([float(size) for size in shape])) if shape else 1
    if total > MAX_VALUES:
        raise ValueError(f"{name} would have {total} values")
    there = None
    if entry.masked:
        there = np.unpackbits(parts[f"{name}.mask"], count=total).astype(bool)
    count = total if there is None else int(there.sum())
    stored: npt.NDArray[Any]
    if entry.kind == "dense":
        stored = parts[f"{name}.values"].astype(np.float32)
    else:
        assert entry.bits is not None
        codes = parts[f"{name}.codes"]
        stored = _plain(codes, count) if entry.huffman else unpack(codes, entry.bits, count)
    if len(stored) != count:
        raise ValueError(f"{name} has {len(stored)} values, not {count}")
    if there is not None:
        whole = np.zeros(total, stored.dtype)
        whole[there] = stored
        stored = whole
    if entry.kind == "dense":
        return torch.from_numpy(stored.reshape(shape))
    low, step = parts[f"{name}.low"], parts[f"{name}.step"]
    per_row = (shape[0], *[1] * (len(shape) - 1)) if len(low) > 1 else ()
    low, step = low.reshape(per_row), step.reshape(per_row)
    counted = stored.reshape(shape)
    if entry.huffman:
        counted = counted - low.astype(np.uint8)
    steps = counted + low
    if there is not None:
        steps[~there.reshape(shape)] = 0
    return torch.from_numpy(np.asarray(steps.astype(np.float32) * step))


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes [n] below 2^bits as bytes, most significant bit first, without gaps."""
    packed = [
        np.packbits((part[:, None] >> np.arange(bits - 1, -1, -1, dtype=np.uint8)) & 1)
        for part in np.split(codes, range(_PART, len(codes), _PART))
    ]
    return np.concatenate(packed) if packed else np.empty(0, np.uint8)


def unpack(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """The first `count` codes of `bits` bits."""
    if len(packed) != -(-count * bits // 8):
        raise ValueError(f"{len(packed)} bytes hold no {count} codes of {bits} bits")
    codes = np.empty(count, np.uint8)
    weights = (1 << np.arange(bits - 1, -1, -1)).astype(np.uint8)
    for start in range(0, count, _PART):
        size = min(_PART, count - start)
        first = start * bits // 8
        part = np.unpackbits(packed[first : first + -(-size * bits // 8)], count=size * bits)
        codes[start : start + size] = part.reshape(size, bits) @ weights
    return codes


def _huffman(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Bytes as a deflate stream of Huffman-coded literals."""
    stream = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL, zlib.Z_HUFFMAN_ONLY)
    return np.frombuffer(stream.compress(codes.tobytes()) + stream.flush(), np.uint8)


def _plain(coded: npt.NDArray[np.uint8], count: int) -> npt.NDArray[np.uint8]:
    """The `count` bytes of such a stream; it is never unpacked beyond one more."""
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        codes = np.frombuffer(stream.decompress(coded.tobytes(), count + 1), np.uint8)
    except zlib.error as error:
        raise ValueError(f"codes that cannot be read: {error}") from None
    if len(codes) != count or not stream.eof or stream.unused_data:
        raise ValueError(f"a stream that is not of {count} codes")
    return codes


_PART: Final = 2**20  # codes at a time; a multiple of 8, so that parts end with bytes


def _digest(parts: Parts) -> str:
    digest = hashlib.sha256()
    for name in sorted(parts):
        part = parts[name]
        digest.update(f"{name} {part.dtype} {part.shape}\n".encode())
        digest.update(np.ascontiguousarray(part).data)
    return digest.hexdigest()


def _metadata(data: bytes) -> str:
    """safetensors shows metadata of files on disk only; the header is a length and JSON."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return str(header["__metadata__"]["tailrace"])
