"""Four symmetric levels: the step worked out by hand, and where the threshold comes from."""

from __future__ import annotations

import torch

from tutelage.quantizers import FourLevelQuantizer


def test_worked_example() -> None:
    # mean 1, threshold 1.248: only 2.5 is outer; scale = (0.5 + 0.5 + 3 * 2.5 + 0.5) / (1+1+9+1)
    codes, scale = FourLevelQuantizer().quantize(torch.tensor([[0.5, -0.5, 2.5, -0.5]]))
    assert codes.tolist() == [[1, -1, 3, -1]]
    assert torch.allclose(scale, torch.tensor([[9.0 / 12.0]]))


def test_levels_are_three_halves_and_one_half_of_the_step() -> None:
    x = torch.randn(1, 64)
    quantizer = FourLevelQuantizer()
    step = 2 * quantizer.quantize(x).scale
    levels = sorted(set((quantizer(x) / step).reshape(-1).tolist()))
    assert torch.allclose(torch.tensor(levels), torch.tensor([-1.5, -0.5, 0.5, 1.5]))


def test_both_zeros_are_positive() -> None:
    codes, _ = FourLevelQuantizer().quantize(torch.tensor([[0.0, -0.0, 2.0, -2.0]]))
    assert codes.tolist() == [[1, 1, 3, -3]]


def test_error_of_a_gaussian_is_that_of_the_optimal_uniform_quantizer() -> None:
    # Max (1960), Table II: four uniform levels, mean squared error 0.1188
    x = torch.randn(64, 4096)
    codes, scale = FourLevelQuantizer().quantize(x)
    error = ((x - codes * scale).square().sum() / x.square().sum()).item()
    assert abs(error - 0.1188) < 0.002
    assert abs((2 * scale).mean().item() - 0.9957) < 0.02
