"""What is stored is really smaller, comes back exactly, and is checked."""

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression.errors import ArtefactInvalid
from compression.smaller import packed
from compression.smaller.quantization import Grid, quantize


def pruned(rows, width, share, seed=0):
    torch.manual_seed(seed)
    weights = torch.randn(rows, width)
    weights[torch.rand(rows, width) < share] = 0.0
    return weights


@pytest.mark.parametrize(
    ("how", "share", "most"),
    [
        (None, 0.4, 0.64),  # 0.6 of the values and a bit for each of all
        (packed.Half(), 0.0, 0.51),
        # What is drawn from a normal distribution has codes near the middle most often.
        (Grid(8), 0.0, 0.222),
        (Grid(8), 0.4, 0.168),
        (Grid(6, per_row=True), 0.4, 0.151),
        (Grid(4, per_row=True), 0.0, 0.137),
    ],
)
def test_the_file_is_as_small_as_it_should_be_and_comes_back_exactly(tmp_path, how, share, most):
    weights = pruned(500, 128, share)
    size = packed.write(tmp_path / "one", {"w": weights}, {"w": how} if how else {})
    assert (tmp_path / "one").stat().st_size == size < most * weights.numel() * 4
    expected = weights.half().float() if isinstance(how, packed.Half) else weights
    if isinstance(how, Grid):
        expected = quantize(weights, how).values()
    assert torch.equal(packed.read(tmp_path / "one")["w"], expected)


@given(st.integers(2, 8), st.integers(0, 40), st.integers(0, 2**31 - 1))
def test_codes_of_any_width_come_back(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    packed_codes = packed.pack(codes, bits)
    assert len(packed_codes) == -(-count * bits // 8)
    assert packed.unpack(packed_codes, bits, count).tolist() == codes.tolist()


def test_more_codes_than_are_packed_at_a_time_come_back():
    codes = np.random.default_rng(1).integers(0, 32, 2**20 + 12_345).astype(np.uint8)
    assert np.array_equal(packed.unpack(packed.pack(codes, 5), 5, len(codes)), codes)


@pytest.mark.parametrize(
    "weights",
    [
        torch.tensor([1.0, 2.0, 0.0, 3.5]),  # zero lies outside the range
        torch.tensor([-3.0, -1.0, 0.0]),
        torch.zeros(3, 3),
        torch.tensor(2.5),
    ],
)
def test_awkward_tensors_come_back(tmp_path, weights):
    for bits in (2, 8):
        packed.write(tmp_path / "one", {"w": weights}, {"w": Grid(bits)})
        found = packed.read(tmp_path / "one")["w"]
        assert torch.equal(found, quantize(weights, Grid(bits)).values()) and found.shape == weights.shape


def test_a_changed_byte_is_seen(tmp_path):
    path = tmp_path / "one"
    packed.write(path, {"w": pruned(20, 20, 0.5)})
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtefactInvalid, match="not what was stored"):
        packed.read(path)


def test_a_file_that_was_cut_short_or_is_something_else_is_refused(tmp_path):
    path = tmp_path / "one"
    packed.write(path, {"w": pruned(20, 20, 0.5)})
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtefactInvalid, match="no file of packed tensors"):
        packed.read(path)
    safetensors.numpy.save_file({"w": np.zeros(3, np.float32)}, path)
    with pytest.raises(ArtefactInvalid, match="no file of packed tensors"):
        packed.read(path)


def test_codes_of_equal_frequency_lie_side_by_side_and_others_are_coded(tmp_path):
    even = torch.arange(-8.0, 8.0).repeat(1_000)
    seldom = even.where(torch.arange(16_000) % 100 == 0, torch.ones(1))
    sizes = [packed.write(tmp_path / "one", {"w": one}, {"w": Grid(4)}) for one in (even, seldom)]
    assert sizes[0] > 8_000 and sizes[1] < 3_000
    assert torch.equal(packed.read(tmp_path / "one")["w"], quantize(seldom, Grid(4)).values())


def test_a_stream_that_holds_more_than_it_should_is_refused(tmp_path):
    """The checksum is right: somebody who can compute it made this file."""
    path = tmp_path / "one"
    weights = torch.ones(1_000).where(torch.arange(1_000) % 100 == 0, torch.tensor(2.0))
    packed.write(path, {"w": weights}, {"w": Grid(4)})
    data = path.read_bytes()
    for claim in (b"[999]", b"[1]"):
        claimed = data.replace(b"[1000]", claim.ljust(6))
        assert claimed != data
        path.write_bytes(claimed)
        with pytest.raises(ArtefactInvalid, match="a stream that is not of"):
            packed.read(path)


def test_a_shape_that_the_parts_cannot_fill_is_refused(tmp_path):
    """The checksum is right: somebody who can compute it made this file."""
    path = tmp_path / "one"
    packed.write(path, {"w": torch.randn(4, 4)}, {"w": Grid(4)})
    data = path.read_bytes()
    claimed = data.replace(b"[4,4]", b"[9,4]")
    assert claimed != data
    path.write_bytes(claimed)
    with pytest.raises(ArtefactInvalid, match="codes"):
        packed.read(path)
