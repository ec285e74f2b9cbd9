"""What an encoder block hands to the kernel that computes it whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..kernels import ACTIVATIONS, native
from ..quantizers import BaseQuantizer, UniformQuantizer, UnsignedQuantizer
from ._attention_quantizer import AttentionQuantizer
from ._layouts import BlockLayout
from ._packed import PackedLinear

__all__ = ["BlockPlan", "UnfusableError", "read_plan"]

_ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
}
"""Activation modules of torch and transformers by class."""


class UnfusableError(Exception):
    """Why a block cannot be fused, as the end of a sentence."""


@dataclass
class BlockPlan:
    """What a fused block hands to the kernel.

    Attributes:
        linears: The six packed Linears.
        panels: Their panels; other ones mean that weights were loaded since.
        tensors: Panels, scale and bias of each, then weight and bias of both norms.
        shapes: Of the weights.
        settings: Heads, width, levels and the like.
        numbers: Factor of the scores, epsilons.
        inner: Modules that are passed over, whose hooks would not run.
        attention: The attention module.
        in_tuple: Whether the block returns its output in a tuple.
    """

    linears: list[PackedLinear]
    panels: list[Tensor]
    tensors: list[Tensor]
    shapes: list[int]
    settings: list[int]
    numbers: list[float]
    inner: list[nn.Module]
    attention: nn.Module
    in_tuple: bool = False

    def is_current(self) -> bool:
        """Whether the weights are still those that were fused."""
        return all(a._panels is b for a, b in zip(self.linears, self.panels, strict=True))


def read_plan(block: nn.Module, layout: BlockLayout) -> BlockPlan:
    """Reads off a block what the kernel needs.

    Args:
        block: The block, its Linears packed.
        layout: Where its parts are.

    Raises:
        UnfusableError: The kernel does not compute such a block.
    """
    try:
        linears = [block.get_submodule(name) for name in layout.linears]
        norms = [block.get_submodule(name) for name in (layout.norm1, layout.norm2)]
        attention: Any = block.get_submodule(layout.attention)
        activation = block.get_submodule(layout.activation)
    except AttributeError as error:
        raise UnfusableError(f"it is built otherwise than expected ({error})") from None
    levels = set()
    for name, linear in zip(layout.linears, linears, strict=True):
        if not isinstance(linear, PackedLinear) or linear.levels is None:
            raise UnfusableError(f"{name!r} has no packed weight with an input scaled per token")
        levels.add(linear.levels)
    if len(levels) != 1:
        raise UnfusableError("its Linears quantize their inputs to different widths")
    for norm in norms:
        if type(norm) is not nn.LayerNorm or not {"weight", "bias"} <= set(norm.state_dict()):
            raise UnfusableError("its norms are no layer norms with weight and bias")
    function = _ACTIVATIONS.get(type(activation).__name__)
    if function is None:
        raise UnfusableError(f"its activation is {type(activation).__name__}")
    quantizer = attention._modules.get("attention_quantizer")
    if not isinstance(quantizer, AttentionQuantizer):
        raise UnfusableError("the products inside its attention are not quantized")
    packed = cast("list[PackedLinear]", linears)
    query, key, value, output, up, down = packed
    hidden, width = query.width, int(attention.scaling**-2 + 0.5)
    width = int(getattr(attention, "attention_head_size", getattr(attention, "head_dim", width)))
    if query.rows % width or {key.rows, value.rows, output.width} != {query.rows}:
        raise UnfusableError("its heads differ in width, or keys have fewer heads than queries")
    if {output.rows, up.width, down.rows, key.width, value.width} != {
        hidden
    } or up.rows != down.width:
        raise UnfusableError("its Linears do not follow each other")
    panels = [linear.panels() for linear in packed]
    tensors: list[Tensor] = []
    shapes: list[int] = []
    empty = torch.empty(0)
    for linear, of_linear in zip(packed, panels, strict=True):
        bias = linear.bias
        scale = cast("Tensor", linear.owner.weight_scale)
        tensors += [of_linear, scale, empty if bias is None else bias.detach()]
        grid = linear.grid
        shapes += [linear.rows, linear.width, grid.bits, grid.step, grid.lo]
    for norm in cast("list[nn.LayerNorm]", norms):
        tensors += [norm.weight.detach(), norm.bias.detach()]
    settings = [
        query.rows // width,
        width,
        int(layout.pre_norm),
        ACTIVATIONS[function],
        levels.pop(),
        *_attention_levels(quantizer),
        native().index,
    ]
    epsilons = [float(norm.eps) for norm in cast("list[nn.LayerNorm]", norms)]
    passed_over = [module for module in block.modules() if module is not block]
    return BlockPlan(
        packed,
        panels,
        tensors,
        shapes,
        settings,
        [float(attention.scaling), *epsilons],
        passed_over,
        attention,
    )


def _attention_levels(quantizer: AttentionQuantizer) -> list[int]:
    found = []
    signed: tuple[BaseQuantizer, ...] = (quantizer.query, quantizer.key, quantizer.value)
    for part in signed:
        if not isinstance(part, UniformQuantizer) or part.granularity != "row":
            raise UnfusableError("its queries, keys and values are not scaled per token")
        if part.clip is not None or part.reciprocal:
            raise UnfusableError(
                "its queries, keys and values are clipped or scaled by reciprocals"
            )
        found.append(part.grid.hi)
    attention_map = quantizer.attention_map
    if not isinstance(attention_map, UnsignedQuantizer) or attention_map.granularity != "row":
        raise UnfusableError("its attention maps are not quantized per query without sign")
    return [*found, attention_map.grid.hi]
