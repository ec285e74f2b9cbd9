"""What a loss term sees of one step."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor

from ..sites import Signals

__all__ = ["LossValue", "StepContext"]


@dataclass(frozen=True)
class LossValue:
    """A loss as a sum and the number of items in it, so that parts of a batch combine exactly.

    Attributes:
        sum: Sum over the items, 0-dim.
        count: Number of items, 0-dim or a plain number; the mean is ``sum / count``.
    """

    sum: Float[Tensor, ""]
    count: Tensor | int


@dataclass(frozen=True)
class StepContext:
    """One step as loss terms see it. Signals are the student's own, before any replacement.

    Attributes:
        student: Signals of the student, with gradient.
        teacher: Signals of the teacher.
        student_logits: (*positions, classes), or the last hidden state of a model without logits.
        teacher_logits: The teacher's, of the same shape.
        has_logits: Whether they are logits.
        token_mask: True for real tokens, (batch, tokens); ``None`` where all are real.
        labels: Labels of the batch where a term asked for them.
        stage: Name of the stage.
        progress: Part of training that is over, 0-dim, or ``None``.
    """

    student: Signals
    teacher: Signals
    student_logits: Float[Tensor, "*positions classes"]
    teacher_logits: Float[Tensor, "*positions classes"]
    has_logits: bool
    token_mask: Bool[Tensor, "batch tokens"] | None
    labels: Tensor | None
    stage: str
    progress: Tensor | None
