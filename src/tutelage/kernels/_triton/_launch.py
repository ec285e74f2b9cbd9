"""From tensors to kernels: shapes, layouts, block sizes. Imports Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ._planes import quantize_kernel, spread_kernel
from ._tiles import gemm, gemv

__all__ = ["EXACT", "quantized", "weight_only"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = bool(triton.knobs.runtime.interpret)
# float32 multiplies and additions stay separate instructions, as in the reference.
EXACT: dict[str, Any] = {} if _INTERPRETED else {"enable_fp_fusion": False}


def quantized(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    width: int,
    bits: int,
    lo: int,
    step: int,
    levels: int,
    tuned: bool = True,
) -> Tensor:
    """Quantizes tokens and multiplies them with packed weights; see ``triton_packed_linear``.

    ``tuned=False`` takes block sizes without timing them.
    """

    def run(tokens: Tensor, y: Tensor) -> None:
        epilogue = _epilogue(weight_scale, bias, bits, lo, step)
        if len(tokens) == 1 and _in_words(packed, width, bits):
            _one_token(tokens, packed, weight_scale, bias, y, levels, epilogue, tuned)
            return
        planes, scales, sums = _quantize(tokens, packed.shape[1], 8 // bits, levels)
        _product(planes, scales, sums, packed, weight_scale, bias, y, 0, epilogue, tuned)

    return _over_tokens(run, x, packed, bias, width)


def weight_only(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    width: int,
    bits: int,
    lo: int,
    step: int,
    tuned: bool = True,
) -> Tensor:
    """Multiplies float tokens with packed weights; see ``triton_weight_only_linear``."""

    def run(tokens: Tensor, y: Tensor) -> None:
        terms = 3 if tokens.dtype == torch.float32 else 1
        planes = _spread(tokens, packed.shape[1], 8 // bits, terms)
        epilogue = _epilogue(weight_scale, bias, bits, lo, step)
        _product(planes, y, y, packed, weight_scale, bias, y, terms, epilogue, tuned)

    return _over_tokens(run, x, packed, bias, width)


def _over_tokens(
    run: Callable[[Tensor, Tensor], None],
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    width: int,
) -> Tensor:
    outputs = packed.shape[0]
    batch = x.shape[:-1]
    x = x if x.dtype in _FLOATS else x.float()
    if x.numel() == 0 or outputs == 0:
        y = torch.zeros((*batch, outputs), dtype=torch.float32, device=x.device)
        return y if bias is None else y.add_(bias)
    tokens = x.reshape(-1, width).contiguous()
    y = torch.empty((len(tokens), outputs), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        run(tokens, y)
    return y.reshape(*batch, outputs)


def _epilogue(
    weight_scale: Tensor, bias: Tensor | None, bits: int, lo: int, step: int
) -> dict[str, Any]:
    return {
        "BITS": bits,
        "LO": lo,
        "STEP": step,
        "ROW_SCALE": weight_scale.numel() > 1,
        "HAS_BIAS": bias is not None,
        "INTERPRETED": _INTERPRETED,
    }


def _in_words(packed: Tensor, width: int, bits: int) -> bool:
    """Whether every row is a whole number of full 32-bit words."""
    return width % (32 // bits) == 0 and packed.data_ptr() % 4 == 0


def _one_token(
    token: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    levels: int,
    epilogue: dict[str, Any],
    tuned: bool,
) -> None:
    outputs, words = packed.shape[0], packed.shape[1] // 4
    # At most 4096 weights a block: 16 inputs a thread at 8 warps.
    block = min(triton.next_power_of_2(words), 128 * epilogue["BITS"])
    kernel, blocks = gemv(tuned)

    def grid(given: dict[str, Any]) -> tuple[int]:
        return (triton.cdiv(outputs, given["BLOCK_N"] * given["ROUNDS"]),)

    kernel[grid](
        token,
        packed.view(torch.int32),
        weight_scale,
        bias,
        y,
        outputs,
        WORDS=words,
        LEVELS=levels,
        BLOCK_W=block,
        **epilogue,
        **blocks,
        **EXACT,
    )


def _quantize(
    tokens: Tensor, packed_width: int, fields: int, levels: int
) -> tuple[Tensor, Tensor, Tensor]:
    count, width = tokens.shape
    plane = -(-packed_width // 16) * 16
    planes = torch.empty((count, fields, plane), dtype=torch.int8, device=tokens.device)
    scales = torch.empty(count, dtype=torch.float32, device=tokens.device)
    sums = torch.empty(count, dtype=torch.int32, device=tokens.device)
    block = min(triton.next_power_of_2(plane), 4096 // fields)
    warps = {} if _INTERPRETED else {"num_warps": 8 if block * fields >= 4096 else 4}
    quantize_kernel[(count,)](
        tokens,
        planes,
        scales,
        sums,
        K=width,
        PLANE=plane,
        LEVELS=levels,
        FIELDS=fields,
        BLOCK=block,
        **warps,
        **EXACT,
    )
    return planes, scales, sums


def _spread(tokens: Tensor, packed_width: int, fields: int, terms: int) -> Tensor:
    count, width = tokens.shape
    plane = -(-packed_width // 16) * 16
    dtype = torch.bfloat16 if terms > 1 else tokens.dtype
    planes = torch.empty((count, terms, fields, plane), dtype=dtype, device=tokens.device)
    block = min(triton.next_power_of_2(plane), 2048 // fields)
    spread_kernel[(count, triton.cdiv(plane, block))](
        tokens,
        planes,
        K=width,
        PLANE=plane,
        FIELDS=fields,
        TERMS=terms,
        BLOCK=block,
        **EXACT,
    )
    return planes


def _product(
    planes: Tensor,
    scales: Tensor,
    sums: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    y: Tensor,
    terms: int,
    epilogue: dict[str, Any],
    tuned: bool,
) -> None:
    tokens, outputs = y.shape
    bucket = min(max(triton.next_power_of_2(tokens), 8), 4096)
    kernel, blocks = gemm(tuned, bucket, epilogue["BITS"], terms)

    def grid(given: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(tokens, given["BLOCK_M"]) * triton.cdiv(outputs, given["BLOCK_N"])
        return (tiles,)

    kernel[grid](
        planes,
        scales,
        sums,
        packed.view(torch.int8),
        weight_scale,
        bias,
        y,
        tokens,
        outputs,
        WIDTH=packed.shape[1],
        PLANE=planes.shape[-1],
        BUCKET=bucket,
        TERMS=terms,
        GROUP=8,
        **epilogue,
        **blocks,
        **EXACT,
    )
