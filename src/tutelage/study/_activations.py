"""Ranges of the activations of student and teacher, and which codes they use."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from ..distill._items import read_inputs
from ..errors import StudyError
from ..nn import AttentionQuantizer, probe_of, use_attention
from ..quantizers import BaseQuantizer, Quantized
from ..sites import BlockSites, discover
from ._layers import _tokens

__all__ = ["ACTIVATIONS", "ActivationRange", "Range", "activation_ranges"]

ACTIVATIONS = (
    "input",
    "query",
    "key",
    "value",
    "attention_map",
    "context",
    "ffn_input",
    "ffn_hidden",
)
"""Sites by name: inputs of the query projection, of the two products inside attention (Q, K, V and
the attention map), of the output projection, and of the first and last feed-forward Linear."""

_SHIFT = 16
_BINS = 1 << (31 - _SHIFT)
_TAIL = 0.999


@dataclass(frozen=True)
class Range:
    """Magnitudes of an activation over real tokens.

    Of an attention map: over real queries and the keys that each of them may see.

    Attributes:
        largest: The largest.
        percentile: The 99.9th percentile, to half a percent of itself.
    """

    largest: float
    percentile: float


@dataclass(frozen=True)
class ActivationRange:
    """One site of one block.

    Attributes:
        block: Name of the block; calls of a block that is shared count together.
        site: One of ``ACTIVATIONS``.
        teacher: Its range in the teacher.
        student: In the student, before it is quantized.
        zeros: Share of the student's codes that are zero; ``None`` where it is not quantized.
        used: Share of the grid's codes that occur at all.
        levels: Number of codes of the grid.
    """

    block: str
    site: str
    teacher: Range
    student: Range
    zeros: float | None
    used: float | None
    levels: int | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


class _Seen:
    """Magnitudes and codes of one site over batches.

    The magnitudes are counted by the upper half of their float32, which orders as they do: 2^7 bins
    an octave.
    """

    def __init__(self) -> None:
        self.largest, self.count = 0.0, 0
        self.bins = torch.zeros(_BINS, dtype=torch.int64)
        self.zeros, self.codes = 0, 0
        self.occurring: Tensor | None = None

    def add(self, values: Tensor, quantized: Quantized | None, quantizer: Any) -> None:
        sizes = values.detach().float().abs().reshape(-1).cpu()
        self.largest = max(self.largest, float(sizes.max()) if len(sizes) else 0.0)
        self.count += len(sizes)
        places = sizes.view(torch.int32) >> _SHIFT
        self.bins += torch.bincount(places, minlength=_BINS)
        if quantized is None:
            return
        grid = quantizer.grid
        index = ((quantized.codes.float() - grid.lo) / grid.step).long().reshape(-1).cpu()
        found = torch.bincount(index, minlength=grid.levels)
        self.zeros += int((quantized.codes == 0).sum())
        self.codes += len(index)
        self.occurring = found if self.occurring is None else self.occurring + found

    def range(self) -> Range:
        if not self.count:
            return Range(0.0, 0.0)
        reached = self.bins.cumsum(0) >= _TAIL * self.count
        place = int(reached.int().argmax())
        edges = torch.tensor([place << _SHIFT, (place + 1) << _SHIFT], dtype=torch.int32)
        low, high = edges.view(torch.float32).tolist()
        return Range(self.largest, min((low + high) / 2, self.largest) if low else 0.0)


class _Watch:
    """The hooks of one model."""

    def __init__(self, model: nn.Module, quantized: bool) -> None:
        self._model, self._quantized = model, quantized
        self.found: dict[tuple[str, str], _Seen] = {}
        self.masks: dict[Any, Tensor | None] = {}

    @contextlib.contextmanager
    def on(self, blocks: Iterable[BlockSites]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for block in blocks:
                linears = {"input": block.query, "context": block.output}
                if block.ffn:
                    linears |= {"ffn_input": block.ffn[0], "ffn_hidden": block.ffn[-1]}
                for site, name in linears.items():
                    module = self._model.get_submodule(name)
                    hook = self._hook(block, site, module)
                    handle = module.register_forward_pre_hook(hook)
                    stack.callback(handle.remove)
                if block.interface:
                    module = self._model.get_submodule(block.attention)
                    stack.enter_context(probe_of(module, _Inside(self, block, module)))
            yield

    def _hook(self, block: BlockSites, site: str, module: nn.Module) -> Any:
        def run(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            quantizer = getattr(module, "input_quantizer", None) if self._quantized else None
            self.see(block, site, args[0], quantizer, self.masks[block.query_axis])

        return run

    def see(
        self, block: BlockSites, site: str, x: Tensor, quantizer: Any, mask: Tensor | None
    ) -> None:
        quantized = None if quantizer is None else quantizer.quantize(x)
        if quantized is not None:
            quantized = Quantized(_counted(quantized.codes, mask), quantized.scale)
        key = (block.attention, site)
        self.found.setdefault(key, _Seen()).add(_counted(x, mask), quantized, quantizer)


class _Inside:
    """Sees the products inside one attention module."""

    def __init__(self, watch: _Watch, block: BlockSites, module: nn.Module) -> None:
        found = module._modules.get("attention_quantizer")
        self._watch, self._block = watch, block
        self._quantizer = cast("AttentionQuantizer | None", found)
        self._key_scale: Tensor | None = None
        self._seen: Tensor | None = None

    def _of(self, name: str) -> BaseQuantizer | None:
        return None if self._quantizer is None else getattr(self._quantizer, name)

    def inputs(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        masks = self._watch.masks
        queries, keys = masks[self._block.query_axis], masks[self._block.key_axis]
        self._seen = _pairs(query, key, mask, queries, keys)
        self._watch.see(self._block, "query", query, self._of("query"), queries)
        self._watch.see(self._block, "key", key, self._of("key"), keys)
        self._watch.see(self._block, "value", value, self._of("value"), keys)
        quantizer, self._key_scale = self._of("value"), None
        if quantizer is not None and quantizer.granularity == "row":
            scale = quantizer.quantize(value).scale.transpose(-1, -2)
            self._key_scale = scale.repeat_interleave(query.shape[1] // value.shape[1], dim=1)

    def scores(self, scores: Tensor) -> None:
        pass

    def attention_map(self, attention_map: Tensor) -> Tensor:
        # The student rounds its map with the scales of the values in it.
        scale = self._key_scale
        x = attention_map if scale is None else attention_map * scale
        self._watch.see(self._block, "attention_map", x, self._of("attention_map"), self._seen)
        return attention_map


def _pairs(
    query: Tensor, key: Tensor, mask: Tensor | None, queries: Tensor | None, keys: Tensor | None
) -> Bool[Tensor, "batch heads queries keys"]:
    """Returns which entries of an attention map count: of real queries, for keys they may see.

    Args:
        query: (batch, heads, queries, width).
        key: (batch, heads, keys, width).
        mask: What is added to the scores; the least number of its precision hides a key.
        queries: Real queries, (batch, queries), where some are not.
        keys: The same of the keys.
    """
    shape = (*query.shape[:3], key.shape[2])
    seen = torch.ones(shape, dtype=torch.bool, device=query.device)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)
    if queries is not None and queries.shape == (shape[0], shape[2]):
        seen = seen & queries[:, None, :, None]
    if keys is not None and keys.shape == (shape[0], shape[3]):
        seen = seen & keys[:, None, None, :]
    return seen


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the real tokens, or the entries of an attention map that a mask of pairs leaves.

    Heads, (batch, heads, tokens, width), become features.
    """
    if mask is not None and mask.dim() == 4:
        return x[mask]
    return _tokens(x.transpose(1, 2).flatten(2) if x.dim() == 4 else x, mask)


