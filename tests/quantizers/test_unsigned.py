"""Unsigned quantization of softmax outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from quantizer_loops import FEW, tensors
from torch import Tensor

from tutelage.quantizers import Granularity, UnsignedQuantizer

TINY = np.float32(2.0**-126)
BITS = pytest.mark.parametrize("bits", [8, 4, 1], ids=["8-bit", "4-bit", "1-bit"])
GRANULARITIES = pytest.mark.parametrize("granularity", ["row", "tensor"])


@GRANULARITIES
@BITS
@FEW
@given(x=tensors(min_value=0.0))
def test_codes_and_scale_bit_for_bit(bits: int, granularity: Granularity, x: Tensor) -> None:
    codes, scale = UnsignedQuantizer(bits, granularity).quantize(x)
    assert codes.shape == x.shape
    expected_scale = [1] * x.dim() if granularity == "tensor" else [*x.shape[:-1], 1]
    assert list(scale.shape) == expected_scale
    if not x.numel():
        return
    levels = 2**bits - 1
    width = x.numel() if granularity == "tensor" else x.shape[-1]
    rows = x.numpy().reshape(-1, width)
    got = codes.numpy().reshape(-1, width)
    for row, row_codes, s in zip(rows, got, scale.reshape(-1).tolist(), strict=True):
        step = np.float32(max(row)) / np.float32(levels)
        if step < TINY:
            step = np.float32(1.0)
        assert s == float(step)
        for v, c in zip(row, row_codes, strict=True):
            assert float(c) == float(np.rint(v / step))
            assert abs(float(c) - float(v) / float(step)) <= 0.5 + 1e-4
            assert 0 <= float(c) <= levels


@BITS
@given(x=tensors(3.4e38))
def test_any_input_stays_on_the_grid(bits: int, x: Tensor) -> None:
    quantized = UnsignedQuantizer(bits).quantize(x)
    assert quantized.dequantize().isfinite().all()
    assert ((quantized.codes >= 0) & (quantized.codes <= 2**bits - 1)).all()
    assert torch.equal(quantized.codes, quantized.codes.round())


@GRANULARITIES
def test_negative_values_become_zero(granularity: Granularity) -> None:
    x = torch.tensor([[-1.0, 0.5, 1.0], [-3.0, -0.5, -0.1]])
    codes = UnsignedQuantizer(8, granularity).quantize(x).codes
    assert codes[0, 0] == 0
    assert codes[1].tolist() == [0, 0, 0]
    assert codes[0, 2] == 255


@BITS
@pytest.mark.parametrize("keys", [1, 3, 1000])
def test_a_uniform_row_over_many_keys_survives(bits: int, keys: int) -> None:
    row = torch.full((2, keys), 1.0 / keys)
    codes, scale = UnsignedQuantizer(bits).quantize(row)
    assert (codes == 2**bits - 1).all()
    assert torch.allclose(codes * scale, row)


def test_a_masked_key_stays_exactly_zero() -> None:
    row = torch.tensor([[2.0, 1.0, torch.finfo(torch.float32).min]]).softmax(-1)
    assert UnsignedQuantizer(4)(row)[0, 2].item() == 0.0


def test_half_to_even() -> None:
    x = torch.tensor([[255.0, 0.5, 1.5, 2.5]])
    assert UnsignedQuantizer(8).quantize(x).codes.tolist() == [[255, 0, 2, 2]]


@given(x=tensors(min_value=0.0, min_dims=2, max_dims=3, min_side=1))
def test_a_row_does_not_see_the_others(x: Tensor) -> None:
    changed = torch.rand_like(x)
    changed[..., 0, :] = x[..., 0, :]
    one, other = UnsignedQuantizer(8).quantize(x), UnsignedQuantizer(8).quantize(changed)
    assert torch.equal(one.codes[..., 0, :], other.codes[..., 0, :])
    assert torch.equal(one.scale[..., 0, :], other.scale[..., 0, :])


@pytest.mark.parametrize("bits", [0, 9])
def test_refuses_word_lengths_out_of_range(bits: int) -> None:
    with pytest.raises(ValueError, match="takes 1 to 8"):
        UnsignedQuantizer(bits)


def test_shows_its_settings() -> None:
    assert repr(UnsignedQuantizer(4)) == (
        "UnsignedQuantizer(4 bits, 'row', estimator=StraightThrough())"
    )


@BITS
def test_grid_starts_at_zero(bits: int) -> None:
    grid = UnsignedQuantizer(bits).grid
    assert (grid.lo, grid.hi, grid.levels, grid.bits) == (0, 2**bits - 1, 2**bits, bits)
