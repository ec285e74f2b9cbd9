"""Eigenvalues and trace of a Hessian that is known by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import NonFiniteLossError, StudyError

__all__ = ["Eigenvalue", "Product", "Trace", "hessian_product", "hutchinson", "top_eigenvalues"]

_SETTLED = 0.1

Product = Callable[[Float[Tensor, " size"]], Float[Tensor, " size"]]
"""From a vector v to H v."""


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue found by power iteration.

    Attributes:
        value: Rayleigh quotient v^T H v of the last unit vector v.
        residual: ``|H v - value v| / |value|``: 0 for an exact pair; 0 where the value is 0.
        iterations: Products with the Hessian that were made.
        converged: Whether the magnitude of the quotient changed by less than the tolerance,
            relative to itself, and the residual is at most 0.1. An exact eigenvalue lies within
            ``residual * |value|`` of the value.
    """

    value: float
    residual: float
    iterations: int
    converged: bool


@dataclass(frozen=True)
class Trace:
    """A trace estimated from random probes.

    Attributes:
        value: Mean over the probes.
        error: Standard error of that mean.
        probes: Their number.
    """

    value: float
    error: float
    probes: int


def hessian_product(loss: Float[Tensor, ""], parameters: Sequence[Tensor]) -> tuple[Product, int]:
    """Returns products with the Hessian of a loss, by differentiating its gradient.

    The graph of the gradient is kept, so that a product costs two backward passes and no forward
    pass. Parameters that the loss does not depend on have zero rows and columns.

    Args:
        loss: 0-dim, with a graph that can be differentiated twice.
        parameters: What it is differentiated for, flattened and laid end to end.

    Returns:
        The product, and the length of its vectors.

    Raises:
        StudyError: The loss depends on none of the parameters.
        NonFiniteLossError: The loss is not finite.
    """
    if not bool(torch.isfinite(loss)):
        raise NonFiniteLossError(
            "the loss is not finite, so that it has no curvature; train with a lower learning rate."
        )
    given: tuple[Tensor | None, ...] = torch.autograd.grad(
        loss, parameters, create_graph=True, allow_unused=True
    )
    pairs = [(g, p) for g, p in zip(given, parameters, strict=True) if g is not None]
    if not pairs:
        raise StudyError("the loss depends on none of the parameters; name others.")
    gradients, used = zip(*pairs, strict=True)
    curved = [gradient for gradient in gradients if gradient.requires_grad]
    places = [i for i, gradient in enumerate(gradients) if gradient.requires_grad]
    sizes = [parameter.numel() for parameter in used]

    def product(vector: Tensor) -> Tensor:
        parts = vector.split(sizes)
        if not curved:
            return torch.zeros_like(vector)
        outer = [parts[i].view_as(used[i]) for i in places]
        found: tuple[Tensor | None, ...] = torch.autograd.grad(
            curved, used, outer, retain_graph=True, allow_unused=True
        )
        rows = [
            torch.zeros_like(part) if row is None else row.reshape(-1)
            for row, part in zip(found, parts, strict=True)
        ]
        return torch.cat(rows)

    return product, sum(sizes)


def top_eigenvalues(
    product: Product,
    like: Float[Tensor, " size"],
    count: int = 1,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> tuple[Eigenvalue, ...]:
    """Returns the eigenvalues of largest magnitude, by power iteration with deflation.

    ``v <- H v / |H v|`` from a random v, orthogonal to the vectors found before. The eigenvalue,
    with its sign, is that of H in the span of the last two v, the larger in magnitude
    (Rayleigh-Ritz): their images are known, so that it costs no product. It tells eigenvalues of
    opposite sign and nearly one magnitude apart, between which v itself never settles.

    Args:
        product: Products with a symmetric matrix.
        like: A vector of its length, for dtype and device; its values are not used.
        count: How many, the largest magnitude first.
        iterations: At most so many products for each.
        tolerance: Relative change of the quotient's magnitude at which an iteration ends, where
            the residual is small too.
        seed: Seed of the first vectors.

    Raises:
        StudyError: A number is out of range.
    """
    if count < 1 or iterations < 2:
        raise StudyError(
            f"{count} eigenvalues with {iterations} iterations; use 1 or more with 2 or more."
        )
    made = torch.Generator().manual_seed(seed)
    known: list[Tensor] = []
    found = []
    for _ in range(min(count, like.numel())):
        vector = _unit(torch.randn(like.shape, generator=made).to(like), known)
        value, converged, used, relative = 0.0, False, 0, 0.0
        last: tuple[Tensor, Tensor] | None = None
        best = vector
        for used in range(1, iterations + 1):
            image = _without(product(vector), known)
            best, moved = _ritz(vector, image, last)
            before, value = value, float(torch.dot(best, moved))
            relative = float((moved - value * best).norm()) / abs(value) if value else 0.0
            change = abs(abs(value) - abs(before))
            settled = used > 1 and change <= tolerance * abs(value) and relative <= _SETTLED
            converged = settled or not bool(image.any())
            if converged:
                break
            last, vector = (vector, image), _unit(image, known)
        known.append(_unit(best, known))
        found.append(Eigenvalue(value, relative, used, converged))
    return tuple(found)


def hutchinson(
    product: Product, like: Float[Tensor, " size"], probes: int = 16, *, seed: int = 0
) -> Trace:
    """Estimates the trace: the mean of z^T H z over vectors z of independent signs.

    Hutchinson 1990. The estimate has no bias; its variance is twice the sum of the squared
    off-diagonal entries, over the number of probes.

    Args:
        product: Products with a symmetric matrix.
        like: A vector of its length, for dtype and device; its values are not used.
        probes: Number of vectors, 2 or more.
        seed: Seed of the signs.

    Raises:
        StudyError: There are fewer than two probes.
    """
    if probes < 2:
        raise StudyError(f"{probes} probes have no standard error; use 2 or more.")
    made = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(probes):
        signs = torch.randint(0, 2, like.shape, generator=made).to(like) * 2.0 - 1.0
        values.append(float(torch.dot(signs, product(signs))))
    mean = math.fsum(values) / probes
    spread = math.fsum((value - mean) ** 2 for value in values) / (probes - 1)
    return Trace(mean, math.sqrt(spread / probes), probes)


def _ritz(
    vector: Tensor, image: Tensor, last: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Returns the Ritz vector of larger magnitude in the span of two unit vectors, and its image.

    Args:
        vector: The newer vector.
        image: H times it.
        last: The older vector and its image.
    """
    if last is None:
        return vector, image
    older, shifted = last
    along = torch.dot(vector, older)
    rest = vector - along * older
    length = rest.norm()
    if float(length) <= math.sqrt(torch.finfo(vector.dtype).eps):
        return vector, image  # the vectors are one, up to rounding
    basis = torch.stack([older, rest / length])
    images = torch.stack([shifted, (image - along * shifted) / length])
    small = (basis @ images.t()).double().cpu()
    values, vectors = torch.linalg.eigh((small + small.t()) / 2)
    weights = vectors[:, int(values.abs().argmax())].to(vector)
    best, moved = weights @ basis, weights @ images
    size = best.norm()
    return best / size, moved / size


def _without(vector: Tensor, known: Sequence[Tensor]) -> Tensor:
    for other in known:
        vector = vector - torch.dot(vector, other) * other
    return vector


def _unit(vector: Tensor, known: Sequence[Tensor]) -> Tensor:
    vector = _without(vector, known)
    return vector / vector.norm().clamp(min=torch.finfo(vector.dtype).tiny)
