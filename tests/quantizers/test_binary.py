"""Binary weights: BWN worked out by hand."""

from __future__ import annotations

import torch

from tutelage.quantizers import BinaryQuantizer


def test_worked_example() -> None:
    codes, scale = BinaryQuantizer().quantize(torch.tensor([[0.5, -1.0, 0.25, -0.25]]))
    assert codes.tolist() == [[1, -1, 1, -1]]
    assert scale.tolist() == [[0.5]]


def test_both_zeros_are_positive() -> None:
    codes, _ = BinaryQuantizer().quantize(torch.tensor([[0.0, -0.0, -1e-45, 1e-45]]))
    assert codes.tolist() == [[1, 1, -1, 1]]


def test_clip_lowers_the_mean() -> None:
    codes, scale = BinaryQuantizer(clip=1.0).quantize(torch.tensor([[9.0, -1.0, 0.5, -0.5]]))
    assert codes.tolist() == [[1, -1, 1, -1]]
    assert scale.tolist() == [[0.75]]


def test_per_tensor_scale_is_the_mean_of_all() -> None:
    codes, scale = BinaryQuantizer("tensor").quantize(torch.tensor([[4.0, -2.0], [1.0, 1.0]]))
    assert codes.tolist() == [[1, -1], [1, 1]]
    assert scale.tolist() == [[2.0]]
