"""The passes of a training step on a CUDA device: shapes, strides, block sizes. Imports Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ._launch import EXACT
from ._rows import error_kernel, error_sum_kernel, sums_kernel, uniform_kernel, weight_kernel

__all__ = [
    "quantize_uniform",
    "quantize_weight",
    "scale_codes",
    "scale_sums",
    "squared_error",
    "squared_error_backward",
]

_VALUES = 2048
"""Of a block: as many as keep eight warps busy and in registers."""


def _blocks(width: int) -> dict[str, int]:
    block = min(triton.next_power_of_2(max(width, 1)), _VALUES)
    return {"ROWS": max(_VALUES // block // 2, 1), "BLOCK": block}


def _shape(x: Tensor) -> tuple[int, int, int]:
    """Returns the rows of a tensor, and the second and third size of them."""
    sizes = [1, 1, 1, *x.shape[:-1]][-3:]
    return sizes[0] * sizes[1] * sizes[2], sizes[1], sizes[2]


def _strides(x: Tensor) -> tuple[int, int, int]:
    found = [0, 0, 0, *x.stride()[:-1]][-3:]
    return found[0], found[1], found[2]


def quantize_uniform(
    x: Tensor,
    factor: Tensor | None,
    levels: int,
    has_sign: bool,
    codes: Tensor,
    scale: Tensor,
    _: int = 0,
) -> None:
    """See ``tutelage.kernels.quantize``."""
    rows, size1, size2 = _shape(x)
    if rows == 0:
        return
    blocks = _blocks(x.shape[-1])
    with torch.cuda.device_of(x):
        uniform_kernel[(triton.cdiv(rows, blocks["ROWS"]),)](
            x,
            x if factor is None else factor,
            codes,
            scale,
            rows,
            size1,
            size2,
            *_strides(x),
            *_strides(x if factor is None else factor),
            K=x.shape[-1],
            LEVELS=levels,
            SIGNED=has_sign,
            HAS_FACTOR=factor is not None,
            **blocks,
            **EXACT,
        )


def quantize_weight(
    x: Tensor, kind: int, threshold: float, codes: Tensor, scale: Tensor, _: int = 0
) -> None:
    """See ``tutelage.kernels.quantize``."""
    rows = _shape(x)[0]
    if x.numel() == 0:
        scale.zero_()
        return
    blocks = _blocks(x.shape[-1])
    with torch.cuda.device_of(x):
        weight_kernel[(triton.cdiv(rows, blocks["ROWS"]),)](
            x,
            codes,
            scale,
            rows,
            K=x.shape[-1],
            KIND=kind,
            THRESHOLD=threshold,
            **blocks,
            **EXACT,
        )


def scale_codes(codes: Tensor, scale: Tensor, out: Tensor, _: int = 0) -> None:
    """See ``tutelage.kernels.dequantize``."""
    torch.mul(codes, scale, out=out)


def scale_sums(
    sums: Tensor, row_scale: Tensor, column_scale: Tensor, bias: Tensor | None, _: int = 0
) -> None:
    """See ``tutelage.kernels.scaled_integer_linear``."""
    rows, columns = sums.shape
    if sums.numel() == 0:
        return
    grid = (triton.cdiv(rows, 16), triton.cdiv(columns, 128))
    with torch.cuda.device_of(sums):
        sums_kernel[grid](
            sums,
            row_scale,
            column_scale,
            bias,
            sums.view(torch.float32),
            rows,
            columns,
            PER_ROW=row_scale.numel() > 1,
            PER_COLUMN=column_scale.numel() > 1,
            HAS_BIAS=bias is not None,
            BLOCK_M=16,
            BLOCK_N=128,
            **EXACT,
        )


def _error_arguments(own: Tensor, mask: Tensor | None) -> tuple[tuple[int, ...], dict[str, Any]]:
    mask_strides = (0, 0, 0, 0) if mask is None else (*_strides(mask), mask.stride(-1))
    named = {"K": own.shape[-1], "MASKED": mask is not None, **_blocks(own.shape[-1]), **EXACT}
    return (*_shape(own), *mask_strides), named


def squared_error(own: Tensor, other: Tensor, mask: Tensor | None, out: Tensor, _: int = 0) -> None:
    """See ``tutelage.kernels.squared_error``."""
    if own.numel() == 0:
        out.zero_()
        return
    numbers, named = _error_arguments(own, mask)
    programs = triton.cdiv(numbers[0], named["ROWS"])
    sums = torch.empty(programs, dtype=torch.float64, device=own.device)
    with torch.cuda.device_of(own):
        error_sum_kernel[(programs,)](
            own, other, own if mask is None else mask, sums, *numbers, **named
        )
    out.copy_(sums.sum())


def squared_error_backward(
    own: Tensor, other: Tensor, mask: Tensor | None, gain: Tensor, out: Tensor, _: int = 0
) -> None:
    """See ``tutelage.kernels.squared_error_gradient``."""
    if own.numel() == 0:
        return
    numbers, named = _error_arguments(own, mask)
    with torch.cuda.device_of(own):
        error_kernel[(triton.cdiv(numbers[0], named["ROWS"]),)](
            own, other, own if mask is None else mask, gain, out, *numbers, **named
        )
