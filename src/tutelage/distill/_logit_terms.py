"""Loss terms of predictions: distillation of the logits, and the task's own loss on labels."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import DataError
from ..sites import Site
from ._context import BatchItems, LossValue, StepContext
from ._terms import floats, squared_error

__all__ = ["LabelCrossEntropy", "Logits"]


def _over_tokens(logits: Tensor, tokens: Bool[Tensor, "batch tokens"]) -> bool:
    """Returns whether logits are (batch, 2, tokens), start and end of an answer."""
    batch, length = tokens.shape
    return logits.shape == (batch, 2, length) and length != 2


def _real_tokens(logits: Tensor, tokens: Bool[Tensor, "batch tokens"]) -> Tensor:
    # The least finite number, not -inf: 0 * (log p_T - log p_S) stays 0 there.
    return logits.masked_fill(~tokens.unsqueeze(1), torch.finfo(logits.dtype).min)


class Logits:
    """Soft cross-entropy of the student under the teacher's prediction, temperature 1.

    ``sum_c p_T(c) (log p_T(c) - log p_S(c))``, the Kullback-Leibler divergence, which is zero for
    equal predictions; ``entropy=True`` leaves out ``log p_T``, as the published code does, with the
    same gradient. With one output (regression) the squared error; for a model without logits the
    squared error of its last hidden state. Predictions per token are compared at real tokens only.
    Of start and end logits, (batch, 2, tokens), the classes are the real tokens: padded ones are
    left out of both softmaxes.
    """

    name = "logits"
    requires: tuple[Site, ...] = ()
    needs_labels = False

    def __init__(self, *, entropy: bool = False) -> None:
        """Chooses between divergence and cross-entropy.

        Args:
            entropy: Keep the teacher's entropy in the value (cross-entropy).
        """
        self.entropy = entropy

    def count(self, items: BatchItems) -> Tensor | int:
        """Returns the number of predictions."""
        return items.predictions()

    def __call__(self, context: StepContext) -> LossValue:
        """Returns the sum over the predictions and their number."""
        student, teacher = context.student_logits.float(), context.teacher_logits.float()
        items = context.items
        tokens = items.prediction_mask
        if tokens is not None and _over_tokens(student, tokens):
            student, teacher = _real_tokens(student, tokens), _real_tokens(teacher, tokens)
        if tokens is not None and student.shape[:-1] != tokens.shape:
            tokens = None
        count = self.count(items)
        if student.shape[-1] == 1 or not context.has_logits:
            mask = None if tokens is None else floats(tokens, student).unsqueeze(-1)
            return LossValue(squared_error(student, teacher, mask) / student.shape[-1], count)
        log_student = torch.log_softmax(student, dim=-1)
        log_teacher = torch.log_softmax(teacher, dim=-1)
        target = log_teacher.exp()
        each = target * log_student if self.entropy else target * (log_student - log_teacher)
        each = each.sum(-1)
        return LossValue(-(each if tokens is None else each * floats(tokens, each)).sum(), count)


class LabelCrossEntropy:
    """The task's own loss on labels: cross-entropy, or squared error with one output.

    Labels of -100 do not count. Labels of start and end logits, (batch, 2, tokens), are (batch, 2).
    """

    name = "labels"
    requires: tuple[Site, ...] = ()
    needs_labels = True

    def __init__(self, *, shift: bool | None = None) -> None:
        """Chooses which token a label per token belongs to.

        Args:
            shift: ``True`` where the labels are the inputs of a causal language model, so that the
                logits at a token are compared with the label after it; ``False`` where a label is
                of its own token. Only predictions per token need it, and refuse to guess.
        """
        self.shift = shift

    def count(self, items: BatchItems) -> Tensor | int:
        """Returns the number of predictions, of those per token only where a label counts."""
        labels = items.labels
        if len(items.positions) == 1 or labels is None:
            return math.prod(items.positions)
        return (self._shifted(labels) != -100).sum()

    def _shifted(self, labels: Tensor) -> Tensor:
        return labels[:, 1:] if self.shift else labels

    def __call__(self, context: StepContext) -> LossValue:
        """Returns the sum over the labels and their number."""
        labels, tokens = context.labels, context.token_mask
        if labels is None:
            raise DataError("the loss term 'labels' needs 'labels' in every batch.")
        logits = context.student_logits.float()
        if logits.shape[-1] == 1:
            target = labels.reshape(logits.shape).to(logits.dtype)
            return LossValue(squared_error(logits, target, None), self.count(context.items))
        if tokens is not None and _over_tokens(logits, tokens):
            logits = _real_tokens(logits, tokens)
        elif logits.dim() == 3 and labels.shape == logits.shape[:2]:
            if self.shift is None:
                raise DataError(
                    "the loss term 'labels' cannot tell whether a label is of its own token or of "
                    "the one before; use LabelCrossEntropy(shift=True) for a causal language "
                    "model, else LabelCrossEntropy(shift=False)."
                )
            logits = logits[:, :-1] if self.shift else logits
            labels = self._shifted(labels)
        flat, target = logits.flatten(0, -2), labels.flatten()
        loss = torch.nn.functional.cross_entropy(flat, target, reduction="sum")
        return LossValue(loss, self.count(context.items))
