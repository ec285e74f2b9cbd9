"""Power iteration and Hutchinson's trace against matrices whose eigenvalues are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tutelage.errors import NonFiniteLossError, StudyError
from tutelage.study._curvature import hessian_product, hutchinson, top_eigenvalues


def symmetric(values: list[float], seed: int = 0) -> Tensor:
    """Returns a dense float64 matrix with the given eigenvalues."""
    made = torch.Generator().manual_seed(seed)
    size = len(values)
    basis, _ = torch.linalg.qr(torch.randn(size, size, generator=made, dtype=torch.float64))
    return basis @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ basis.t()


def test_eigenvalues_of_a_quadratic_with_their_signs() -> None:
    matrix = symmetric([-9.0, 5.0, 2.0, 1.0, 0.5, -0.25])
    point = torch.randn(6, dtype=torch.float64, requires_grad=True)
    product, size = hessian_product(0.5 * point @ matrix @ point, [point])
    assert size == 6
    found = top_eigenvalues(product, point.detach(), 3, tolerance=1e-12, iterations=500)
    assert [f.value for f in found] == pytest.approx([-9.0, 5.0, 2.0], rel=1e-6)
    assert all(f.converged and f.residual < 1e-4 for f in found)


@pytest.mark.parametrize(
    "values", [[1.0, -1.0, 0.1], [1.0, -0.99, 0.1], [1.0, -0.95, 0.5, 0.2], [-4.0, 3.9, 1.0]]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_of_opposite_sign_are_told_apart(values: list[float], dtype: torch.dtype) -> None:
    diagonal = torch.tensor(values, dtype=dtype)
    for seed in range(20):
        (found,) = top_eigenvalues(
            lambda v: diagonal * v, diagonal, iterations=30, tolerance=1e-2, seed=seed
        )
        assert found.converged
        assert found.residual <= 0.1
        near = min(abs(found.value - value) for value in values)
        assert near <= 0.02 * abs(values[0])
        assert abs(found.value) >= 0.93 * abs(values[0])
    found = top_eigenvalues(lambda v: diagonal * v, diagonal, 2, iterations=500, tolerance=1e-6)
    exact = sorted(values, key=abs, reverse=True)[:2]
    assert sorted(f.value for f in found) == pytest.approx(sorted(exact), rel=1e-3)


def test_a_large_residual_is_not_converged_though_the_quotient_rests() -> None:
    # Of many neighbours the quotient changes little long before a vector settles.
    diagonal = torch.linspace(-1.0, 0.99, 200, dtype=torch.float64)
    (found,) = top_eigenvalues(lambda v: diagonal * v, diagonal, iterations=6, tolerance=0.1)
    assert found.residual > 0.1
    assert not found.converged


def test_zero_and_small_matrices() -> None:
    zero = torch.zeros(3, 3)
    (found,) = top_eigenvalues(lambda v: zero @ v, zero[0])
    assert (found.value, found.residual, found.converged) == (0.0, 0.0, True)
    two = top_eigenvalues(lambda v: 3.0 * v, torch.zeros(2), 5)
    assert [f.value for f in two] == pytest.approx([3.0, 3.0])


def test_trace_of_a_diagonal_is_exact_and_of_others_within_its_error() -> None:
    diagonal = torch.tensor([1.0, -2.0, 5.5], dtype=torch.float64)
    exact = hutchinson(lambda v: diagonal * v, diagonal, 4)
    assert (exact.value, exact.error) == pytest.approx((4.5, 0.0))
    matrix = symmetric([-9.0, 5.0, 2.0, 1.0, 0.5, -0.25], seed=1)
    found = hutchinson(lambda v: matrix @ v, matrix[0], 4000)
    assert abs(found.value - -0.75) < 4 * found.error
    off = float((matrix - torch.diag(matrix.diagonal())).square().sum())
    assert found.error == pytest.approx(math.sqrt(2 * off / 4000), rel=0.1)


def test_parameters_without_curvature_or_use() -> None:
    curved, straight, unused = (torch.ones(2, requires_grad=True) for _ in range(3))
    product, size = hessian_product(
        curved.pow(3).sum() + straight.sum(), [curved, straight, unused]
    )
    assert size == 4
    assert product(torch.ones(4)).tolist() == [6.0, 6.0, 0.0, 0.0]
    product, _ = hessian_product(straight.sum(), [straight])
    assert product(torch.ones(2)).tolist() == [0.0, 0.0]


def test_refusals() -> None:
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(StudyError, match="none of the parameters"):
        hessian_product(x.sum(), [torch.ones(1, requires_grad=True)])
    with pytest.raises(NonFiniteLossError, match="not finite"):
        hessian_product((x / 0).sum(), [x])
    with pytest.raises(StudyError, match="2 or more"):
        hutchinson(lambda v: v, x, 1)
    with pytest.raises(StudyError, match="0 eigenvalues"):
        top_eigenvalues(lambda v: v, x, 0)
