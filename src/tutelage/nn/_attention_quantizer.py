"""The two quantized products inside attention: Q K^T and P V."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..kernels import integer_matmul, quantize
from ..quantizers import BaseQuantizer, Quantized
from ._gate import blend, gate_of
from ._latent import latent, passed
from ._precision import in_float32, without_autocast

__all__ = ["AttentionQuantizer"]


class _QuantScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, q: Any, k: Any, scaling: float) -> Tensor:
        qq, qk = quantize(q, query), quantize(k, key)
        ctx.save_for_backward(latent(q, query), latent(k, key), *qq, *qk)
        ctx.quantizers, ctx.scaling = (q, k), scaling
        scores = integer_matmul(qq.codes, qk.codes.transpose(-1, -2), q.grid.hi * k.grid.hi)
        return scores.mul_(qq.scale * scaling).mul_(qk.scale.transpose(-1, -2))

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, q_codes, q_scale, k_codes, k_scale = ctx.saved_tensors
        (q, k), grad = ctx.quantizers, grads[0]
        grad_query = grad_key = None
        if ctx.needs_input_grad[0]:
            grad_query = torch.matmul(grad * k_scale.transpose(-1, -2), k_codes) * ctx.scaling
            grad_query = passed(q, grad_query, query, Quantized(q_codes, q_scale))
        if ctx.needs_input_grad[1]:
            grad_key = torch.matmul((grad * q_scale).transpose(-1, -2), q_codes) * ctx.scaling
            grad_key = passed(k, grad_key, key, Quantized(k_codes, k_scale))
        return grad_query, grad_key, None, None, None


class _QuantContext(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attention_map: Tensor, value: Tensor, p: Any, v: Any) -> Tensor:
        qv = quantize(v, value)
        # One scale per key cannot leave the sum over keys: it joins the map before that is rounded.
        folded = v.granularity == "row"
        key_scale = qv.scale.transpose(-1, -2)
        qp = quantize(p, attention_map, factor=key_scale if folded else None)
        ctx.save_for_backward(latent(p, attention_map), latent(v, value), *qp, *qv)
        ctx.quantizers, ctx.folded = (p, v), folded
        context = integer_matmul(qp.codes, qv.codes, p.grid.hi * v.grid.hi)
        return context.mul_(qp.scale if folded else qp.scale * qv.scale)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        attention_map, value, p_codes, p_scale, v_codes, v_scale = ctx.saved_tensors
        (p, v), grad = ctx.quantizers, grads[0]
        grad_map = grad_value = None
        if ctx.needs_input_grad[0]:
            grad_map = torch.matmul(grad, (v_codes * v_scale).transpose(-1, -2))
            grad_map = passed(p, grad_map, attention_map, Quantized(p_codes, p_scale))
        if ctx.needs_input_grad[1]:
            grad_value = torch.matmul(p_codes.transpose(-1, -2), grad * p_scale)
            if ctx.folded:
                grad_value = grad_value / v_scale
            grad_value = passed(v, grad_value, value, Quantized(v_codes, v_scale))
        return grad_map, grad_value, None, None


class AttentionQuantizer(nn.Module):
    """Quantizers of the two products inside attention, Q K^T and P V.

    With one scale per token, V's scale is folded into the attention map P, which is then
    quantized per row: the sum over keys runs on integers only.

    Attributes:
        query: Quantizer of Q.
        key: Quantizer of K.
        value: Quantizer of V.
        attention_map: Quantizer of P.
    """

    def __init__(
        self,
        query: BaseQuantizer,
        key: BaseQuantizer,
        value: BaseQuantizer,
        attention_map: BaseQuantizer,
    ) -> None:
        """Keeps the four quantizers."""
        super().__init__()
        self.query = query
        self.key = key
        self.value = value
        self.attention_map = attention_map

    @without_autocast
    def scores(
        self,
        query: Float[Tensor, "batch heads queries width"],
        key: Float[Tensor, "batch heads keys width"],
        scaling: float,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Returns the quantized ``Q K^T * scaling``, in float32 under autocast too."""
        gate = gate_of(self)
        if gate is not None:
            query = blend(query.float(), self.query(query.float()), gate)
            key = blend(key.float(), self.key(key.float()), gate)
            return torch.matmul(query, key.transpose(-1, -2)) * scaling
        scores = _QuantScores.apply(query, key, self.query, self.key, scaling)
        return cast("Tensor", scores)

    @in_float32
    def context(
        self,
        attention_map: Float[Tensor, "batch heads queries keys"],
        value: Float[Tensor, "batch heads keys width"],
    ) -> Float[Tensor, "batch heads queries width"]:
        """Returns the quantized ``P V``."""
        gate = gate_of(self)
        if gate is not None:
            return self._blended_context(attention_map.float(), value.float(), gate)
        context = _QuantContext.apply(attention_map, value, self.attention_map, self.value)
        return cast("Tensor", context)

    def _blended_context(self, attention_map: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        # As where it is quantized, the map is rounded with V's scales in it.
        folded = self.value.granularity == "row"
        scale = self.value.quantize(value).scale.transpose(-1, -2) if folded else 1.0
        rounded = self.attention_map(attention_map * scale) / scale
        value = blend(value, self.value(value), gate)
        return torch.matmul(blend(attention_map, rounded, gate), value)
