"""Which axes of a teacher's tensors count tokens, so that padding need not be stored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError, UnsupportedModelError
from ..sites import Site, SiteMap

__all__ = ["Layout", "fingerprints", "logits_layout", "real_tokens", "site_layout"]

_TOKENS = -1
_PRIME = 2654435761


@dataclass(frozen=True)
class Layout:
    """Shape of one sample's tensor of a signal; -1 stands for the sample's number of tokens.

    Attributes:
        blocks: How many tensors the signal has.
        dims: Shape of each.
    """

    blocks: int
    dims: tuple[int, ...]

    def shape(self, tokens: int) -> tuple[int, ...]:
        """Returns (blocks, *dims) for a number of tokens.

        Args:
            tokens: The sample's tokens.
        """
        return (self.blocks, *(tokens if d == _TOKENS else d for d in self.dims))

    def size(self, tokens: int) -> int:
        """Returns the number of elements.

        Args:
            tokens: The sample's tokens.
        """
        return math.prod(self.shape(tokens))

    def rows(self, tokens: int) -> int:
        """Returns the number of rows along the last dimension.

        Args:
            tokens: The sample's tokens.
        """
        return math.prod(self.shape(tokens)[:-1])

    def part(self, start: int, tokens: int) -> tuple[slice, ...]:
        """Returns which part of a padded (blocks, *dims) tensor a sample fills.

        Args:
            start: Its first real token.
            tokens: How many it has.
        """
        real = slice(start, start + tokens)
        return (slice(None), *(real if d == _TOKENS else slice(None) for d in self.dims))


def site_layout(
    site: Site, signals: Sequence[Tensor], sites: SiteMap, rows: int, tokens: int | None
) -> Layout:
    """Returns how a signal is stored.

    Args:
        site: The signal.
        signals: The teacher's tensors of one batch.
        sites: The teacher's sites.
        rows: Samples of the batch.
        tokens: Its tokens, padding included; ``None`` where every position is stored.

    Raises:
        UnsupportedModelError: The signal is not per sample, or differs between blocks.
    """
    found = set()
    for index, tensor in zip(sites.at(site), signals, strict=True):
        block = sites.blocks[index]
        if tensor.shape[0] != rows or "decoder" in (block.query_axis, block.key_axis):
            raise UnsupportedModelError(
                f"the signal {site!r} of {block.attention!r} does not count the input's samples "
                "and tokens (windows, or a decoder beside an encoder), and cannot be stored by "
                "sample; use the live teacher, or losses of the logits alone."
            )
        dims = list(tensor.shape[1:])
        if tokens is not None:
            pairs = site in ("attention_scores", "attention_map")
            if block.query_axis == "input":
                dims[-2] = _TOKENS
            if pairs and block.key_axis == "input":
                dims[-1] = _TOKENS
        found.add(tuple(dims))
    if len(found) != 1:
        raise UnsupportedModelError(
            f"the signal {site!r} has another shape in every block ({sorted(found)}), and cannot "
            "be stored; use the live teacher, or losses of the logits alone."
        )
    return Layout(len(signals), found.pop())


def logits_layout(logits: Tensor, tokens: int | None) -> Layout:
    """Returns how predictions are stored: those per token at real tokens only.

    Args:
        logits: (batch, classes), (batch, tokens, classes) or (batch, 2, tokens).
        tokens: As in ``site_layout``.
    """
    dims = list(logits.shape[1:])
    if tokens is not None and len(dims) == 2:
        if dims[0] == tokens:
            dims[0] = _TOKENS
        elif dims == [2, tokens]:
            dims[1] = _TOKENS
    return Layout(1, tuple(dims))


def real_tokens(mask: Tensor) -> list[tuple[int, int]]:
    """Returns the first real token and the number of them, for every sample.

    Args:
        mask: (batch, tokens), on the host.

    Raises:
        DataError: Real tokens of a sample do not follow one another.
    """
    found = []
    counts = mask.sum(1).tolist()
    starts = mask.long().argmax(1).tolist()
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if not bool(mask[row, start : start + count].all()):
            raise DataError(
                f"sample {row} of a batch has padding between its tokens; store it with "
                "padding='keep'."
            )
        found.append((int(start), int(count)))
    return found


def fingerprints(inputs: Mapping[str, Any], mask: Tensor | None) -> Tensor:
    """Returns a number for every sample that tells other inputs apart, however they are padded.

    Args:
        inputs: The model's inputs.
        mask: Real tokens; ``None`` where every position counts.

    Returns:
        Int64, shape (batch,), on the inputs' device.
    """
    total: Tensor | None = None
    for number, name in enumerate(sorted(inputs)):
        value = inputs[name]
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if name == "attention_mask" and mask is not None:
            value = value.sum(1, keepdim=True)
        if value.is_floating_point():
            value = value.float().contiguous().view(torch.int32)
        value = value.long()
        if mask is not None and value.shape[:2] == mask.shape:
            place = mask.long().cumsum(1) - 1
            weight = (place * 2 + 1) * _PRIME * mask
            value = value.reshape(*mask.shape, -1).sum(-1)
        else:
            value = value.reshape(len(value), -1)
            weight = torch.arange(value.shape[1], device=value.device) * (2 * _PRIME) + _PRIME
        mixed = (value + 1) * (value * 3 + _PRIME) * weight
        share = mixed.sum(1) * (2 * number + 3)
        total = share if total is None else total + share
    if total is None:
        raise DataError("a batch holds no tensor; pass the model's inputs as tensors.")
    return total
