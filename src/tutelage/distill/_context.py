"""What a loss term sees of one step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import DataError
from ..sites import Signals, Site, SiteMap

__all__ = ["BatchItems", "LossValue", "StepContext", "is_per_sample"]


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
        positions: Shape of the predictions without the classes: (batch,), (batch, tokens), or
            (batch, 2) of start and end of an answer.
        token_mask: True for real tokens of the input, (batch, tokens); ``None`` where all are real.
        prediction_mask: The same of the tokens that predictions per token belong to.
        labels: Labels of the batch where a term asked for them.
        per_sample: Whether inner signals are averaged within each sample first, and then over
            samples: where there is no mask, and where not every signal counts the same tokens
            (an encoder and a decoder).
        causal: Whether no query sees a later key.
    """

    rows: int
    positions: tuple[int, ...]
    token_mask: Bool[Tensor, "batch tokens"] | None
    prediction_mask: Bool[Tensor, "batch tokens"] | None
    labels: Tensor | None
    per_sample: bool
    causal: bool

    def predictions(self) -> Tensor | int:
        """Returns the number of predictions, at real tokens only where there is one per token."""
        mask = self.prediction_mask
        if mask is not None and self.positions == tuple(mask.shape):
            return mask.sum()
        return math.prod(self.positions)

    def real_tokens(self, *, masked: bool = True) -> Tensor | int:
        """Returns the number of real tokens, or of all positions where not ``masked``.

        Where ``per_sample``: the number of samples.
        """
        if self.token_mask is None or self.per_sample:
            return self.rows
        return self.token_mask.sum() if masked else self.token_mask.numel()

    def real_pairs(self, *, masked: bool = True) -> Tensor | int:
        """Returns the number of (query, key) pairs of real tokens, or of all positions.

        Of a causal model, pairs with a later key do not count unless ``masked`` is false. Where
        ``per_sample``: the number of samples.
        """
        if self.token_mask is None or self.per_sample:
            return self.rows
        if not masked:
            return self.token_mask.numel() * self.token_mask.shape[1]
        tokens = self.token_mask.sum(-1)
        return (tokens * (tokens + 1) // 2 if self.causal else tokens.square()).sum()


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
        decoder_mask: True for real tokens of a decoder beside an encoder; ``None`` where there is
            none, or all are real.
        token_ids: Tokens that predictions per token follow, (batch, tokens): a prediction at t is
            of the token at t + 1.
        sites: The model's sites; ``None`` where every signal counts the input's tokens.
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
    decoder_mask: Bool[Tensor, "batch tokens"] | None = None
    token_ids: Int[Tensor, "batch tokens"] | None = None
    sites: SiteMap | None = None

    @property
    def items(self) -> BatchItems:
        """What there is to count in the batch."""
        return BatchItems(
            rows=self.student_logits.shape[0],
            positions=tuple(self.student_logits.shape[:-1]),
            token_mask=self.token_mask,
            prediction_mask=self.token_mask if self.decoder_mask is None else self.decoder_mask,
            labels=self.labels,
            per_sample=is_per_sample(self.sites, self.token_mask),
            causal=self.sites is not None and self.sites.causal,
        )

    def masks(self, site: Site, *, keys: bool = False) -> tuple[Tensor | None, ...]:
        """Returns which positions of every tensor of a signal are real.

        Args:
            site: The signal.
            keys: Of its keys in place of its queries (or tokens).

        Returns:
            One mask, (batch, positions), for each tensor; ``None`` where all are real.

        Raises:
            DataError: A signal has more or fewer positions than its mask.
        """
        found = self.student[site]
        if self.sites is None:
            masks = [self.token_mask] * len(found)
        else:
            blocks = [self.sites.blocks[index] for index in self.sites.at(site)]
            known = {"input": self.token_mask, "decoder": self.decoder_mask, None: None}
            masks = [known[b.key_axis if keys else b.query_axis] for b in blocks]
        for mask, signal in zip(masks, found, strict=True):
            positions = signal.shape[-1 if keys else -2]
            if mask is not None and mask.shape[1] != positions:
                raise DataError(
                    f"the signal {site!r} has {positions} positions, the batch's mask "
                    f"{mask.shape[1]}; a model must neither add nor drop tokens."
                )
        return tuple(masks)

    def causal_blocks(self) -> tuple[bool, ...]:
        """Returns, for every tensor of the attention scores, whether no query sees a later key."""
        if self.sites is None:
            return (False,) * len(self.student["attention_scores"])
        return tuple(self.sites.blocks[i].causal for i in self.sites.at("attention_scores"))


def is_per_sample(sites: SiteMap | None, token_mask: Tensor | None) -> bool:
    """Whether signals are averaged within each sample first, see ``BatchItems``.

    Args:
        sites: The model's sites.
        token_mask: Real tokens of the input.
    """
    if token_mask is None:
        return True
    blocks = () if sites is None else sites.blocks
    return any(b.query_axis != "input" or b.key_axis != "input" for b in blocks)
