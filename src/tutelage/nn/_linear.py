"""Linear layers on integers: trained with fake quantization, shipped with packed codes."""

from __future__ import annotations

from typing import Any, Literal, Self, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..kernels import dequantize, quantize, scaled_integer_linear
from ..quantizers import Quantized, Quantizer, UniformQuantizer, gain_gradient
from ._gate import blend, gate_of
from ._latent import latent, passed
from ._precision import in_float32, without_autocast
from ._weight import QuantWeight

__all__ = [
    "Arithmetic",
    "QuantLinear",
    "QuantProduct",
    "quantized_linear",
]


Arithmetic = Literal["integer", "float"]
"""How a quantized product is computed.

``"integer"``: integers first, one scaling at the end; exact, and what every kernel computes.
``"float"``: scales first, then a float32 product, which rounds; the published code does so.
"""


def quantized_linear(
    x: Quantized,
    weight: Quantized,
    bias: Float[Tensor, " out_features"] | None,
    arithmetic: Arithmetic = "integer",
) -> Float[Tensor, "*batch out_features"]:
    """Computes a Linear layer of a quantized input and a quantized weight.

    Args:
        x: Quantized input, see ``scaled_integer_linear``.
        weight: Quantized weight.
        bias: Shape (out,), or ``None``.
        arithmetic: See ``Arithmetic``.
    """
    if arithmetic == "float":
        return nn.functional.linear(dequantize(x), dequantize(weight), bias)
    return scaled_integer_linear(x, weight, bias)


_CODES = "_tutelage_codes"


def _shared(quantizer: Quantizer, x: Tensor, compact: bool) -> Quantized:
    """Quantizes an input, once for all modules that read it with equal quantizers.

    What is remembered hangs on the tensor and goes with it. Inputs of a model are not: a recorded
    step would go on with what it found there when it was recorded.
    """
    if torch.compiler.is_compiling() or type(quantizer) is not UniformQuantizer:
        return quantize(quantizer, x, compact=compact)
    if x.grad_fn is None:
        return quantize(quantizer, x, compact=compact)
    settings = (quantizer.bits, quantizer.granularity, quantizer.clip, quantizer.reciprocal)
    key = (settings, compact, x._version)
    known, found = getattr(x, _CODES, (None, None))
    if known != key or found is None:
        found = quantize(quantizer, x, compact=compact)
        setattr(x, _CODES, (key, found))
    return found


class _QuantLinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        log_gain: Tensor | None,
        input_quantizer: Quantizer,
        weight_quantizer: Quantizer,
        arithmetic: Arithmetic,
    ) -> Tensor:
        compact = arithmetic == "integer"
        qx = _shared(input_quantizer, x, compact)
        qw = quantize(weight_quantizer, weight, compact=compact)
        kept = (latent(input_quantizer, x), latent(weight_quantizer, weight))
        ctx.save_for_backward(*kept, *qx, *qw)
        ctx.quantizers = (input_quantizer, weight_quantizer)
        return quantized_linear(qx, qw, bias, arithmetic)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        x, weight, *quantized = ctx.saved_tensors
        qx, qw = Quantized(*quantized[:2]), Quantized(*quantized[2:])
        input_quantizer, weight_quantizer = ctx.quantizers
        grad_x = grad_weight = grad_bias = grad_gain = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.matmul(grad, dequantize(qw))
            grad_x = passed(input_quantizer, grad_x, x, qx)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            values = dequantize(qx).reshape(-1, qx.codes.shape[-1])
            grad_weight = torch.matmul(grad.reshape(-1, grad.shape[-1]).t(), values)
            if ctx.needs_input_grad[3]:
                grad_gain = gain_gradient(grad_weight, qw)
            grad_weight = passed(weight_quantizer, grad_weight, weight, qw)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
        return grad_x, grad_weight, grad_bias, grad_gain, None, None, None


class QuantProduct(QuantWeight):
    """A product with a quantized weight, and a quantized input where wanted.

    Attributes:
        bias: Shape (out_features,), or ``None``.
        input_quantizer: Quantizer of the input, or ``None`` for weight-only quantization.
        arithmetic: How the product is computed.
    """

    bias: Tensor | None
    input_quantizer: Quantizer | None
    arithmetic: Arithmetic

    @classmethod
    def _from_module(
        cls, module: nn.Module, weight: nn.Module, input: nn.Module | None, arithmetic: Arithmetic
    ) -> Self:
        module.__class__ = cls
        made = cast("Self", module)
        made.weight_quantizer = cast("Quantizer", weight)
        made.input_quantizer = cast("Quantizer | None", input)
        made.arithmetic = arithmetic
        return made

    @in_float32
    def forward(
        self, input: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Applies the quantized layer.

        Args:
            input: Shape (*batch, in_features).

        Returns:
            Shape (*batch, out_features), float32; computed so and then rounded under autocast.
        """
        gate = gate_of(self)
        if gate is not None:
            rows, x = self.weight_rows(), input.float()
            weight = blend(rows, self.weight_quantizer(rows), gate)
            if self.input_quantizer is not None:
                x = blend(x, self.input_quantizer(x), gate)
            return nn.functional.linear(x, weight, self.bias)
        if self.input_quantizer is None:
            weight = self.weight_quantizer(self.weight_rows())
            return nn.functional.linear(input.to(weight.dtype), weight, self.bias)
        return cast(
            "Tensor",
            _QuantLinearFunction.apply(
                input,
                self.weight_rows(),
                self.bias,
                getattr(self.weight_quantizer, "log_gain", None),
                self.input_quantizer,
                self.weight_quantizer,
                self.arithmetic,
            ),
        )


class QuantLinear(QuantProduct, nn.Linear):  # type: ignore[misc]
    """``nn.Linear`` whose weight, and input where wanted, are quantized in the forward pass.

    Made in place from an existing ``nn.Linear`` by ``tutelage.prepare``; parameters, hooks and
    names stay. ``weight`` is the latent full-precision weight.

    Attributes:
        weight_quantizer: Quantizer of the weight, one scale per row or tensor.
        input_quantizer: Quantizer of the input, or ``None`` for weight-only quantization.
        arithmetic: How the product is computed.
    """

    @classmethod
    def from_linear(
        cls,
        module: nn.Linear,
        weight: nn.Module,
        input: nn.Module | None,
        arithmetic: Arithmetic = "integer",
    ) -> QuantLinear:
        """Turns ``module`` into a ``QuantLinear`` in place and returns it.

        Args:
            module: A plain ``nn.Linear``.
            weight: Quantizer of the weight.
            input: Quantizer of the input, or ``None``.
            arithmetic: How the product is computed.
        """
        return cls._from_module(module, weight, input, arithmetic)
