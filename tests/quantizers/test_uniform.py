"""Uniform symmetric quantization of activations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from quantizer_loops import FEW, moderate, tensors
from torch import Tensor

from tutelage.quantizers import ClippedSTE, Granularity, Quantizer, UniformQuantizer

TINY = 2.0**-126
BITS = pytest.mark.parametrize("bits", [8, 4, 2], ids=["8-bit", "4-bit", "2-bit"])
GRANULARITIES = pytest.mark.parametrize("granularity", ["row", "tensor"])
CLIPS = pytest.mark.parametrize("clip", [None, 2.5], ids=["no-clip", "clip-2.5"])


def groups(x: Tensor, granularity: str) -> list[np.ndarray]:
    array = x.numpy()
    if array.size == 0:
        return []
    return list(array.reshape(1, -1) if granularity == "tensor" else array.reshape(-1, x.shape[-1]))


def divided(row: np.ndarray, levels: int) -> tuple[list[float], float]:
    """The formula in single IEEE operations of float32: a / L, x / s, half to even."""
    scale = np.float32(max(abs(v) for v in row)) / np.float32(levels)
    if scale < np.float32(TINY):
        scale = np.float32(1.0)
    return [float(np.rint(np.float32(v) / scale)) for v in row], float(scale)


def multiplied(row: np.ndarray, levels: int) -> tuple[list[float], float]:
    """The published order, L / a as torch computes a number by a tensor: (1 / a) * L."""
    largest = np.float32(max(abs(v) for v in row))
    if largest < np.float32(TINY) * np.float32(levels):
        largest = np.float32(levels)
    factor = np.float32(1) / largest * np.float32(levels)
    return [float(np.rint(np.float32(v) * factor)) for v in row], float(np.float32(1) / factor)


@CLIPS
@GRANULARITIES
@BITS
@pytest.mark.parametrize("reciprocal", [False, True], ids=["division", "reciprocal"])
@FEW
@given(x=tensors())
def test_codes_and_scale_bit_for_bit(
    reciprocal: bool, bits: int, granularity: Granularity, clip: float | None, x: Tensor
) -> None:
    quantizer = UniformQuantizer(bits, granularity, clip=clip, reciprocal=reciprocal)
    codes, scale = quantizer.quantize(x)
    levels = 2 ** (bits - 1) - 1
    assert codes.shape == x.shape
    expected_scale = [1] * x.dim() if granularity == "tensor" else [*x.shape[:-1], 1]
    assert list(scale.shape) == expected_scale
    rows = groups(x if clip is None else x.clamp(-clip, clip), granularity)
    loop = multiplied if reciprocal else divided
    for row, got, s in zip(
        rows, groups(codes, granularity), scale.reshape(-1).tolist(), strict=bool(rows)
    ):
        want, want_scale = loop(row, levels)
        assert got.tolist() == want
        assert s == want_scale


@CLIPS
@GRANULARITIES
@BITS
@FEW
@given(x=tensors())
def test_against_float64(
    bits: int, granularity: Granularity, clip: float | None, x: Tensor
) -> None:
    codes, scale = UniformQuantizer(bits, granularity, clip=clip).quantize(x)
    levels = 2 ** (bits - 1) - 1
    rows = groups(x, granularity)
    for row, got, s in zip(
        rows, groups(codes, granularity), scale.reshape(-1).tolist(), strict=bool(rows)
    ):
        values = [float(v) if clip is None else min(max(float(v), -clip), clip) for v in row]
        largest = max(abs(v) for v in values)
        if largest / levels < TINY * (1 - 1e-6):
            assert s == 1.0
            assert not got.any()
            continue
        assert s == 1.0 or math.isclose(s, largest / levels, rel_tol=1e-6)
        for v, c in zip(values, got.tolist(), strict=True):
            assert abs(c - v / s) <= 0.5 + 1e-4
            assert abs(c) <= levels


@pytest.mark.parametrize("reciprocal", [False, True], ids=["division", "reciprocal"])
class TestRounding:
    def test_half_to_even(self, reciprocal: bool) -> None:
        x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.4999998]])
        codes, scale = UniformQuantizer(8, reciprocal=reciprocal).quantize(x)
        assert scale.item() == 1.0
        assert codes.tolist() == [[127, 0, 2, 2, 0, -2, -2, 3]]

    @BITS
    def test_extremes_reach_the_ends(self, reciprocal: bool, bits: int) -> None:
        top = 2 ** (bits - 1) - 1
        x = torch.randn(50, 9)
        codes = UniformQuantizer(bits, reciprocal=reciprocal).quantize(x).codes
        assert torch.equal(codes.abs().amax(-1), torch.full((50,), float(top)))

    @given(x=tensors(3.4e38))
    def test_nothing_is_nan_and_no_code_leaves_the_grid(self, reciprocal: bool, x: Tensor) -> None:
        quantized = UniformQuantizer(8, reciprocal=reciprocal).quantize(x)
        assert quantized.dequantize().isfinite().all()
        assert (quantized.codes.abs() <= 127).all()
        assert torch.equal(quantized.codes, quantized.codes.round())
        assert (quantized.scale > 0).all()


def test_reciprocal_differs_from_division_somewhere() -> None:
    x = torch.randn(4096, 16) * 3
    one = UniformQuantizer(8).quantize(x)
    other = UniformQuantizer(8, reciprocal=True).quantize(x)
    assert (one.codes - other.codes).abs().amax() <= 1
    assert not torch.equal(one.dequantize(), other.dequantize())
    assert torch.allclose(one.scale, other.scale, rtol=1e-6)


class TestSmallRows:
    """A row whose scale would be subnormal becomes zeros: 1 / scale could overflow."""

    @BITS
    @pytest.mark.parametrize("reciprocal", [False, True], ids=["division", "reciprocal"])
    def test_around_the_smallest_normal_scale(self, bits: int, reciprocal: bool) -> None:
        top = 2 ** (bits - 1) - 1
        quantizer = UniformQuantizer(bits, reciprocal=reciprocal)
        above = torch.tensor([[TINY * top * 1.001, 0.0]])
        below = torch.tensor([[TINY * top * 0.999, -TINY * top * 0.999]])
        assert quantizer.quantize(above).codes.tolist() == [[top, 0]]
        codes, scale = quantizer.quantize(below)
        assert codes.abs().tolist() == [[0, 0]]
        assert scale.tolist() == [[1.0]]

    @pytest.mark.parametrize("value", [0.0, -0.0, 1e-45, 1e-40, TINY])
    def test_tiny_constants_become_zero(self, value: float) -> None:
        x = torch.full((2, 3), value)
        assert torch.equal(UniformQuantizer(8)(x), torch.zeros(2, 3))

    def test_zero_row_beside_others(self) -> None:
        x = torch.randn(3, 5)
        x[1] = 0.0
        codes, scale = UniformQuantizer(8).quantize(x)
        assert torch.equal(codes[1], torch.zeros(5))
        assert scale[1].item() == 1.0


class TestProperties:
    @given(x=moderate(), exponent=st.integers(-40, 40))
    def test_power_of_two_equivariance(self, x: Tensor, exponent: int) -> None:
        assume((x != 0).any(-1).all())
        one = UniformQuantizer(4).quantize(x)
        other = UniformQuantizer(4).quantize(x * 2.0**exponent)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale * 2.0**exponent, other.scale)

    @BITS
    @FEW
    @given(x=tensors())
    def test_sign_symmetry(self, bits: int, x: Tensor) -> None:
        one, other = UniformQuantizer(bits).quantize(x), UniformQuantizer(bits).quantize(-x)
        assert torch.equal(one.codes, -other.codes)
        assert torch.equal(one.scale, other.scale)

    @given(x=tensors(min_dims=2, max_dims=3, min_side=1))
    def test_a_token_does_not_see_the_others(self, x: Tensor) -> None:
        changed = torch.randn_like(x)
        changed[..., 0, :] = x[..., 0, :]
        one, other = UniformQuantizer(8).quantize(x), UniformQuantizer(8).quantize(changed)
        assert torch.equal(one.codes[..., 0, :], other.codes[..., 0, :])
        assert torch.equal(one.scale[..., 0, :], other.scale[..., 0, :])

    def test_one_tensor_scale_does_see_the_others(self) -> None:
        x = torch.randn(2, 5)
        louder = torch.stack([x[0], 10 * x[1]])
        quantizer = UniformQuantizer(8, "tensor")
        assert not torch.equal(quantizer(x)[0], quantizer(louder)[0])

    @BITS
    @FEW
    @given(x=moderate())
    def test_error_is_at_most_half_a_step(self, bits: int, x: Tensor) -> None:
        codes, scale = UniformQuantizer(bits).quantize(x)
        error = (codes.double() * scale.double() - x.double()).abs()
        assert (error <= scale.double() * 0.50001).all()

    @given(x=moderate())
    def test_quantizing_twice_changes_no_code(self, x: Tensor) -> None:
        quantizer = UniformQuantizer(8)
        first = quantizer.quantize(x)
        assert torch.equal(quantizer.quantize(first.dequantize()).codes, first.codes)

    def test_strided_views_give_the_same_bits(self) -> None:
        x = torch.randn(2, 7, 3, 5).transpose(1, 2)
        one, other = UniformQuantizer(8).quantize(x), UniformQuantizer(8).quantize(x.contiguous())
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale, other.scale)


class TestConstruction:
    @pytest.mark.parametrize("bits", [1, 0, 9, -8])
    def test_refuses_word_lengths_out_of_range(self, bits: int) -> None:
        with pytest.raises(ValueError, match="takes 2 to 8"):
            UniformQuantizer(bits)

    def test_shows_its_settings(self) -> None:
        shown = repr(UniformQuantizer(4, "tensor", clip=2.5))
        assert shown == "UniformQuantizer(4 bits, 'tensor', clip=2.5, estimator=ClippedSTE(2.5))"

    @BITS
    def test_grid_is_symmetric(self, bits: int) -> None:
        grid = UniformQuantizer(bits).grid
        assert (grid.lo, grid.hi, grid.step) == (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1, 1)

    def test_is_a_quantizer_without_state(self) -> None:
        quantizer = UniformQuantizer(8, clip=1.0)
        assert isinstance(quantizer, Quantizer)
        assert isinstance(quantizer.estimator, ClippedSTE)
        assert not quantizer.state_dict()

    @pytest.mark.parametrize("granularity", ["row", "tensor"])
    def test_a_single_number(self, granularity: Granularity) -> None:
        x = torch.tensor(-0.5)
        assert torch.allclose(UniformQuantizer(8, granularity)(x), x)
