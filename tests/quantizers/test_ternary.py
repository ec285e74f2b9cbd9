"""Ternary weights: TWN worked out by hand, and what is its own."""

from __future__ import annotations

import torch

from tutelage.quantizers import TernaryQuantizer


def test_worked_example() -> None:
    # mean 0.5, threshold 0.35, kept 1.0, 0.5 and 0.4, scale their mean
    w = torch.tensor([[1.0, -0.5, 0.1, -0.4, 0.5]])
    codes, scale = TernaryQuantizer().quantize(w)
    assert codes.tolist() == [[1, -1, 0, -1, 1]]
    assert torch.allclose(scale, torch.tensor([[0.6]]))


def test_a_value_on_the_threshold_is_dropped() -> None:
    # mean 5, threshold 3.5 in float32 exactly
    w = torch.tensor([[3.5, 6.5, 5.0, 5.0]])
    mean = torch.tensor(5.0) * 0.7
    assert mean.item() == 3.5
    assert TernaryQuantizer().quantize(w).codes.tolist() == [[0, 1, 1, 1]]


def test_clip_comes_before_mean_and_threshold() -> None:
    # 100 is clamped to 2.5: mean 1.25, threshold 0.875
    w = torch.tensor([[100.0, 1.0, -0.5, 1.0]])
    codes, scale = TernaryQuantizer(clip=2.5).quantize(w)
    assert codes.tolist() == [[1, 1, 0, 1]]
    assert torch.allclose(scale, torch.tensor([[1.5]]))
    assert TernaryQuantizer().quantize(w).codes.tolist() == [[1, 0, 0, 0]]


def test_one_zero_row_among_others_harms_nothing() -> None:
    w = torch.randn(4, 9)
    w[2] = 0.0
    codes, scale = TernaryQuantizer().quantize(w)
    assert codes[2].tolist() == [0.0] * 9
    assert scale[2].item() == 0.0
    assert (scale[[0, 1, 3]] > 0).all()


def test_gaussian_statistics_of_the_paper() -> None:
    # reference: 42.8 % zeros, relative error 0.187 to 0.191
    w = torch.randn(64, 4096)
    codes, scale = TernaryQuantizer().quantize(w)
    zeros = (codes == 0).double().mean().item()
    error = ((w - codes * scale).square().sum() / w.square().sum()).item()
    assert abs(zeros - 0.424) < 0.01
    assert 0.185 < error < 0.195
