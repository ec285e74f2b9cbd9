"""Loss terms of knowledge distillation.

TernaryBERT (Zhang et al., arXiv 2009.12812) compares logits, hidden states and attention scores;
Teacher Intervention adds the attention output. Each term is a sum over layers of a mean squared
error; the default terms take the mean over real tokens, the reference ones over all positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import DataError
from ..sites import Site
from ._context import BatchItems, LossValue, StepContext

__all__ = [
    "AttentionMapKL",
    "AttentionScores",
    "LabelCrossEntropy",
    "Logits",
    "LossTerm",
    "SignalMSE",
]


@runtime_checkable
class LossTerm(Protocol):
    """One thing that is penalised.

    Attributes:
        name: Key in ``step.terms``.
        requires: Sites that must be recorded in student and teacher.
        needs_labels: Whether labels of the batch are used.
    """

    @property
    def name(self) -> str:
        """Key in ``step.terms``."""
        ...

    @property
    def requires(self) -> tuple[Site, ...]:
        """Sites to record."""
        ...

    @property
    def needs_labels(self) -> bool:
        """Whether labels are used."""
        ...

    def count(self, items: BatchItems) -> Tensor | int:
        """Returns the number of items in a batch, without its values: the count of the result."""
        ...

    def __call__(self, context: StepContext) -> LossValue:
        """Returns sum and count."""
        ...


class _SquaredError(torch.autograd.Function):
    """Sum of squared differences under a mask, with one buffer for forward and backward."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
        difference = own - other
        if mask is not None:
            difference.mul_(mask)
        ctx.save_for_backward(difference)
        flat = difference.reshape(-1)
        return torch.dot(flat, flat)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (difference,) = ctx.saved_tensors
        return difference * (2.0 * grads[0]), None, None


def _squared_error(own: Tensor, other: Tensor, mask: Tensor | None) -> Tensor:
    return cast("Tensor", _SquaredError.apply(own, other.detach(), mask))


def _floats(mask: Bool[Tensor, "..."], like: Tensor) -> Tensor:
    return mask.to(like.dtype)


def _over_tokens(logits: Tensor, tokens: Bool[Tensor, "batch tokens"]) -> bool:
    """Returns whether logits are (batch, 2, tokens), start and end of an answer."""
    batch, length = tokens.shape
    return logits.shape == (batch, 2, length) and length != 2


def _real_tokens(logits: Tensor, tokens: Bool[Tensor, "batch tokens"]) -> Tensor:
    # The least finite number, not -inf: 0 * (log p_T - log p_S) stays 0 there.
    return logits.masked_fill(~tokens.unsqueeze(1), torch.finfo(logits.dtype).min)


def _weighing(
    items: BatchItems, mask: Tensor | None, shape: Sequence[int]
) -> tuple[Tensor | None, float]:
    """Returns what differences are multiplied by, and what the sum of their squares is divided by.

    Args:
        items: The batch's items.
        mask: Positions that count, of ``shape``; ``None`` for all.
        shape: (batch or windows, positions...).
    """
    if not items.per_sample:
        return mask, 1.0
    if mask is None:
        return None, math.prod(shape) / items.rows
    counted = mask.reshape(mask.shape[0], -1).sum(1).clamp(min=1)
    roots = counted.to(torch.float32).rsqrt().reshape(-1, *[1] * (mask.dim() - 1))
    return mask * roots, 1.0


def _pairs(
    scores: Tensor, queries: Tensor | None, keys: Tensor | None, causal: bool
) -> Tensor | None:
    """Returns which (query, key) pairs count, (batch, queries, keys); ``None`` for all."""
    batch, rows, columns = scores.shape[0], scores.shape[-2], scores.shape[-1]
    if queries is None and keys is None and not causal:
        return None
    mask = torch.ones(batch, rows, columns, dtype=torch.bool, device=scores.device)
    if queries is not None:
        mask = mask & queries[:, :, None]
    if keys is not None:
        mask = mask & keys[:, None, :]
    return mask.tril() if causal else mask


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
            mask = None if tokens is None else _floats(tokens, student).unsqueeze(-1)
            return LossValue(_squared_error(student, teacher, mask) / student.shape[-1], count)
        log_student = torch.log_softmax(student, dim=-1)
        log_teacher = torch.log_softmax(teacher, dim=-1)
        target = log_teacher.exp()
        each = target * log_student if self.entropy else target * (log_student - log_teacher)
        each = each.sum(-1)
        return LossValue(-(each if tokens is None else each * _floats(tokens, each)).sum(), count)


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
            return LossValue(_squared_error(logits, target, None), self.count(context.items))
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


