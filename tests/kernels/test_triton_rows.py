"""The Triton passes of a training step against plain torch, in the interpreter and on a device."""

from __future__ import annotations

import importlib.util
import math
import os

import pytest
import torch
from torch import Tensor

from helpers import same_bits
from tutelage.quantizers import (
    BaseQuantizer,
    BinaryQuantizer,
    FourLevelQuantizer,
    Quantized,
    TernaryQuantizer,
    UniformQuantizer,
    UnsignedQuantizer,
)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SHAPES = [(0, 5), (1, 1), (7, 16), (5, 33), (2, 3, 40), (2, 3, 5, 32), (3, 2500)]
UNIFORM = [UniformQuantizer(8), UniformQuantizer(4), UnsignedQuantizer(8), UnsignedQuantizer(4)]
WEIGHTS: list[BaseQuantizer] = [TernaryQuantizer(), BinaryQuantizer(), FourLevelQuantizer()]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if (request.param == "interpreter") != INTERPRETED:
        pytest.skip("TRITON_INTERPRET is read once, when triton is imported")
    return "cpu" if request.param == "interpreter" else "cuda"


def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=made) * (torch.rand(shape, generator=made) > 0.2)
    if x.numel() and len(x) > 2:
        x[0], x[1] = 0.0, x[1] * 1e-40
    return x


def uniform(
    quantizer: BaseQuantizer, x: Tensor, device: str, dtype: torch.dtype, factor: Tensor | None
) -> Quantized:
    from tutelage.kernels._triton import _row_launch

    codes = torch.empty(x.shape, dtype=dtype, device=device)
    scale = torch.empty((*x.shape[:-1], 1), device=device)
    signed = quantizer.grid.lo < 0
    # Copied as it lies, so that views stay views.
    given = torch.empty_strided(x.shape, x.stride(), device=device).copy_(x)
    weight = None if factor is None else factor.to(device).expand(x.shape)
    _row_launch.quantize_uniform(given, weight, quantizer.grid.hi, signed, codes, scale)
    return Quantized(codes.float().cpu(), scale.cpu())


def weight(quantizer: BaseQuantizer, x: Tensor, device: str, dtype: torch.dtype) -> Quantized:
    from tutelage.kernels._triton import _row_launch

    codes = torch.empty(x.shape, dtype=dtype, device=device)
    scale = torch.empty((*x.shape[:-1], 1), device=device)
    kind = [TernaryQuantizer, BinaryQuantizer, FourLevelQuantizer].index(type(quantizer))
    threshold = getattr(quantizer, "threshold", 1.0)
    _row_launch.quantize_weight(x.to(device), kind, threshold, codes, scale)
    return Quantized(codes.float().cpu(), scale.cpu())


def equal(found: Quantized, expected: Quantized) -> bool:
    return torch.equal(found.codes, expected.codes) and same_bits(found.scale, expected.scale)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_uniform(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = values(shape)
    for quantizer in UNIFORM:
        if dtype == torch.int8 and quantizer.grid.hi > 127:
            continue
        assert equal(uniform(quantizer, x, device, dtype, None), quantizer.quantize(x))


def test_uniform_of_views_and_factors(device: str) -> None:
    x = values((2, 5, 4, 16))
    for quantizer in UNIFORM:
        for view in (x, x.transpose(1, 2), x[:, ::2], x[:, 1:, :, 3:]):
            found = uniform(quantizer, view, device, torch.float32, None)
            assert equal(found, quantizer.quantize(view))
        row = torch.rand(2, 1, 1, 16)
        found = uniform(quantizer, x, device, torch.float32, row)
        assert equal(found, quantizer.quantize(x * row))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_weights(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = values(shape)
    for quantizer in WEIGHTS:
        assert equal(weight(quantizer, x, device, dtype), quantizer.quantize(x))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_what_is_not_finite_stays_so(device: str, bad: float) -> None:
    x = values((3, 20)).abs()
    x[1, 7] = bad
    for quantizer in UNIFORM:
        codes, scale = uniform(quantizer, x, device, torch.float32, None)
        assert not (codes * scale)[1].isfinite().any()
        assert scale[[0, 2]].isfinite().all()
    for quantizer in WEIGHTS:
        scale = weight(quantizer, x, device, torch.int8).scale
        assert not scale[1].isfinite()
        assert scale[[0, 2]].isfinite().all()


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (17, 130), (40, 33)])
@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("per_column", [False, True])
def test_scaled_sums(device: str, rows: int, columns: int, per_row: bool, per_column: bool) -> None:
    from tutelage.kernels._triton import _row_launch

    sums = torch.randint(-9999, 9999, (rows, columns), dtype=torch.int32)
    row_scale = torch.rand(rows if per_row else 1, 1)
    column_scale = torch.rand(columns if per_column else 1)
    for bias in (None, torch.randn(columns)):
        expected = (sums.float() * row_scale) * column_scale
        expected = expected if bias is None else expected + bias
        y = torch.empty(rows, columns, device=device)
        y.view(torch.int32).copy_(sums)
        given = None if bias is None else bias.to(device)
        _row_launch.scale_sums(
            y.view(torch.int32), row_scale.to(device), column_scale.to(device), given
        )
        assert same_bits(y.cpu(), expected)


def test_squared_errors(device: str) -> None:
    from tutelage.kernels._triton import _row_launch

    own, other, gain = torch.randn(2, 3, 5, 18), torch.randn(2, 3, 5, 18), torch.tensor(0.3)
    for shape in (None, (2, 1, 5, 1), (2, 1, 5, 18), (1, 1, 1, 18), (1, 1, 1, 1)):
        mask = None if shape is None else torch.rand(shape)
        factor = torch.ones(()) if mask is None else mask
        given = None if mask is None else mask.to(device).expand(own.shape)
        out, gradient = torch.empty((), device=device), torch.empty(own.shape, device=device)
        operands = (own.to(device), other.to(device), given)
        _row_launch.squared_error(*operands, out)
        exact = ((own.double() - other.double()) * factor.double()).square().sum()
        torch.testing.assert_close(out.cpu().double(), exact, rtol=3e-7, atol=0)
        _row_launch.squared_error_backward(*operands, gain.to(device), gradient)
        assert same_bits(gradient.cpu(), ((own - other) * factor) * gain)
