"""Loss terms of knowledge distillation.

TernaryBERT (Zhang et al., arXiv 2009.12812) compares logits, hidden states and attention scores;
Teacher Intervention adds the attention output. Each term is a sum over layers of a mean squared
error; the default terms take the mean over real tokens, the reference ones over all positions.
"""

from __future__ import annotations

from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import DataError
from ..sites import Site
from ._context import LossValue, StepContext

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

    def __call__(self, context: StepContext) -> LossValue:
        """Returns the sum over the predictions and their number."""
        student, teacher = context.student_logits.float(), context.teacher_logits.float()
        tokens = context.token_mask
        if tokens is not None and _over_tokens(student, tokens):
            student, teacher = _real_tokens(student, tokens), _real_tokens(teacher, tokens)
        if tokens is not None and student.shape[:-1] != tokens.shape:
            tokens = None
        count = student.shape[:-1].numel() if tokens is None else tokens.sum()
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

    def __call__(self, context: StepContext) -> LossValue:
        """Returns the sum over the labels and their number."""
        labels, tokens = context.labels, context.token_mask
        if labels is None:
            raise DataError("the loss term 'labels' needs 'labels' in every batch.")
        logits = context.student_logits.float()
        if logits.shape[-1] == 1:
            target = labels.reshape(logits.shape).to(logits.dtype)
            return LossValue(_squared_error(logits, target, None), logits.numel())
        if tokens is not None and _over_tokens(logits, tokens):
            logits = _real_tokens(logits, tokens)
        elif logits.dim() == 3 and labels.shape == logits.shape[:2]:
            if self.shift is None:
                raise DataError(
                    "the loss term 'labels' cannot tell whether a label is of its own token or of "
                    "the one before; use LabelCrossEntropy(shift=True) for a causal language "
                    "model, else LabelCrossEntropy(shift=False)."
                )
            if self.shift:
                logits, labels = logits[:, :-1], labels[:, 1:]
        if logits.dim() == 2:
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            return LossValue(loss, logits.shape[0])
        flat, target = logits.flatten(0, -2), labels.flatten()
        loss = torch.nn.functional.cross_entropy(flat, target, reduction="sum")
        return LossValue(loss, (target != -100).sum())


class SignalMSE:
    """Sum over blocks of the mean squared error of one signal of shape (batch, tokens, width)."""

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

    def __call__(self, context: StepContext) -> LossValue:
        """Returns the sum over blocks and tokens of the mean over the width, and the tokens."""
        own = [t for site in self.requires for t in context.student[site]]
        other = [t for site in self.requires for t in context.teacher[site]]
        token_mask = context.token_mask if self.masked else None
        mask = None if token_mask is None else _floats(token_mask, own[0]).unsqueeze(-1)
        total = torch.stack(
            [_squared_error(s, t, mask) / s.shape[-1] for s, t in zip(own, other, strict=True)]
        ).sum()
        count = own[0].shape[:-1].numel() if token_mask is None else token_mask.sum()
        return LossValue(total, count)


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

    def __call__(self, context: StepContext) -> LossValue:
        """Returns the sum over blocks and pairs of the mean over the heads, and the pairs."""
        own, other = context.student["attention_scores"], context.teacher["attention_scores"]
        tokens, mask = context.token_mask, None
        pairs: Tensor | int = own[0].shape[0] * own[0].shape[-2] * own[0].shape[-1]
        if tokens is not None:
            mask = _floats(tokens[:, None, None, :], own[0])
            if self.masked:
                mask = mask * _floats(tokens[:, None, :, None], own[0])
                pairs = mask.sum()
        total = []
        for s, t in zip(own, other, strict=True):
            if not self.masked:
                s, t = s.masked_fill(s <= -100.0, 0.0), t.masked_fill(t <= -100.0, 0.0)
            total.append(_squared_error(s, t, mask) / s.shape[1])
        return LossValue(torch.stack(total).sum(), pairs)


class AttentionMapKL:
    """Sum over blocks of KL(P_T || P_S) of the attention maps, mean over heads and real queries.

    The map loss of Kim et al., EMNLP 2022 (arXiv 2211.11014); probabilities below 1e-8 are
    clamped.
    """

    name = "attention_map"
    requires: tuple[Site, ...] = ("attention_map",)
    needs_labels = False

    def __call__(self, context: StepContext) -> LossValue:
        """Returns the sum over blocks and queries of the mean over the heads, and the queries."""
        own, other = context.student["attention_map"], context.teacher["attention_map"]
        tokens = context.token_mask
        total = []
        for s, t in zip(own, other, strict=True):
            t = t.clamp(min=1e-8)
            divergence = (t * (t.log() - s.clamp(min=1e-8).log())).sum(-1).mean(1)
            if tokens is not None:
                divergence = divergence * _floats(tokens, divergence)
            total.append(divergence.sum())
        count = own[0].shape[0] * own[0].shape[-2] if tokens is None else tokens.sum()
        return LossValue(torch.stack(total).sum(), count)