class SignalMSE:
    """Sum over blocks of the mean squared error of one signal of shape (batch, tokens, width).

    The mean is over the real tokens of the batch; see ``BatchItems.per_sample`` for the models
    whose signals do not all count the same tokens.
    """

    needs_labels = False

    def __init__(
        self, name: str, site: Site, *, masked: bool = True, embeddings: bool = False
    ) -> None:
        """Chooses the signal.

        Args:
            name: Key in ``step.terms``.
            site: The signal.
            masked: Mean over real tokens only; otherwise over all positions.
            embeddings: Compare the input of the first block as well.
        """
        self.name = name
        self.site: Site = site
        self.masked = masked
        self.requires: tuple[Site, ...] = ("embeddings", site) if embeddings else (site,)

    def count(self, items: BatchItems) -> Tensor | int:
        """Returns the number of tokens."""
        return items.real_tokens(masked=self.masked)

    def __call__(self, context: StepContext) -> LossValue:
        """Returns the sum over blocks and tokens of the mean over the width, and the tokens."""
        own = [t for site in self.requires for t in context.student[site]]
        other = [t for site in self.requires for t in context.teacher[site]]
        masks = [m for site in self.requires for m in context.masks(site)]
        items, total = context.items, []
        for s, t, mask in zip(own, other, masks, strict=True):
            weight, divisor = _weighing(items, mask if self.masked else None, s.shape[:-1])
            shaped = None if weight is None else weight.to(s.dtype).unsqueeze(-1)
            total.append(_squared_error(s, t, shaped) / (s.shape[-1] * divisor))
        return LossValue(torch.stack(total).sum(), self.count(items))


class AttentionScores:
    """Sum over blocks of the mean squared error of the attention scores.

    By default the mean over pairs of a real query and a real key. ``masked=False`` is the
    published rule: scores of padded keys, and any score at or below -100, count as zero, and the
    mean runs over all positions.
    """

    name = "attention_scores"
    requires: tuple[Site, ...] = ("attention_scores",)
    needs_labels = False

    def __init__(self, *, masked: bool = True) -> None:
        """Chooses the mean.

        Args:
            masked: Mean over real pairs only.
        """
        self.masked = masked

    def count(self, items: BatchItems) -> Tensor | int:
        """Returns the number of pairs of a query and a key."""
        return items.real_pairs(masked=self.masked)

    def __call__(self, context: StepContext) -> LossValue:
        """Returns the sum over blocks and pairs of the mean over the heads, and the pairs."""
        own, other = context.student["attention_scores"], context.teacher["attention_scores"]
        items, total = context.items, []
        queries = context.masks("attention_scores")
        keys = context.masks("attention_scores", keys=True)
        blocks = context.causal_blocks()
        for s, t, q, k, causal in zip(own, other, queries, keys, blocks, strict=True):
            if not self.masked:
                s, t = s.masked_fill(s <= -100.0, 0.0), t.masked_fill(t <= -100.0, 0.0)
                total.append(self._published(s, t, k, items))
                continue
            pairs = _pairs(s, q, k, causal)
            weight, divisor = _weighing(items, pairs, (s.shape[0], *s.shape[-2:]))
            shaped = None if weight is None else weight.to(s.dtype).unsqueeze(-3)
            total.append(_squared_error(s, t, shaped) / (s.shape[1] * divisor))
        return LossValue(torch.stack(total).sum(), self.count(items))

    def _published(
        self, own: Tensor, other: Tensor, keys: Tensor | None, items: BatchItems
    ) -> Tensor:
        weight = None if keys is None else _floats(keys[:, None, None, :], own)
        everywhere = own[0, 0].numel() * own.shape[0] / items.rows if items.per_sample else 1.0
        return _squared_error(own, other, weight) / (own.shape[1] * everywhere)


class AttentionMapKL:
    """Sum over blocks of KL(P_T || P_S) of the attention maps, mean over heads and real queries.

    The map loss of Kim et al., EMNLP 2022 (arXiv 2211.11014); probabilities below 1e-8 are
    clamped.
    """

    name = "attention_map"
    requires: tuple[Site, ...] = ("attention_map",)
    needs_labels = False

    def count(self, items: BatchItems) -> Tensor | int:
        """Returns the number of queries."""
        return items.real_tokens()

    def __call__(self, context: StepContext) -> LossValue:
        """Returns the sum over blocks and queries of the mean over the heads, and the queries."""
        own, other = context.student["attention_map"], context.teacher["attention_map"]
        items, total = context.items, []
        for s, t, mask in zip(own, other, context.masks("attention_map"), strict=True):
            t = t.clamp(min=1e-8)
            divergence = (t * (t.log() - s.clamp(min=1e-8).log())).sum(-1).mean(1)
            weight, divisor = _weighing(items, mask, divergence.shape)
            if weight is not None:
                # _weighing is for squared errors, whose difference it multiplies.
                divergence = divergence * weight.to(divergence.dtype).square()
            total.append(divergence.sum() / divisor)
        return LossValue(torch.stack(total).sum(), self.count(items))
