"""What a packed layer calls for tensors on a CUDA device."""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ...quantizers import BaseQuantizer, Grid, UniformQuantizer, packed_width
from . import _ops as _ops
from ._status import serves

__all__ = ["packed_linear_cuda", "triton_packed_linear", "triton_weight_only_linear"]

_EXACT = 2**24


def triton_packed_linear(
    x: Float[Tensor, "*batch in_features"],
    packed: UInt8[Tensor, "out_features packed"],
    weight_scale: Float[Tensor, "scales 1"],
    bias: Float[Tensor, " out_features"] | None,
    width: int,
    grid: Grid,
    levels: int,
) -> Float[Tensor, "*batch out_features"]:
    """Quantizes every token and multiplies it with a packed weight, in Triton kernels.

    ``((codes_x @ codes_w.T) * scale_x) * scale_w + bias``, bit for bit what
    ``scaled_integer_linear`` computes of ``UniformQuantizer.quantize(x)``. A token with NaN or an
    infinity gives NaN. The operator ``torch.ops.tutelage.triton_packed_linear``.

    Args:
        x: Float32, bfloat16 or float16, on a CUDA device.
        packed: Made by ``pack``, contiguous.
        weight_scale: Float32, (out_features, 1) or (1, 1).
        bias: Shape (out_features,), or ``None``.
        width: Input features.
        grid: Of the weight, at most 2 bits.
        levels: Codes of ``x`` reach from -levels to levels, at most 127.

    Returns:
        Float32.
    """
    result: Tensor = torch.ops.tutelage.triton_packed_linear(
        x, packed, weight_scale, bias, width, grid.bits, grid.lo, grid.step, levels
    )
    return result


def triton_weight_only_linear(
    x: Float[Tensor, "*batch in_features"],
    packed: UInt8[Tensor, "out_features packed"],
    weight_scale: Float[Tensor, "scales 1"],
    bias: Float[Tensor, " out_features"] | None,
    width: int,
    grid: Grid,
) -> Float[Tensor, "*batch out_features"]:
    """Multiplies tokens with a packed weight without quantizing them, in Triton kernels.

    ``(x @ codes_w.T) * scale_w + bias`` with float32 sums. Products are exact: bfloat16 and
    float16 tokens are taken as they are, float32 ones as the sum of three bfloat16 numbers. The
    operator ``torch.ops.tutelage.triton_weight_only_linear``.

    Args:
        x: Float32, bfloat16 or float16, on a CUDA device.
        packed: As in ``triton_packed_linear``.
        weight_scale: As in ``triton_packed_linear``.
        bias: As in ``triton_packed_linear``.
        width: As in ``triton_packed_linear``.
        grid: As in ``triton_packed_linear``.

    Returns:
        Float32.
    """
    result: Tensor = torch.ops.tutelage.triton_weight_only_linear(
        x, packed, weight_scale, bias, width, grid.bits, grid.lo, grid.step
    )
    return result


def packed_linear_cuda(
    x: Float[Tensor, "*batch in_features"],
    packed: UInt8[Tensor, "out_features packed"],
    weight_scale: Float[Tensor, "scales 1"],
    bias: Float[Tensor, " out_features"] | None,
    width: int,
    grid: Grid,
    quantizer: BaseQuantizer | None,
    arithmetic: str = "integer",
) -> Float[Tensor, "*batch out_features"] | None:
    """Computes a packed layer on a CUDA device, or says that the plain path has to.

    Args:
        x: Input, any float dtype.
        packed: Bytes of the weight, as ``PackedWeight.packed`` returns them.
        weight_scale: Scales of the weight, likewise.
        bias: Of the layer.
        width: Input features.
        grid: Of the weight.
        quantizer: Of the input, ``None`` for weight-only quantization.
        arithmetic: Of the layer; only ``"integer"`` is served where the input is quantized.

    Returns:
        Float32, or ``None`` where these kernels do not serve: no CUDA device, no Triton (see
        ``triton_status``), an input quantizer other than a plain one per token, sums that could
        pass 2^24, or a gradient that is asked for.
    """
    if not serves(x.device) or not _suits(x, packed, width, grid):
        return None
    if quantizer is None:
        if torch.is_grad_enabled() and x.requires_grad:
            return None
        y = triton_weight_only_linear(
            x.detach(), packed, weight_scale, _detached(bias), width, grid
        )
    else:
        levels = _levels(quantizer)
        largest = max(abs(grid.lo), abs(grid.hi))
        if arithmetic != "integer" or levels is None or width * levels * largest >= _EXACT:
            return None
        y = triton_packed_linear(
            x.detach(), packed, weight_scale, _detached(bias), width, grid, levels
        )
    return y


def _suits(x: Tensor, packed: Tensor, width: int, grid: Grid) -> bool:
    return (
        grid.bits in (1, 2)
        and width > 0
        and x.shape[-1] == width
        and packed.is_contiguous()
        and packed.shape[1] == packed_width(width, grid)
    )


def _levels(quantizer: BaseQuantizer) -> int | None:
    plain = type(quantizer) is UniformQuantizer and quantizer.granularity == "row"
    if not plain or quantizer.clip is not None or quantizer.reciprocal:
        return None
    return quantizer.grid.hi


def _detached(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()
