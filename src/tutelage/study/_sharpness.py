"""How sharply the training loss of a student bends at its weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distill import Distiller
from ..errors import StudyError
from ..nn import ramped
from ._curvature import Eigenvalue, Product, Trace, hessian_product, hutchinson, top_eigenvalues

__all__ = ["Sharpness", "curved_parameters", "sharpness"]


@dataclass(frozen=True)
class Sharpness:
    """Curvature of a student's distillation loss.

    Attributes:
        per_sample: The eigenvalues of largest magnitude of every sample's own loss, with sign,
            the largest magnitude first.
        unconverged: How many of those had not settled when the iterations ended: they still
            changed, or H v was not yet nearly a multiple of v (see ``Eigenvalue``).
        batch: The same of the loss of all samples together.
        trace: Trace of the Hessian of the loss of all samples together.
        parameters: Size of the Hessian.
    """

    per_sample: tuple[tuple[float, ...], ...]
    unconverged: int
    batch: tuple[Eigenvalue, ...]
    trace: Trace
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


def curved_parameters(student: nn.Module) -> list[Tensor]:
    """Returns the weights over which curvature is measured: all that train, but for tables.

    Embedding tables are left out: of their many rows a loss knows those of its own tokens alone.

    Args:
        student: A prepared model.
    """
    tables = {id(m.weight) for m in student.modules() if isinstance(m, nn.Embedding)}
    return [p for p in student.parameters() if p.requires_grad and id(p) not in tables]


def sharpness(
    distiller: Distiller,
    samples: Sequence[Mapping[str, Any]],
    together: Iterable[Mapping[str, Any]],
    *,
    count: int = 1,
    probes: int = 16,
    iterations: int = 30,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Sharpness:
    """Measures the curvature of the distillation loss, with no intervention.

    A quantized model is constant between the thresholds of its codes, so that its true Hessian is
    zero almost everywhere. What is measured is the derivative of the gradient that trains it: every
    derivative passes a rounding as the first one does, through the gradient estimator. With the
    straight-through estimator that is the Hessian of the loss over the quantized weights, at their
    values, rounded activations counting as they are and passing derivatives unchanged. It depends
    on codes and scales alone, not on how far the latent weights are from a threshold. The values of
    the forward pass are the student's up to the rounding of float32 (``tutelage.nn.ramped`` at 1).

    Kim et al. (arXiv 2302.11812, Figure 5) show such eigenvalues as a histogram over samples.

    Args:
        distiller: Student and teacher; the student's mode is left as it is, eval mode is meant.
        samples: One batch of one sample each.
        together: Batches of the loss that is measured as a whole; the loss is the mean over them.
        count: Eigenvalues of each.
        probes: Random vectors for the trace.
        iterations: At most so many products with the Hessian for an eigenvalue.
        tolerance: Relative change of an eigenvalue at which its iteration ends, where its relative
            residual is at most 0.1.
        seed: Seed of the random vectors.

    Raises:
        StudyError: There is no sample, or a number is out of range.
        NonFiniteLossError: A loss is not finite.
    """
    student = distiller.student
    parameters = curved_parameters(student)
    if not parameters or not samples:
        raise StudyError("there is nothing to measure; give samples and a student that can train.")
    settings: Any = {"iterations": iterations, "tolerance": tolerance, "seed": seed}
    found = []
    with ramped(student, torch.ones((), device=parameters[0].device)):
        for sample in samples:
            product, size = hessian_product(distiller.step(sample).loss, parameters)
            like = parameters[0].new_empty(size)
            found.append(top_eigenvalues(product, like, count, **settings))
        parts = [hessian_product(distiller.step(batch).loss, parameters) for batch in together]
        if not parts:
            raise StudyError("there is no batch to measure the loss of; give at least one.")
        whole = _mean([product for product, _ in parts])
        size = parts[0][1]
        like = parameters[0].new_empty(size)
        batch = top_eigenvalues(whole, like, count, **settings)
        trace = hutchinson(whole, like, probes, seed=seed)
    return Sharpness(
        per_sample=tuple(tuple(e.value for e in eigenvalues) for eigenvalues in found),
        unconverged=sum(not e.converged for eigenvalues in found for e in eigenvalues),
        batch=batch,
        trace=trace,
        parameters=size,
    )


def _mean(products: Sequence[Product]) -> Product:
    def product(vector: Tensor) -> Tensor:
        return torch.stack([one(vector) for one in products]).mean(0)

    return product
