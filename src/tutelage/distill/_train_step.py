"""Forward, backward, clipping and update of one training step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..intervention import NO_INTERVENTION
from ._distiller import Distiller

__all__ = ["TrainStep"]


class TrainStep:
    """One optimizer step of quantization-aware distillation, without host synchronisation.

    Call it for a whole step. A loop that accumulates gradients, or clips and updates on its own,
    calls ``accumulate`` and ``update`` separately.
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

    def __call__(
        self,
        batch: Mapping[str, Any],
        stage: str = NO_INTERVENTION,
        *,
        progress: Tensor | None = None,
        model: nn.Module | None = None,
    ) -> dict[str, Tensor]:
        """Runs one whole step.

        Args:
            batch: See ``Distiller.step``.
            stage: Name of the stage.
            progress: See ``Distiller.step``.
            model: See ``Distiller.step``.

        Returns:
            The detached loss under ``"loss"`` and every unweighted term under its name.
        """
        terms = self.accumulate(batch, stage, progress=progress, model=model)
        self.update()
        return terms

    def accumulate(
        self,
        batch: Mapping[str, Any],
        stage: str = NO_INTERVENTION,
        *,
        progress: Tensor | None = None,
        model: nn.Module | None = None,
        backward: Any = None,
        divisor: int = 1,
    ) -> dict[str, Tensor]:
        """Runs forward and backward and adds to the gradients.

        Args:
            batch: See ``Distiller.step``.
            stage: Name of the stage.
            progress: See ``Distiller.step``.
            model: See ``Distiller.step``.
            backward: Called with the loss in place of ``loss.backward()``.
            divisor: Number of micro-batches in the step; divides the loss.

        Returns:
            The detached loss, divided, under ``"loss"`` and every unweighted term under its name.
        """
        step = self.distiller.step(batch, stage, progress=progress, model=model)
        loss = step.loss / divisor
        if backward is None:
            loss.backward()
        else:
            backward(loss)
        return {"loss": loss.detach(), **{k: v.detach() for k, v in step.terms.items()}}

    def update(self) -> None:
        """Clips, updates the parameters that have a gradient, and drops the gradients."""
        if self.optimizer is None:
            raise ValueError("this TrainStep has no optimizer; pass one to update parameters.")
        if self.max_grad_norm is not None:
            parameters = [p for p in self.distiller.student.parameters() if p.grad is not None]
            torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
