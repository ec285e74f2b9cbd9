"""The attention function: where products may be quantized and signals can be seen.

It is registered with transformers under the name ``"tutelage"`` together with its mask function;
without the latter transformers hands over no mask and padding is ignored in silence. State lives
on the attention module: an optional ``attention_quantizer`` child, and, while a step runs, a probe.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..errors import UnsupportedModelError, not_of_transformers
from ._attention_quantizer import AttentionQuantizer

__all__ = [
    "ATTENTION_NAME",
    "FUSED_ATTENTION_NAME",
    "AttentionProbe",
    "attention",
    "fused_attention",
    "probe_of",
    "register_attention",
    "use_attention",
]

ATTENTION_NAME = "tutelage"
FUSED_ATTENTION_NAME = "tutelage_fused"
_PROBE = "_tutelage_probe"
_UNSUPPORTED = ("s_aux", "sinks", "head_mask")
_IN_PARTS = (*_UNSUPPORTED, "position_bias", "softcap")


class AttentionProbe(Protocol):
    """Sees, and may replace, the signals inside one attention call."""

    def inputs(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        """Receives query, key and value, each (batch, heads, tokens, width), and the mask."""
        ...

    def scores(self, scores: Tensor) -> None:
        """Receives the scaled scores before the mask, (batch, heads, queries, keys)."""
        ...

    def attention_map(self, attention_map: Tensor) -> Tensor:
        """Receives the softmax output before dropout and returns what is used in its place."""
        ...


def _repeat(states: Tensor, heads: int) -> Tensor:
    groups = heads // states.shape[1]
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch kv_heads keys width"],
    value: Float[Tensor, "batch kv_heads keys width"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch queries heads width"], Float[Tensor, "batch heads queries keys"]]:
    """Eager attention with optional quantization and probing; transformers calls it.

    Args:
        module: The attention module; carries ``attention_quantizer`` where it is quantized.
        query: Queries.
        key: Keys; fewer heads than queries are repeated.
        value: Values.
        attention_mask: Additive mask that broadcasts against the scores, or ``None``.
        scaling: Factor of the scores, by default 1 / sqrt(width).
        dropout: Probability with which entries of the attention map are dropped.
        **kwargs: What transformers passes along; ``position_bias`` is added to the scores, and
            ``softcap`` c makes them c tanh(scores / c).

    Returns:
        The context and the attention map that was used.

    Raises:
        UnsupportedModelError: The model asks for something this function does not compute.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise UnsupportedModelError(
                f"{type(module).__name__} passes {name!r} to its attention function, which the "
                "quantized attention does not compute; use another model."
            )
    probe: AttentionProbe | None = getattr(module, _PROBE, None)
    quantizer = cast("AttentionQuantizer | None", module._modules.get("attention_quantizer"))
    if probe is not None:
        probe.inputs(query, key, value, attention_mask)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    key, value = _repeat(key, query.shape[1]), _repeat(value, query.shape[1])
    if quantizer is None:
        scores = torch.matmul(query, key.transpose(-1, -2)) * scaling
    else:
        scores = quantizer.scores(query, key, scaling)
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()  # mask and softmax are never rounded
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    if kwargs.get("softcap") is not None:
        scores = torch.tanh(scores / kwargs["softcap"]) * kwargs["softcap"]
    if probe is not None:
        probe.scores(scores)
    if attention_mask is not None:
        scores = scores + attention_mask
    attention_map = nn.functional.softmax(scores, dim=-1)
    if probe is not None:
        attention_map = probe.attention_map(attention_map)
    attention_map = nn.functional.dropout(attention_map, p=dropout, training=module.training)
    if quantizer is None:
        context = torch.matmul(attention_map.to(value.dtype), value)
    else:
        context = quantizer.context(attention_map, value)
    return context.transpose(1, 2).contiguous(), attention_map


