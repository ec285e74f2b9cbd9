"""Attention in one operator, for engines that run it faster than its parts."""

from __future__ import annotations

from torch import nn

from ..nn import ATTENTION_NAME, FUSED_ATTENTION_NAME, register_attention

__all__ = ["fuse_attention"]


def fuse_attention(model: nn.Module) -> None:
    """Computes attention that is not quantized by ``torch.scaled_dot_product_attention``.

    The mask stays the additive one of the student: with transformers' own boolean masks a row
    without any key becomes NaN, and from there the whole sentence.

    Args:
        model: A model that ``use_attention`` keeps.
    """
    register_attention()
    for module in model.modules():
        pending = [module.__dict__["config"]] if "config" in module.__dict__ else []
        while pending:
            config = pending.pop()
            if config._attn_implementation_internal == ATTENTION_NAME:
                config._attn_implementation_internal = FUSED_ATTENTION_NAME
            parts = (getattr(config, key, None) for key in config.sub_configs)
            pending.extend(part for part in parts if part is not None)
