"""The quantizers once more: plain Python loops in float64, written from the formulas.

Nothing here calls the library. A row is a list of Python floats; a tensor is quantized per row or
as one row of all its values. ``margin`` says how far a value is from where its code would change,
so that a float32 computation is held to the float64 one except within rounding of a threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import settings
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor

FEW = settings(max_examples=12)
"""For tests that run once per quantizer, granularity and clip."""

SUBNORMAL = 2.0**-149
"""Distance of neighbouring subnormal float32 numbers: what a rounding there may cost."""


@dataclass
class Row:
    codes: list[int]
    margin: list[float]
    mean: float


def _clamped(row: list[float], clip: float | None) -> list[float]:
    return row if clip is None else [min(max(w, -clip), clip) for w in row]


def _mean_magnitude(row: list[float]) -> float:
    return math.fsum(abs(w) for w in row) / len(row)


def ternary(row: list[float], clip: float | None) -> Row:
    row = _clamped(row, clip)
    mean = _mean_magnitude(row)
    threshold = 0.7 * mean
    codes, margin = [], []
    for w in row:
        if w > threshold:
            codes.append(1)
        elif w < -threshold:
            codes.append(-1)
        else:
            codes.append(0)
        margin.append(abs(abs(w) - threshold))
    return Row(codes, margin, mean)


def binary(row: list[float], clip: float | None) -> Row:
    row = _clamped(row, clip)
    codes = [-1 if w < 0 else 1 for w in row]
    return Row(codes, [math.inf] * len(row), _mean_magnitude(row))


def four_level(row: list[float], clip: float | None) -> Row:
    row = _clamped(row, clip)
    mean = _mean_magnitude(row)
    threshold = 1.248 * mean
    codes, margin = [], []
    for w in row:
        outer = abs(w) > threshold
        codes.append((3 if outer else 1) * (-1 if w < 0 else 1))
        margin.append(abs(abs(w) - threshold))
    return Row(codes, margin, mean)


def least_squares_scale(row: list[float], codes: list[int], clip: float | None) -> float:
    """The s that minimises the sum of (w - s c)^2."""
    row = _clamped(row, clip)
    square = sum(c * c for c in codes)
    if square == 0:
        return 0.0
    return math.fsum(w * c for w, c in zip(row, codes, strict=True)) / square


def rows_of(x: Tensor, granularity: str) -> list[list[float]]:
    """The groups of values that share a scale, as float64."""
    if granularity == "tensor":
        return [x.double().reshape(-1).tolist()] if x.numel() else []
    return x.double().reshape(-1, x.shape[-1]).tolist() if x.numel() else []


def check_weights(
    quantized: tuple[Tensor, Tensor],
    x: Tensor,
    granularity: str,
    clip: float | None,
    loop: Callable[[list[float], float | None], Row],
) -> None:
    """Holds codes to the loop, and the scale to the least-squares one of these codes."""
    codes, scale = quantized
    assert codes.shape == x.shape
    assert codes.dtype == scale.dtype == torch.float32
    expected_scale = [1] * x.dim() if granularity == "tensor" else [*x.shape[:-1], 1]
    assert list(scale.shape) == expected_scale
    rows = rows_of(x, granularity)
    got = codes.reshape(len(rows), -1).tolist() if rows else []
    for row, codes_of_row, s in zip(rows, got, scale.reshape(-1).tolist(), strict=bool(rows)):
        want = loop(row, clip)
        for c, w, distance in zip(codes_of_row, want.codes, want.margin, strict=True):
            assert c == w or distance <= 1e-5 * want.mean + 4 * SUBNORMAL
        best = least_squares_scale(row, [int(c) for c in codes_of_row], clip)
        assert s >= 0
        assert math.isclose(s, best, rel_tol=1e-5, abs_tol=4 * SUBNORMAL)


def tensors(
    limit: float = 1e30,
    *,
    min_dims: int = 1,
    max_dims: int = 4,
    min_side: int = 0,
    max_side: int = 6,
    min_value: float | None = None,
    subnormal: bool = True,
) -> st.SearchStrategy[Tensor]:
    """Float32 tensors of any shape: empty, zero, constant, subnormal, huge."""
    least = -limit if min_value is None else min_value
    # The limits of a strategy of 32-bit floats must themselves be 32-bit floats.
    least, limit = float(np.float32(least)), float(np.float32(limit))
    value = st.floats(least, limit, width=32, allow_subnormal=subnormal)
    special = st.sampled_from([0.0, *(() if least == 0 else (-0.0, -1.0)), 1.0, 0.5])
    shapes = array_shapes(
        min_dims=min_dims, max_dims=max_dims, min_side=min_side, max_side=max_side
    )
    filled = arrays(np.float32, shapes, elements=value | special, fill=special)
    return filled.map(lambda array: torch.from_numpy(np.array(array)))


def moderate(**shape: int) -> st.SearchStrategy[Tensor]:
    """Tensors whose values and products stay far from both ends of float32."""
    size = st.floats(float(np.float32(1e-6)), float(np.float32(1e6)), width=32)
    value = st.one_of(st.just(0.0), size, size.map(lambda v: -v))
    sides = {"min_dims": 1, "max_dims": 3, "min_side": 1, "max_side": 6} | shape
    return arrays(np.float32, array_shapes(**sides), elements=value).map(
        lambda array: torch.from_numpy(np.array(array))
    )
