"""Compiles the Triton kernels for sm_90, without a device, and prints what the code contains.

A process of its own: the tests run the same kernels in Triton's interpreter.
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tutelage.kernels._triton._gemm import gemm_kernel
from tutelage.kernels._triton._gemv import gemv_kernel
from tutelage.kernels._triton._launch import EXACT
from tutelage.kernels._triton._planes import quantize_kernel
from tutelage.kernels._triton._rows import (
    error_kernel,
    error_sum_kernel,
    sums_kernel,
    uniform_kernel,
    weight_kernel,
)

WEIGHTS = {"BITS": 2, "LO": -1, "STEP": 1, "ROW_SCALE": True, "HAS_BIAS": True}
POINTERS = {
    "x": "*fp32",
    "planes": "*i8",
    "scales": "*fp32",
    "sums": "*i32",
    "weight": "*i8",
    "weight_scale": "*fp32",
    "bias": "*fp32",
    "y": "*fp32",
    "M": "i32",
    "N": "i32",
    "R": "i32",
    **dict.fromkeys(("factor", "scale", "row_scale", "column_scale", "own", "other"), "*fp32"),
    **dict.fromkeys(("mask", "gain", "out"), "*fp32"),
    **dict.fromkeys(("size1", "size2", "x0", "x1", "x2", "f0", "f1", "f2"), "i32"),
    **dict.fromkeys(("m0", "m1", "m2", "m3"), "i32"),
    "codes": "*i8",
}


def ptx_of(kernel: Any, warps: int, stages: int, types: dict[str, str], **constants: Any) -> str:
    """Compiles a kernel with arguments as a caller on a device would pass them."""
    names = kernel.arg_names
    known = POINTERS | types
    source = ASTSource(
        kernel,
        {name: "constexpr" if name in constants else known[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(names)
            if name not in constants and name != "M"
        },
    )
    options = {"num_warps": warps, "num_stages": stages, **EXACT}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def main() -> None:
    """Prints one JSON object: kernel to counts of instructions."""
    plane = {"WIDTH": 1024, "PLANE": 1024, "BUCKET": 8, "GROUP": 8, "INTERPRETED": False}
    small = {"BLOCK_M": 8, "BLOCK_N": 32, "BLOCK_K": 256}
    large = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}
    bf16 = {"planes": "*bf16", "sums": "*fp32"}
    compiled = {
        "gemm_small": ptx_of(gemm_kernel, 4, 4, {}, TERMS=0, **WEIGHTS, **plane, **small),
        "gemm_large": ptx_of(gemm_kernel, 8, 3, {}, TERMS=0, **WEIGHTS, **plane, **large),
        "weight_only": ptx_of(gemm_kernel, 8, 3, bf16, TERMS=1, **WEIGHTS, **plane, **large),
        "gemv": ptx_of(
            gemv_kernel,
            8,
            1,
            {"weight": "*i32"},
            **WEIGHTS,
            WORDS=256,
            LEVELS=127,
            INTERPRETED=False,
            BLOCK_N=16,
            ROUNDS=2,
            BLOCK_W=256,
        ),
        "quantize": ptx_of(
            quantize_kernel, 8, 1, {}, K=4096, PLANE=1024, LEVELS=127, FIELDS=4, BLOCK=1024
        ),
    }
    rows: dict[str, Any] = {"K": 384, "ROWS": 2, "BLOCK": 512}
    errors: dict[str, Any] = {**rows, "MASKED": True}
    compiled |= {
        "row_uniform": ptx_of(
            uniform_kernel, 4, 1, {}, LEVELS=127, SIGNED=True, HAS_FACTOR=True, **rows
        ),
        "row_weight": ptx_of(weight_kernel, 4, 1, {}, KIND=0, THRESHOLD=0.7, **rows),
        "row_sums": ptx_of(
            sums_kernel,
            4,
            1,
            {},
            PER_ROW=True,
            PER_COLUMN=True,
            HAS_BIAS=True,
            BLOCK_M=16,
            BLOCK_N=128,
        ),
        "row_error_sum": ptx_of(error_sum_kernel, 4, 1, {"out": "*fp64"}, **errors),
        "row_error": ptx_of(error_kernel, 4, 1, {}, **errors),
    }
    patterns = {
        "mma_int8": r"mma\.sync\.\S*\.s8\.s8",
        "wgmma_int8": r"wgmma\.mma_async\S*\.s8\.s8",
        "wgmma_bf16": r"wgmma\.mma_async\S*\.bf16\.bf16",
        "dp4a": r"dp4a\.",
        "division": r"div\.rn\.f32",
        "approximate_division": r"div\.(full|approx)",
        "lifted": r"add\S*f32\s+\S+ \S+ 0f4B400000",
        "lowered": r"add\S*f32\s+\S+ \S+ 0fCB400000",
        "float64": r"add\S*\.f64",
        "fused": r"fma\.\S*f32",
        "wide_loads": r"ld\.global\S*\.v4\.b32",
        "wide_copies": r"cp\.async\.c[ag]\S* *\[.*?\], *\[.*?\], 0x10",
        "narrow_copies": r"cp\.async\.c[ag]\S* *\[.*?\], *\[.*?\], 0x[48]\b",
    }
    counts = {
        name: {what: len(re.findall(pattern, ptx)) for what, pattern in patterns.items()}
        for name, ptx in compiled.items()
    }
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
