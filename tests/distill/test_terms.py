"""The shared squared error: value, gradient, and the gradient of the gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tutelage.distill._terms import squared_error

MASKS = {
    "none": None,
    "tokens": torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]).unsqueeze(-1),
    "weights": torch.tensor([[0.5, 0.5, 0.0], [0.7, 0.0, 2.0]]).unsqueeze(-1),
}


def operands() -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    own, other = (torch.randn(2, 3, 4, generator=made) for _ in range(2))
    return own.requires_grad_(), other


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("twice", [False, True])
def test_gradient_is_that_of_the_formula(name: str, twice: bool) -> None:
    (own, other), mask = operands(), MASKS[name]
    value = squared_error(own, other, mask)
    (found,) = torch.autograd.grad(3.0 * value, own, create_graph=twice)
    assert found.requires_grad == twice
    own, found = own.detach(), found.detach()
    for row, token, feature in torch.cartesian_prod(*map(torch.arange, own.shape)).tolist():
        factor = 1.0 if mask is None else float(mask[row, token, 0].double())
        difference = float(own[row, token, feature]) - float(other[row, token, feature])
        expected = 3.0 * 2.0 * factor**2 * difference
        assert float(found[row, token, feature]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", MASKS)
def test_the_gradient_has_a_gradient(name: str) -> None:
    (own, other), mask = operands(), MASKS[name]
    (gradient,) = torch.autograd.grad(squared_error(own, other, mask), own, create_graph=True)
    vector = torch.randn(own.shape, generator=torch.Generator().manual_seed(4))
    (found,) = torch.autograd.grad((gradient * vector).sum(), own)
    squares = torch.ones(()) if mask is None else mask.square()
    torch.testing.assert_close(found, 2.0 * squares * vector)
