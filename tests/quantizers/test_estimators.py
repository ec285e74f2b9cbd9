"""Gradient estimators, and the quantizers' forward pass that calls them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from quantizer_loops import FEW, tensors
from torch import Tensor

from tutelage.quantizers import (
    BaseQuantizer,
    BinaryQuantizer,
    ClippedSTE,
    FourLevelQuantizer,
    GradientEstimator,
    Grid,
    Quantized,
    StraightThrough,
    TernaryQuantizer,
    UniformQuantizer,
    UnsignedQuantizer,
)

QUANTIZERS: dict[str, Any] = {
    "ternary": TernaryQuantizer,
    "binary": BinaryQuantizer,
    "four-level": FourLevelQuantizer,
    "uniform-8": lambda *a, **k: UniformQuantizer(8, *a, **k),
    "uniform-4": lambda *a, **k: UniformQuantizer(4, *a, **k),
    "uniform-reciprocal": lambda *a, **k: UniformQuantizer(8, *a, reciprocal=True, **k),
}
KINDS = pytest.mark.parametrize("make", list(QUANTIZERS.values()), ids=list(QUANTIZERS))


def gradient(quantizer: BaseQuantizer, x: Tensor, upstream: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    y = quantizer(x)
    assert torch.equal(y.detach(), quantizer.quantize(x.detach()).dequantize())
    y.backward(upstream)
    assert x.grad is not None
    return x.grad


@KINDS
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("clip", [2.5, 0.3])
@FEW
@given(x=tensors(5.0))
def test_clipped_gradient_is_the_upstream_one_strictly_inside(
    make: Any, granularity: str, clip: float, x: Tensor
) -> None:
    upstream = torch.randn(x.shape)
    got = gradient(make(granularity, clip=clip), x, upstream)
    for g, u, v in zip(
        got.reshape(-1).tolist(), upstream.reshape(-1).tolist(), x.reshape(-1).tolist(), strict=True
    ):
        assert g == (u if -clip < v < clip else 0.0)


@KINDS
@FEW
@given(x=tensors())
def test_gradient_without_clip_is_the_upstream_one(make: Any, x: Tensor) -> None:
    upstream = torch.randn(x.shape)
    assert torch.equal(gradient(make(), x, upstream), upstream)


@KINDS
def test_gradient_vanishes_at_the_clip_itself(make: Any) -> None:
    inside = float(np.nextafter(np.float32(2.5), np.float32(0)))
    x = torch.tensor([[2.5, -2.5, inside, -inside, 2.6, -100.0, 0.0]])
    got = gradient(make(clip=2.5), x, torch.ones_like(x))
    assert got.tolist() == [[0, 0, 1, 1, 0, 0, 1]]


def test_unsigned_gradient_is_the_upstream_one() -> None:
    x, upstream = torch.rand(3, 5), torch.randn(3, 5)
    assert torch.equal(gradient(UnsignedQuantizer(8), x, upstream), upstream)


class _Recorder:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, grad: Tensor, x: Tensor, quantized: Quantized, grid: Grid) -> Tensor:
        self.seen.append((grad, x, quantized, grid))
        return grad * 3


@KINDS
def test_an_estimator_of_ones_own_gets_latent_value_codes_scale_and_grid(make: Any) -> None:
    recorder = _Recorder()
    quantizer = make("row", clip=1.0, estimator=recorder)
    x, upstream = 2 * torch.randn(4, 5), torch.randn(4, 5)
    got = gradient(quantizer, x, upstream)
    assert isinstance(recorder, GradientEstimator)
    assert torch.equal(got, upstream * 3)
    ((grad, latent, quantized, grid),) = recorder.seen
    assert torch.equal(grad, upstream)
    assert torch.equal(latent, x)  # before the clamp
    want = quantizer.quantize(x)
    assert torch.equal(quantized.codes, want.codes)
    assert torch.equal(quantized.scale, want.scale)
    assert grid is quantizer.grid


@KINDS
def test_no_gradient_is_kept_where_none_is_wanted(make: Any) -> None:
    x = torch.randn(2, 3)
    assert not make()(x).requires_grad
    quantized = make().quantize(x.requires_grad_())
    assert not quantized.codes.requires_grad
    assert not quantized.scale.requires_grad


def test_straight_through_returns_the_gradient_itself() -> None:
    grad = torch.randn(3)
    quantized = Quantized(torch.ones(3), torch.ones(1))
    assert StraightThrough()(grad, torch.full((3,), 99.0), quantized, Grid(-1, 1)) is grad


def test_clipped_leaves_the_upstream_gradient_unchanged() -> None:
    grad = torch.ones(3)
    x = torch.tensor([9.0, 0.0, -9.0])
    got = ClippedSTE(1.0)(grad, x, Quantized(x, torch.ones(1)), Grid(-1, 1))
    assert got.tolist() == [0, 1, 0]
    assert grad.tolist() == [1, 1, 1]


def test_names() -> None:
    assert repr(StraightThrough()) == "StraightThrough()"
    assert repr(ClippedSTE(2.5)) == "ClippedSTE(2.5)"
