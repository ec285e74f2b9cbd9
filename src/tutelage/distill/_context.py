"""What a loss term sees of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

from jaxtyping import Bool, Float
from torch import Tensor

from ..sites import Signals

__all__ = ["BatchItems", "LossValue", "StepContext"]


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
class BatchItems:
    """What there is to count in a batch. It depends on shapes and masks, not on any weight.

    So the items of all micro-batches of a step are known before the first of them runs.

    Attributes:
        rows: Number of samples.
        tokens: Positions of a sample, padding included; ``None`` where no signal is recorded.
        positions: Shape of the predictions without the classes: (batch,) or (batch, tokens).
        token_mask: True for real tokens, (batch, tokens); ``None`` where all are real.
        labels: Labels of the batch where a term asked for them.
    """

    rows: int
    tokens: int | None
    positions: tuple[int, ...]
    token_mask: Bool[Tensor, "batch tokens"] | None
    labels: Tensor | None

    def predictions(self) -> Tensor | int:
        """Returns the number of predictions, at real tokens only where there is one per token."""
        if self.token_mask is not None and self.positions == tuple(self.token_mask.shape):
            return self.token_mask.sum()
        return math.prod(self.positions)

    def real_tokens(self, *, masked: bool = True) -> Tensor | int:
        """Returns the number of real tokens, or of all positions where not ``masked``."""
        if self.token_mask is not None and masked:
            return self.token_mask.sum()
        return self.rows * cast("int", self.tokens)

    def real_pairs(self, *, masked: bool = True) -> Tensor | int:
        """Returns the number of (query, key) pairs of real tokens, or of all positions."""
        if self.token_mask is not None and masked:
            return self.token_mask.sum(-1).square().sum()
        return self.rows * cast("int", self.tokens) ** 2


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

    @property
    def items(self) -> BatchItems:
        """What there is to count in the batch."""
        # Queries or tokens are the second dimension from the right in every signal.
        signal = next((tensor for found in self.student.values() for tensor in found), None)
        return BatchItems(
            rows=(self.student_logits if signal is None else signal).shape[0],
            tokens=None if signal is None else signal.shape[-2],
            positions=tuple(self.student_logits.shape[:-1]),
            token_mask=self.token_mask,
            labels=self.labels,
        )
