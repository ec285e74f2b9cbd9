"""From tensors to kernels: shapes, layouts, block sizes. Imports Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from ._gemm import gemm_kernel
from ._gemv import gemv_kernel
from ._planes import quantize_kernel, spread_kernel

__all__ = ["quantized", "weight_only"]

_SHARED = 224 * 1024
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED = bool(triton.knobs.runtime.interpret)
# float32 multiplies and additions stay separate instructions, as in the reference.
_EXACT: dict[str, Any] = {} if _INTERPRETED else {"enable_fp_fusion": False}

_TILES = [
    # tokens, outputs, bytes of weight, warps, stages
    (8, 16, 256, 4, 4),
    (8, 32, 128, 4, 5),
    (8, 32, 256, 4, 4),
    (8, 64, 64, 4, 5),
    (16, 16, 128, 4, 5),
    (16, 32, 128, 4, 4),
    (16, 64, 64, 4, 5),
    (32, 32, 128, 4, 4),
    (32, 64, 64, 4, 4),
    (64, 64, 32, 4, 4),
    (64, 64, 128, 4, 3),
    (64, 128, 64, 8, 4),
    (128, 64, 64, 4, 3),
    (128, 128, 32, 8, 4),
    (128, 128, 64, 8, 3),
    (256, 128, 32, 8, 4),
    (256, 128, 64, 8, 3),
]


def _fitting(configs: list[Any], arguments: dict[str, Any], **constants: Any) -> list[Any]:
    """Keeps the tiles that suit the number of tokens and fit into shared memory."""
    given = arguments | constants
    bucket, terms = given["BUCKET"], given["TERMS"]
    tallest = min(bucket, 256)
    width = 8 // given["BITS"] * (2 * terms if terms else 1)

    def fits(config: Any) -> bool:
        block = config.kwargs
        stage = block["BLOCK_K"] * (block["BLOCK_N"] + block["BLOCK_M"] * width)
        inside = stage * (config.num_stages - 1) <= _SHARED
        return inside and min(tallest // 2, 64) <= block["BLOCK_M"] <= tallest

    return [config for config in configs if fits(config)]


_gemm: Any = gemm_kernel
_gemv: Any = gemv_kernel
if not _INTERPRETED:
    _gemm = triton.autotune(
        [
            triton.Config(
                {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages
            )
            for m, n, k, warps, stages in _TILES
        ],
        key=["BUCKET", "N", "WIDTH", "BITS", "TERMS"],
        prune_configs_by={"early_config_prune": _fitting},
        cache_results=True,
    )(gemm_kernel)
    _gemv = triton.autotune(
        [
            triton.Config({"BLOCK_N": rows}, num_warps=warps, num_stages=1)
            for rows, warps in ((8, 4), (8, 8), (16, 4), (16, 8), (32, 8))
        ],
        key=["N", "WORDS", "BITS"],
        cache_results=True,
    )(gemv_kernel)


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
) -> Tensor:
    """Quantizes tokens and multiplies them with packed weights; see ``triton_packed_linear``."""

    def run(tokens: Tensor, y: Tensor) -> None:
        epilogue = _epilogue(weight_scale, bias, bits, lo, step)
        if len(tokens) == 1 and _in_words(packed, width, bits):
            _one_token(tokens, packed, weight_scale, bias, y, levels, epilogue)
            return
        planes, scales, sums = _quantize(tokens, packed.shape[1], 8 // bits, levels)
        _product(planes, scales, sums, packed, weight_scale, bias, y, 0, epilogue)

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
) -> Tensor:
    """Multiplies float tokens with packed weights; see ``triton_weight_only_linear``."""

    def run(tokens: Tensor, y: Tensor) -> None:
        terms = 3 if tokens.dtype == torch.float32 else 1
        planes = _spread(tokens, packed.shape[1], 8 // bits, terms)
        epilogue = _epilogue(weight_scale, bias, bits, lo, step)
        _product(planes, y, y, packed, weight_scale, bias, y, terms, epilogue)

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
) -> None:
    outputs, words = packed.shape[0], packed.shape[1] // 4
    # One block of words is 4096 weights: 16 inputs a thread at 8 warps.
    block = min(triton.next_power_of_2(words), 128 * epilogue["BITS"])
    fixed = {"BLOCK_N": 16} if _INTERPRETED else {}
    _gemv[lambda given: (triton.cdiv(outputs, given["BLOCK_N"]),)](
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
        **fixed,
        **_EXACT,
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
        **_EXACT,
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
        **_EXACT,
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
) -> None:
    tokens, outputs = y.shape
    bucket = min(max(triton.next_power_of_2(tokens), 8), 4096)
    fixed = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64} if _INTERPRETED else {}

    def grid(given: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(tokens, given["BLOCK_M"]) * triton.cdiv(outputs, given["BLOCK_N"])
        return (tiles,)

    _gemm[grid](
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
        **fixed,
        **_EXACT,
    )
