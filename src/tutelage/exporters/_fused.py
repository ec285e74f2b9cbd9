"""Attention in one operator, for engines that run it faster than its parts."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from ..nn import ATTENTION_NAME, attention
from ..nn._attention import _additive_mask

__all__ = ["fuse_attention"]

_NAME = "tutelage_fused"
_IN_PARTS = ("position_bias", "softcap", "s_aux", "sinks", "head_mask")


def _fused(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch kv_heads keys width"],
    value: Float[Tensor, "batch kv_heads keys width"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    quantized = "attention_quantizer" in module._modules
    if quantized or any(kwargs.get(name) is not None for name in _IN_PARTS):
        return attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    context = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling
    )
    return context.transpose(1, 2).contiguous(), None


def fuse_attention(model: nn.Module) -> None:
    """Computes attention that is not quantized by ``torch.scaled_dot_product_attention``.

    The mask stays the additive one of the student: with transformers' own boolean masks a row
    without any key becomes NaN, and from there the whole sentence.

    Args:
        model: A model that ``use_attention`` keeps.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _fused)
    AttentionMaskInterface.register(_NAME, _additive_mask)
    for module in model.modules():
        pending = [module.__dict__["config"]] if "config" in module.__dict__ else []
        while pending:
            config = pending.pop()
            if config._attn_implementation_internal == ATTENTION_NAME:
                config._attn_implementation_internal = _NAME
            parts = (getattr(config, key, None) for key in config.sub_configs)
            pending.extend(part for part in parts if part is not None)