def fused_attention(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch kv_heads keys width"],
    value: Float[Tensor, "batch kv_heads keys width"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "batch queries heads width"], Tensor | None]:
    """Attention in one operation of torch, where nobody looks at its scores.

    The values are those of ``attention`` up to rounding. What torch's operation does not compute
    goes through ``attention``: quantized products, biases and caps of scores, and a mask of
    another precision than the queries, which would round its least number to minus infinity.

    Args:
        module: The attention module.
        query: Queries.
        key: Keys; fewer heads than queries are repeated.
        value: Values.
        attention_mask: Additive mask that broadcasts against the scores, or ``None``.
        scaling: Factor of the scores, by default 1 / sqrt(width).
        dropout: Probability with which entries of the attention map are dropped.
        **kwargs: As in ``attention``.

    Returns:
        The context, and no attention map unless ``attention`` was called.

    Raises:
        UnsupportedModelError: As ``attention``.
    """
    precisions = {tensor.dtype for tensor in (query, key, value)}
    if attention_mask is not None:
        precisions.add(attention_mask.dtype)
    in_parts = "attention_quantizer" in module._modules or len(precisions) > 1
    if in_parts or any(kwargs.get(name) is not None for name in _IN_PARTS):
        return attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    context = nn.functional.scaled_dot_product_attention(
        query,
        _repeat(key, query.shape[1]),
        _repeat(value, query.shape[1]),
        attn_mask=attention_mask,
        dropout_p=dropout if module.training else 0.0,
        scale=scaling,
    )
    return context.transpose(1, 2).contiguous(), None


def register_attention() -> None:
    """Registers both attention functions and their mask with transformers; idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _additive_mask)
    AttentionInterface.register(FUSED_ATTENTION_NAME, fused_attention)
    AttentionMaskInterface.register(FUSED_ATTENTION_NAME, _additive_mask)


def _additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor | None:
    from transformers.masking_utils import sdpa_mask

    # Whether a mask can be left out depends on its values, and asking waits for the device. The
    # eager mask of some versions copies a number from the host, which no CUDA graph can hold.
    kwargs["allow_is_causal_skip"] = False
    if kwargs.get("attention_mask") is not None:
        kwargs["allow_is_bidirectional_skip"] = False
    mask = sdpa_mask(*args, **kwargs)
    if mask is None:
        return None
    made = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
    return made.masked_fill_(~mask, torch.finfo(dtype).min)


def _configs(model: nn.Module) -> list[Any]:
    from transformers import PreTrainedModel

    found: dict[int, Any] = {}
    transformers_model = False
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        transformers_model = True
        if not module._can_set_attn_implementation():
            continue
        pending = [module.config]
        while pending:
            config = pending.pop()
            found.setdefault(id(config), config)
            pending.extend(
                sub for key in config.sub_configs if (sub := getattr(config, key, None)) is not None
            )
    if not transformers_model:
        raise not_of_transformers(model)
    return list(found.values())


@contextlib.contextmanager
def use_attention(model: nn.Module, *, keep: bool = False, fused: bool = False) -> Iterator[None]:
    """Routes the attention of ``model`` through ``attention`` inside the context.

    Attention written by hand, outside transformers' interface, stays as it is.

    Args:
        model: A transformers model.
        keep: Leave it so after a context that ended without an error.
        fused: Through ``fused_attention``, whose scores and map are out of reach.

    Raises:
        UnsupportedModelError: It is no transformers model.
    """
    register_attention()
    configs = _configs(model)
    before = [config._attn_implementation_internal for config in configs]
    for config in configs:
        config._attn_implementation_internal = FUSED_ATTENTION_NAME if fused else ATTENTION_NAME
    done = False
    try:
        yield
        done = keep
    finally:
        if not done:
            for config, name in zip(configs, before, strict=True):
                config._attn_implementation_internal = name


@contextlib.contextmanager
def probe_of(module: nn.Module, probe: AttentionProbe) -> Iterator[None]:
    """Lets ``probe`` see the attention calls of one module inside the context.

    Args:
        module: The attention module.
        probe: Who sees them.
    """
    module.__dict__[_PROBE] = probe
    try:
        yield
    finally:
        module.__dict__.pop(_PROBE, None)
