"""Quantized modules and the quantized attention function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._attention import ATTENTION_NAME as ATTENTION_NAME
from ._attention import FUSED_ATTENTION_NAME as FUSED_ATTENTION_NAME
from ._attention import AttentionProbe as AttentionProbe
from ._attention import attention as attention
from ._attention import probe_of as probe_of
from ._attention import register_attention as register_attention
from ._attention import use_attention as use_attention
from ._attention_quantizer import AttentionQuantizer as AttentionQuantizer
from ._conv2d import QuantConv2d as QuantConv2d
from ._conv2d import is_patch_embedding as is_patch_embedding
from ._embedding import QuantEmbedding as QuantEmbedding
from ._fused import fuse as fuse
from ._fused import fused_blocks as fused_blocks
from ._kinds import ModuleKind as ModuleKind
from ._kinds import kind_of as kind_of
from ._kinds import pack_module as pack_module
from ._kinds import quantize_module as quantize_module
from ._kinds import why_unsupported as why_unsupported
from ._linear import Arithmetic as Arithmetic
from ._linear import QuantLinear as QuantLinear
from ._linear import quantized_linear as quantized_linear
from ._packed import PackedConv2d as PackedConv2d
from ._packed import PackedEmbedding as PackedEmbedding
from ._packed import PackedLinear as PackedLinear
from ._packed import PackedWeight as PackedWeight
from ._ramp import ramp_gate as ramp_gate
from ._ramp import ramped as ramped
from ._weight import QuantWeight as QuantWeight

if TYPE_CHECKING:
    from ._conv1d import QuantConv1D as QuantConv1D


def __getattr__(name: str) -> Any:
    # Its base class comes from transformers, which is loaded when used.
    if name == "QuantConv1D":
        from ._conv1d import QuantConv1D

        return QuantConv1D
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
