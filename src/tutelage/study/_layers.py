"""How far a student's inner signals are from its teacher's, block by block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..distill._items import read_inputs
from ..errors import StudyError
from ..nn import use_attention
from ..sites import Signals, Site, SiteMap, Tap, discover

__all__ = ["BlockError", "SignalError", "block_errors"]

_SIGNALS: tuple[Site, ...] = ("context", "attention_output", "ffn_input", "block_output")


@dataclass(frozen=True)
class SignalError:
    """A signal of the student beside the teacher's, over real tokens.

    Attributes:
        mse: Mean squared error over tokens and features.
        relative: Squared error over the teacher's squared norm, each summed over all tokens.
        cosine: Mean over tokens of the cosine between the two vectors.
    """

    mse: float
    relative: float
    cosine: float


@dataclass(frozen=True)
class BlockError:
    """Errors of one attention block.

    Attributes:
        block: Name of the module.
        signals: Errors by site; those that the block has.
        attention_kl: KL(teacher || student) of the attention maps, one number a head, in nats:
            mean over real queries. Empty where the map is out of reach.
    """

    block: str
    signals: dict[str, SignalError]
    attention_kl: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


class _Sums:
    """Sums over batches for one signal, in float64."""

    def __init__(self) -> None:
        self.squares = self.norm = self.cosine = 0.0
        self.tokens = self.numbers = 0

    def add(self, own: Tensor, other: Tensor, mask: Tensor | None) -> None:
        own, other = (_tokens(tensor.double(), mask) for tensor in (own, other))
        self.squares += float((own - other).square().sum())
        self.norm += float(other.square().sum())
        self.cosine += float(torch.cosine_similarity(own, other, dim=-1).sum())
        self.tokens += len(own)
        self.numbers += own.numel()

    def error(self) -> SignalError:
        return SignalError(
            self.squares / self.numbers,
            self.squares / self.norm if self.norm else 0.0,
            self.cosine / self.tokens,
        )


def _tokens(tensor: Tensor, mask: Tensor | None) -> Float[Tensor, "tokens features"]:
    fits = mask is not None and mask.shape == tensor.shape[:-1]
    return tensor[mask] if fits else tensor.reshape(-1, tensor.shape[-1])


def _divergence(
    own: Tensor, other: Tensor, mask: Tensor | None
) -> tuple[Float[Tensor, " heads"], int]:
    """Returns the sum over real queries of KL(other || own) for every head, and their number."""
    p, q = other.double(), own.double().clamp(min=1e-12)
    rows = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - q.log()), 0.0).sum(-1)
    rows = rows.transpose(0, 1).flatten(1)
    if mask is not None and mask.numel() == rows.shape[1]:
        rows = rows[:, mask.flatten()]
    return rows.sum(1), rows.shape[1]


def block_errors(
    student: nn.Module, teacher: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> list[BlockError]:
    """Compares the signals inside a student with its teacher's, with no intervention.

    Args:
        student: A prepared or a packed model, in eval mode.
        teacher: The full-precision model of the same structure, in eval mode.
        batches: Inputs of the models; ``labels`` are not used. At least one.

    Raises:
        StudyError: There is no batch.
        SiteError: A signal of the student is out of reach.
    """
    sites = discover(teacher)
    wanted = {s for s in _SIGNALS if any(block.has(s) for block in sites.blocks)}
    maps = all(block.has("attention_map") for block in sites.blocks)
    if maps:
        wanted.add("attention_map")
    sums: dict[tuple[str, int], _Sums] = {}
    heads: dict[int, tuple[Tensor, int]] = {}
    seen = False
    for batch in batches:
        seen = True
        given = read_inputs({k: v for k, v in batch.items() if k != "labels"}, teacher)
        masks = {"input": given.token_mask, "decoder": given.decoder_mask, None: None}
        own, other = (_signals(m, sites, wanted, given.inputs) for m in (student, teacher))
        for site in wanted:
            for index, s, t in zip(sites.at(site), own[site], other[site], strict=True):
                mask = masks[sites.blocks[index].query_axis]
                if site == "attention_map":
                    total, count = _divergence(s, t, mask)
                    before = heads.get(index, (torch.zeros_like(total), 0))
                    heads[index] = (before[0] + total, before[1] + count)
                else:
                    sums.setdefault((site, index), _Sums()).add(s, t, mask)
    if not seen:
        raise StudyError("there is no batch to compare the models on; give at least one.")
    return [
        BlockError(
            block=block.block,
            signals={s: sums[s, index].error() for s in _SIGNALS if (s, index) in sums},
            attention_kl=tuple((heads[index][0] / heads[index][1]).tolist()) if maps else (),
        )
        for index, block in enumerate(sites.blocks)
    ]


def _signals(
    model: nn.Module, sites: SiteMap, wanted: set[Site], inputs: dict[str, Any]
) -> Signals:
    with torch.no_grad(), use_attention(model), Tap(model, sites, wanted) as tap:
        model(**inputs)
    return tap.signals()
