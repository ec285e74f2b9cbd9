"""Forward, backward, clipping and update of one training step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from ..intervention import NO_INTERVENTION
from ._distiller import Distiller
from ._distributed import deferred, gradient_group, processes, sum_over

__all__ = ["TrainStep"]


class TrainStep:
    """One optimizer step of quantization-aware distillation, without host synchronisation.

    Call it for a whole step, with one batch or with a list of micro-batches. A loop that clips
    and updates on its own calls ``counts`` once and ``accumulate`` for every micro-batch.

    The gradients are those of one batch that holds the samples of all micro-batches and all
    processes, however unequal their sizes and lengths; with relative errors, whose variance is that
    of a micro-batch, close to them (``SignalMSE``).

    Attributes:
        distiller: Computes the loss.
        optimizer: Updates the student.
        max_grad_norm: Largest norm of the whole gradient.
        grad_norm: Norm of the last update's gradient before clipping, 0-dim; ``None`` where
            nothing is clipped.
    """

    def __init__(
        self,
        distiller: Distiller,
        optimizer: torch.optim.Optimizer | None,
        *,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        """Keeps the parts.

        Args:
            distiller: Computes the loss.
            optimizer: Updates the student; ``None`` where only ``accumulate`` is used.
            max_grad_norm: Largest norm of the whole gradient, ``None`` for no clipping.
        """
        self.distiller = distiller
        self.optimizer = optimizer
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None

    def __call__(
        self,
        batch: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        stage: str = NO_INTERVENTION,
        *,
        progress: Tensor | None = None,
        model: nn.Module | None = None,
    ) -> dict[str, Tensor]:
        """Runs one whole step.

        Args:
            batch: See ``Distiller.step``; or several such, whose gradients are accumulated.
            stage: Name of the stage.
            progress: See ``Distiller.step``.
            model: See ``Distiller.step``.

        Returns:
            The detached loss under ``"loss"`` and every unweighted term under its name. Of a model
            in several processes: the share of this one, whose mean over processes is the value.

        Raises:
            DataError: There is no batch.
        """
        batches = [batch] if isinstance(batch, Mapping) else list(batch)
        if not batches:
            raise DataError("a step got an empty list of micro-batches; pass at least one.")
        counts = self.counts(batches, stage, model=model)
        total: dict[str, Tensor] = {}
        for index, part in enumerate(batches):
            with deferred(self._called(model), on=index + 1 < len(batches)):
                terms = self.accumulate(part, stage, progress=progress, model=model, counts=counts)
            total = {name: total[name] + t if total else t for name, t in terms.items()}
        self.update()
        return total

    def counts(
        self,
        batches: Sequence[Mapping[str, Any]],
        stage: str = NO_INTERVENTION,
        *,
        model: nn.Module | None = None,
    ) -> dict[str, Tensor | int] | None:
        """Counts the items of every term in one optimizer step, over all processes.

        Args:
            batches: The micro-batches of this process.
            stage: Name of the stage.
            model: See ``Distiller.step``; says over which processes gradients are averaged.

        Returns:
            What ``accumulate`` takes; ``None`` where one batch is the whole step.

        Raises:
            TutelageError: As ``Distiller.counts``.
        """
        group = gradient_group(self._called(model))
        if len(batches) == 1 and processes(group) == 1:
            return None
        device = next(self.distiller.student.parameters()).device
        return sum_over(group, self.distiller.counts(batches, stage), device)

    def accumulate(
        self,
        batch: Mapping[str, Any],
        stage: str = NO_INTERVENTION,
        *,
        progress: Tensor | None = None,
        model: nn.Module | None = None,
        backward: Any = None,
        counts: Mapping[str, Tensor | int] | None = None,
    ) -> dict[str, Tensor]:
        """Runs forward and backward and adds to the gradients.

        Args:
            batch: See ``Distiller.step``.
            stage: Name of the stage.
            progress: See ``Distiller.step``.
            model: See ``Distiller.step``.
            backward: Called with the loss in place of ``loss.backward()``.
            counts: What ``counts`` returned for all micro-batches of the step; ``None`` where this
                batch is the whole step.

        Returns:
            The detached loss under ``"loss"`` and every unweighted term under its name: the share
            of this batch, to be added up over micro-batches and averaged over processes.
        """
        step = self.distiller.step(batch, stage, progress=progress, model=model, counts=counts)
        # Gradients are averaged over the processes, the shares are to be added up.
        factor = 1 if counts is None else processes(gradient_group(self._called(model)))
        loss = step.loss if factor == 1 else step.loss * factor
        if backward is None:
            loss.backward()
        else:
            backward(loss)
        return {
            "loss": loss.detach(),
            **{name: (share * factor).detach() for name, share in step.shares.items()},
        }

    def _called(self, model: nn.Module | None) -> nn.Module:
        return self.distiller.student if model is None else model

    def update(self) -> None:
        """Clips, updates the parameters that have a gradient, and drops the gradients."""
        if self.optimizer is None:
            raise ValueError("this TrainStep has no optimizer; pass one to update parameters.")
        if self.max_grad_norm is not None:
            parameters = [p for p in self.distiller.student.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.clip_grad_norm_(
                parameters, self.max_grad_norm, foreach=True
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
