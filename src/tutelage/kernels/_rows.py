"""The passes of a training step, fused: in compiled code on the CPU, in Triton on CUDA devices.

Each reads its operands once. The plain forms are the reference, and what ``torch.compile`` fuses
on its own; the compiled ones return the same numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ..quantizers import (
    BinaryQuantizer,
    FourLevelQuantizer,
    Quantized,
    Quantizer,
    TernaryQuantizer,
    UniformQuantizer,
    UnsignedQuantizer,
)
from ._integer import active_path, int8_serves, integer_linear
from ._native import active, isa_index
from ._triton import serves

__all__ = [
    "dequantize",
    "quantize",
    "scaled_integer_linear",
    "squared_error",
    "squared_error_gradient",
]

_KINDS: dict[type, tuple[int, float]] = {
    TernaryQuantizer: (0, TernaryQuantizer.threshold),
    BinaryQuantizer: (1, 0.0),
    FourLevelQuantizer: (2, FourLevelQuantizer.threshold),
}
_PLAIN = (Tensor, nn.Parameter)


def _serves(*tensors: Tensor | None) -> bool:
    """Whether compiled code can read these tensors: float32, on one device, none a stand-in."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined]
        return False
    devices = set()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or tensor.dtype != torch.float32 or tensor.dim() > 4:
            return False
        devices.add(tensor.device)
    if len(devices) != 1:
        return False
    (device,) = devices
    return active() if device.type == "cpu" else serves(device)


def _isa(device: torch.device) -> int:
    return isa_index() if device.type == "cpu" else -1


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def quantize(
    quantizer: Quantizer,
    x: Float[Tensor, "*shape"],
    *,
    factor: Float[Tensor, "..."] | None = None,
    compact: bool = False,
) -> Quantized:
    """Returns what ``quantizer.quantize(x)`` returns, in one pass where compiled code serves.

    Args:
        quantizer: Any quantizer; those with one scale per row and without clipping are fused.
        x: What is quantized.
        factor: Multiplies ``x`` first, broadcast to its shape.
        compact: Signed codes as int8 where compiled code serves and products want them so.

    Returns:
        Codes of the shape of ``x``, float32 (or int8), and the scale.
    """
    kind = _KINDS.get(type(quantizer))
    signed = type(quantizer) is UniformQuantizer and not quantizer.reciprocal
    fused = kind is not None or signed or type(quantizer) is UnsignedQuantizer
    fused = fused and quantizer.granularity == "row" and quantizer.clip is None  # type: ignore[attr-defined]
    small = compact and quantizer.grid.lo < 0 and active_path(x.device) == "int8"
    if not fused or not x.dim() or not _serves(x, factor):
        return quantizer.quantize(x if factor is None else x * factor)
    x = x.detach()
    codes = x.new_empty(x.shape, dtype=torch.int8 if small else torch.float32)
    scale = x.new_empty((*x.shape[:-1], 1))
    if kind is not None:
        x = x.contiguous() if factor is None else x * factor
        torch.ops.tutelage.quantize_weight(x, *kind, codes, scale, _isa(x.device))
        return quantizer.with_gain(Quantized(codes, scale))  # type: ignore[attr-defined]
    if factor is not None:
        factor = _contiguous_rows(factor.detach().expand(x.shape))
    torch.ops.tutelage.quantize_uniform(
        _contiguous_rows(x), factor, quantizer.grid.hi, signed, codes, scale, _isa(x.device)
    )
    return Quantized(codes, scale)


def dequantize(quantized: Quantized) -> Float[Tensor, "*shape"]:
    """Returns ``codes * scale``, float32.

    Args:
        quantized: Codes, float32 or int8, and a scale per row or a single one.
    """
    codes, scale = quantized
    rows = codes.numel() // max(codes.shape[-1], 1) if codes.dim() else 0
    if codes.dtype != torch.int8 or scale.numel() not in (1, rows) or not _serves(scale):
        return codes * scale
    out = scale.new_empty(codes.shape)
    operands = codes.contiguous(), scale.contiguous()
    torch.ops.tutelage.scale_codes(*operands, out, _isa(scale.device))
    return out


def scaled_integer_linear(
    x: Quantized, weight: Quantized, bias: Float[Tensor, " out_features"] | None
) -> Float[Tensor, "*batch out_features"]:
    """Computes ``((codes_x @ codes_w.T) * scale_x) * scale_w + bias``, in this order.

    Training, the packed modules and every kernel use this order, so that they agree bit for bit.

    Args:
        x: Quantized input, codes (*batch, in), scale (*batch, 1) or one element.
        weight: Quantized weight, codes (out, in), scale (out, 1) or one element.
        bias: Shape (out,), or ``None``.

    Returns:
        Float32, shape (*batch, out).
    """
    out_features, width = weight.codes.shape
    count = x.codes.numel() // max(width, 1)
    if not int8_serves(x.codes.device, count, width, out_features) or not _serves(
        x.scale, weight.scale, bias
    ):
        y = integer_linear(x.codes, weight.codes)
        y.mul_(x.scale).mul_(weight.scale.reshape(-1))
        return y if bias is None else y.add_(bias)
    # Sums are written where the result will be: no second buffer, and the result is no view.
    y = x.scale.new_empty((*x.codes.shape[:-1], out_features))
    sums = y.view(torch.int32).reshape(-1, out_features)
    rows = x.codes.reshape(-1, width).to(torch.int8)
    torch._int_mm(rows, weight.codes.to(torch.int8).t(), out=sums)
    bias = None if bias is None else bias.detach().contiguous()
    scales = (x.scale.contiguous(), weight.scale.contiguous())
    torch.ops.tutelage.scale_sums(sums, *scales, bias, _isa(y.device))
    return y


def _error_operands(
    own: Tensor, other: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Returns the operands as compiled code reads them; ``None`` where it cannot."""
    if own.shape != other.shape or not own.dim() or not _serves(own, other, mask):
        return None
    if mask is not None:
        mask = mask.detach().expand(own.shape)
        if own.shape[-1] > 1 and mask.stride(-1) not in (0, 1):
            return None
    return own.detach().contiguous(), other.detach().contiguous(), mask


def squared_error(
    own: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"], mask: Shaped[Tensor, "..."] | None
) -> Float[Tensor, ""]:
    """Returns the sum of ``((own - other) * mask)^2``, without gradient.

    Args:
        own: One signal.
        other: Another of the same shape.
        mask: Broadcasts against them, or ``None``.
    """
    operands = _error_operands(own, other, mask)
    if operands is None:
        difference = own - other
        if mask is not None:
            difference.mul_(mask)
        flat = difference.reshape(-1)
        return torch.dot(flat, flat)
    out = own.new_empty(())
    torch.ops.tutelage.squared_error(*operands, out, _isa(own.device))
    return out


def squared_error_gradient(
    own: Float[Tensor, "*shape"],
    other: Float[Tensor, "*shape"],
    mask: Shaped[Tensor, "..."] | None,
    gain: Float[Tensor, ""],
) -> Float[Tensor, "*shape"]:
    """Returns ``((own - other) * mask) * gain``.

    Args:
        own: One signal.
        other: Another of the same shape.
        mask: Broadcasts against them, or ``None``.
        gain: 0-dim.
    """
    operands = _error_operands(own, other, mask)
    if operands is None or gain.dtype != torch.float32:
        difference = own - other
        if mask is not None:
            difference.mul_(mask)
        return difference.mul_(gain)
    out = own.new_empty(own.shape)
    torch.ops.tutelage.squared_error_backward(*operands, gain, out, _isa(own.device))
    return out
