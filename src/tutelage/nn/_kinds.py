"""Which kinds of modules can be quantized, and how each is changed in place."""

from __future__ import annotations

from typing import Any, Literal, cast

from torch import nn

from ..quantizers import BaseQuantizer
from ._conv2d import QuantConv2d, is_patch_embedding
from ._embedding import QuantEmbedding
from ._linear import Arithmetic, QuantLinear
from ._packed import PackedConv2d, PackedEmbedding, PackedLinear
from ._subclass import looks_up_rows, multiplies

__all__ = ["ModuleKind", "kind_of", "pack_module", "quantize_module", "why_unsupported"]

ModuleKind = Literal["linear", "conv1d", "conv2d", "embedding"]
"""Kinds of modules that hold a weight."""


def kind_of(module: nn.Module) -> ModuleKind | None:
    """Returns the kind of a full-precision module, subclasses included, or ``None``.

    Args:
        module: Any module.
    """
    # Only a model of transformers is asked about, so transformers is loaded already.
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, Conv1D):
        return "conv1d"
    if isinstance(module, nn.Conv2d):
        return "conv2d"
    return "embedding" if isinstance(module, nn.Embedding) else None


def why_unsupported(module: nn.Module) -> str | None:
    """Returns why a module of a known kind cannot be quantized, ``None`` if it can.

    Args:
        module: A full-precision module.

    Returns:
        The end of a sentence that starts with the module's name.
    """
    from transformers.pytorch_utils import Conv1D

    kind, plain = kind_of(module), type(module)
    if kind == "embedding":
        if cast("nn.Embedding", module).max_norm is not None:
            return "has max_norm"
        if plain is not nn.Embedding and not looks_up_rows(cast("nn.Embedding", module)):
            return f"is a {plain.__name__}, which does not look its rows up as nn.Embedding does"
    elif kind == "conv2d":
        if not is_patch_embedding(module):
            return (
                "is a Conv2d whose stride is not its kernel, or that has padding, dilation or "
                "groups; only patch embeddings can be quantized"
            )
    elif kind == "linear" and plain is not nn.Linear and multiplies(cast("nn.Linear", module)):
        return None
    elif plain is not (nn.Linear if kind == "linear" else Conv1D):
        return f"is a {plain.__name__}, not a plain Linear, Conv1D, Conv2d or Embedding"
    return None


def quantize_module(
    module: nn.Module,
    kind: str,
    weight: nn.Module,
    input: nn.Module | None = None,
    arithmetic: Arithmetic = "integer",
) -> nn.Module:
    """Turns a full-precision module into its quantized form in place and returns it.

    Args:
        module: The module.
        kind: Its kind.
        weight: Quantizer of the weight.
        input: Quantizer of the input, or ``None``.
        arithmetic: How the product is computed.
    """
    target: Any = module
    if kind == "embedding":
        return QuantEmbedding.from_embedding(target, weight)
    if kind == "conv1d":
        from ._conv1d import QuantConv1D

        return QuantConv1D.from_conv1d(target, weight, input, arithmetic)
    if kind == "conv2d":
        return QuantConv2d.from_conv2d(target, weight, input, arithmetic)
    return QuantLinear.from_linear(target, weight, input, arithmetic)


def pack_module(
    module: nn.Module,
    kind: str,
    weight: BaseQuantizer,
    input: BaseQuantizer | None = None,
    arithmetic: Arithmetic = "integer",
    owner: nn.Module | None = None,
) -> nn.Module:
    """Turns a full-precision module into its packed form with empty buffers in place.

    Args:
        module: The module, on any device, meta included.
        kind: Its kind.
        weight: Says grid and granularity of the weight.
        input: Quantizer of the input, or ``None``.
        arithmetic: How the product is computed.
        owner: The packed module whose bytes this one uses, ``None`` for its own.

    Raises:
        ArtefactError: The owner's weight has another shape.
    """
    target: Any = module
    if kind == "embedding":
        return PackedEmbedding.from_embedding(target, weight, owner)
    if kind == "conv1d":
        return PackedLinear.from_conv1d(target, weight, input, arithmetic)
    if kind == "conv2d":
        return PackedConv2d.from_conv2d(target, weight, input, arithmetic)
    return PackedLinear.from_linear(target, weight, input, arithmetic, owner)
