"""Loss terms of inner signals.

TernaryBERT (Zhang et al., arXiv 2009.12812) compares logits, hidden states and attention scores;
Teacher Intervention adds the attention output. Each term is a sum over layers of a mean squared
error; the default terms take the mean over real tokens, the reference ones over all positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..sites import Site
from ._context import BatchItems, LossValue, StepContext
from ._terms import floats, squared_error

__all__ = ["AttentionMapKL", "AttentionScores", "Relative", "SignalMSE"]

Relative = Literal["channel", "layer"]
"""What the error of a signal is relative to."""

_FLOOR = 0.01
"""Share of the mean variance that every channel's has at least: none counts more than 100 times."""

_MEAN_FLOOR = 1e-4
"""The same of the mean square, for a signal that is the same at all tokens."""

_LEAST = 1e-8
"""Variance of a signal that is zero."""


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


def _spread(signal: Tensor, mask: Tensor | None, relative: Relative) -> Tensor:
    """Returns the variance that errors are relative to, (width,) or (1,), above zero.

    Args:
        signal: The teacher's, (batch, tokens, width).
        mask: Tokens that count, (batch, tokens); ``None`` for all.
        relative: Of every channel, or their mean.
    """
    flat = signal.reshape(-1, signal.shape[-1])
    real = flat.new_ones(len(flat), 1) if mask is None else mask.reshape(-1, 1).to(flat.dtype)
    count = real.sum().clamp(min=1.0)
    mean, square = (flat * real).sum(0) / count, (flat.square() * real).sum() / count
    variance = ((flat - mean).square() * real).sum(0) / count
    average = variance.mean(0, keepdim=True)
    least = _FLOOR * average + _MEAN_FLOOR * (square / flat.shape[-1])
    spread = variance if relative == "channel" else average
    return (spread + least).clamp(min=_LEAST)


class SignalMSE:
    """Sum over blocks of the mean squared error of one signal of shape (batch, tokens, width).

    The mean is over the real tokens of the batch; see ``BatchItems.per_sample`` for the models
    whose signals do not all count the same tokens.

    A relative error is divided by the variance of the teacher's signal over the real tokens of the
    batch, ``(s - t)^2 / (var_c + 0.01 mean_c var_c)`` for ``relative="channel"``, the mean variance
    of the channels for ``relative="layer"``. A few channels of a Transformer are far larger than
    the rest and would make up the whole error; and signals of any magnitude weigh the same in every
    block. The variance is that of the micro-batch: where a step has several, or several processes,
    the loss is close to that of one large batch and not the same.
    """

    needs_labels = False

    def __init__(
        self,
        name: str,
        site: Site,
        *,
        masked: bool = True,
        embeddings: bool = False,
        relative: Relative | None = None,
    ) -> None:
        """Chooses the signal.

        Args:
            name: Key in ``step.terms``.
            site: The signal.
            masked: Mean over real tokens only; otherwise over all positions.
            embeddings: Compare the input of the first block as well.
            relative: Divide by the teacher's variance, of every channel or of the layer.

        Raises:
            ValueError: ``relative`` is something else.
        """
        if relative not in (None, "channel", "layer"):
            raise ValueError(f"relative is {relative!r}; use 'channel', 'layer' or None.")
        self.name = name
        self.site: Site = site
        self.masked = masked
        self.relative = relative
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
            counted = mask if self.masked else None
            weight, divisor = _weighing(items, counted, s.shape[:-1])
            shaped = None if weight is None else weight.to(s.dtype).unsqueeze(-1)
            if self.relative is not None:
                wide = torch.promote_types(t.dtype, torch.float32)
                inverse = _spread(t.detach().to(wide), counted, self.relative).rsqrt()
                shaped = inverse if shaped is None else shaped * inverse
            total.append(squared_error(s, t, shaped) / (s.shape[-1] * divisor))
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
            total.append(squared_error(s, t, shaped) / (s.shape[1] * divisor))
        return LossValue(torch.stack(total).sum(), self.count(items))

    def _published(
        self, own: Tensor, other: Tensor, keys: Tensor | None, items: BatchItems
    ) -> Tensor:
        weight = None if keys is None else floats(keys[:, None, None, :], own)
        everywhere = own[0, 0].numel() * own.shape[0] / items.rows if items.per_sample else 1.0
        return squared_error(own, other, weight) / (own.shape[1] * everywhere)


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