def activation_ranges(
    student: nn.Module, teacher: nn.Module, batches: Iterable[Mapping[str, Any]]
) -> list[ActivationRange]:
    """Measures the activations that a scheme quantizes, in student and teacher.

    Where V has a scale for each token, the student's attention map holds those scales, as it does
    when it is rounded, so that its range is not the teacher's.

    Args:
        student: A prepared or a packed model, in eval mode.
        teacher: The full-precision model of the same structure, in eval mode.
        batches: Inputs of the models; ``labels`` are not used. At least one.

    Returns:
        Blocks in order, sites in the order of ``ACTIVATIONS``.

    Raises:
        StudyError: There is no batch.
    """
    blocks = list({block.attention: block for block in discover(teacher).blocks}.values())
    own, other = _Watch(student, True), _Watch(teacher, False)
    with own.on(blocks), other.on(blocks):
        for batch in batches:
            given = read_inputs({k: v for k, v in batch.items() if k != "labels"}, teacher)
            masks = {"input": given.token_mask, "decoder": given.decoder_mask, None: None}
            for watch, model in ((own, student), (other, teacher)):
                watch.masks = masks
                with torch.no_grad(), use_attention(model):
                    model(**given.inputs)
    if not own.found:
        raise StudyError("there is no batch to measure activations of; give at least one.")
    return [
        _range(block, site, own.found[block.attention, site], other.found[block.attention, site])
        for block in blocks
        for site in ACTIVATIONS
        if (block.attention, site) in own.found
    ]


def _range(block: BlockSites, site: str, own: _Seen, other: _Seen) -> ActivationRange:
    codes, levels = own.occurring, None if own.occurring is None else len(own.occurring)
    return ActivationRange(
        block=block.block,
        site=site,
        teacher=other.range(),
        student=own.range(),
        zeros=None if codes is None else own.zeros / max(own.codes, 1),
        used=None if codes is None or not levels else int((codes > 0).sum()) / levels,
        levels=levels,
    )
