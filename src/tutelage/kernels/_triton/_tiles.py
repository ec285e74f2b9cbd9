"""Block sizes of the products: which are tried, which fit, which serve untried."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import triton

from ._gemm import gemm_kernel
from ._gemv import gemv_kernel

__all__ = ["Tile", "gemm", "gemv", "tiles"]

_INTERPRETED = bool(triton.knobs.runtime.interpret)
Tile = tuple[int, int, int, int, int]
"""Tokens, outputs, bytes of a row of weights; warps, stages of loads."""

_TILES: tuple[Tile, ...] = (
    (8, 32, 256, 4, 4),
    (8, 16, 256, 4, 4),
    (8, 32, 128, 4, 5),
    (8, 64, 64, 4, 5),
    (8, 32, 64, 4, 3),
    (16, 32, 128, 4, 4),
    (16, 16, 128, 4, 5),
    (16, 64, 64, 4, 5),
    (32, 32, 128, 4, 4),
    (32, 64, 64, 4, 4),
    (32, 64, 32, 4, 4),
    (64, 128, 64, 8, 3),
    (64, 64, 128, 4, 3),
    (64, 64, 32, 4, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 128, 8, 2),
    (128, 128, 32, 8, 3),
    (128, 64, 64, 4, 3),
    (256, 128, 64, 8, 3),
    (256, 128, 32, 8, 3),
)
_ROWS = ((16, 1, 8), (8, 1, 8), (32, 1, 8), (16, 2, 8), (16, 4, 8), (32, 4, 8), (16, 2, 4))
"""Outputs a round, rounds and warps of a program for one token."""


def tiles(bucket: int, bits: int, terms: int, shared: int) -> list[Tile]:
    """Returns the tiles worth trying, a good guess first.

    Args:
        bucket: Tokens, rounded up to a power of two, at least 8.
        bits: Of a weight.
        terms: 16-bit numbers an activation is made of, 0 for int8 codes.
        shared: Bytes of shared memory that a program may have.
    """
    width = 8 // bits * (2 * terms if terms else 1)
    largest = min(bucket, 256)

    def fits(tile: Tile) -> bool:
        tokens, outputs, depth, _, stages = tile
        # Tensor cores of sm_90 read activations of the stage before while the next one lands.
        return depth * (outputs * (stages - 1) + tokens * width * stages) <= shared

    found = [tile for tile in _TILES if tile[0] <= largest and fits(tile)]
    tallest = max(tile[0] for tile in found)
    found = [tile for tile in found if tile[0] >= min(tallest // 2, 64)]
    return sorted(found, key=lambda tile: tile[0] != min(tallest, 128))


def gemm(tuned: bool, bucket: int, bits: int, terms: int) -> tuple[Any, dict[str, Any]]:
    """Returns the tiled kernel and the arguments that say its block sizes.

    Args:
        tuned: Whether the kernel times its tiles at the first call of a shape.
        bucket: As in ``tiles``.
        bits: As in ``tiles``.
        terms: As in ``tiles``.
    """
    if _INTERPRETED:
        return gemm_kernel, {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64}
    if tuned and _tuning():
        return _tuned_gemm(), {}
    return gemm_kernel, _config(tiles(bucket, bits, terms, _shared())[0]).all_kwargs()


def gemv(tuned: bool) -> tuple[Any, dict[str, Any]]:
    """Returns the kernel for one token and the arguments that say its block sizes.

    Args:
        tuned: As in ``gemm``.
    """
    if _INTERPRETED:
        return gemv_kernel, {"BLOCK_N": 8, "ROUNDS": 2}
    if tuned and _tuning():
        return _tuned_gemv(), {}
    rows, rounds, warps = _ROWS[0]
    return gemv_kernel, {
        "BLOCK_N": rows,
        "ROUNDS": rounds,
        "num_warps": warps,
        "num_stages": 1,
    }


def _tuning() -> bool:
    return os.environ.get("TUTELAGE_TRITON_TUNE", "1") != "0"


def _config(tile: Tile) -> Any:
    tokens, outputs, depth, warps, stages = tile
    blocks = {"BLOCK_M": tokens, "BLOCK_N": outputs, "BLOCK_K": depth}
    return triton.Config(blocks, num_warps=warps, num_stages=stages)


def _shared() -> int:
    properties: Any = torch.cuda.get_device_properties(torch.cuda.current_device())
    return int(properties.shared_memory_per_block_optin)


def _worth_trying(configs: list[Any], named: dict[str, Any], **constants: Any) -> list[Any]:
    given = named | constants
    kept = tiles(given["BUCKET"], given["BITS"], given["TERMS"], _shared())
    names = {str(_config(tile)) for tile in kept}
    return [config for config in configs if str(config) in names]


@functools.cache
def _tuned_gemm() -> Any:
    return triton.autotune(
        [_config(tile) for tile in _TILES],
        key=["BUCKET", "N", "WIDTH", "BITS", "TERMS"],
        prune_configs_by={"early_config_prune": _worth_trying},
        cache_results=True,
    )(gemm_kernel)


@functools.cache
def _tuned_gemv() -> Any:
    return triton.autotune(
        [
            triton.Config({"BLOCK_N": n, "ROUNDS": rounds}, num_warps=warps, num_stages=1)
            for n, rounds, warps in _ROWS
        ],
        key=["N", "WORDS", "BITS"],
        cache_results=True,
    )(gemv_kernel)
