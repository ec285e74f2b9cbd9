"""Packed linear layers on a CUDA device beside torch's bf16 layer, paired in one run.

    python benchmarks/gpu_kernels.py [--shapes 4096x4096 4096x11008] [--tokens 1 16 128 1024]
                                     [--rounds 15] [--output benchmarks/results/gpu_kernels.json]

It needs a CUDA device. Shapes are inputs x outputs, inputs are bf16. Every contender walks through
copies of its weight that together exceed the L2 cache several times, and ``do_bench`` clears the
cache before every run as well; "graph" is the time inside a CUDA graph, where no launch waits for
Python. A round times every contender once; ratios are medians of the ratios round by round. Shares
are of a copy and of large products measured in the same run. gemlite is timed where installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tutelage.kernels import triton_packed_linear, triton_status, triton_weight_only_linear
from tutelage.quantizers import BINARY, FOUR_LEVEL, TERNARY, Grid, pack

GRIDS = {"ternary-a8": TERNARY, "w2-a8": FOUR_LEVEL, "binary-a8": BINARY}
BASELINE = "torch bf16"


def rotating(bytes_each: int, make: Callable[[], Callable[[Tensor], Tensor]]) -> list[Any]:
    """Returns as many layers as together exceed the L2 cache four times, two at least."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return [make() for _ in range(max(2, -(-4 * cache // bytes_each)))]


def torch_layer(inputs: int, outputs: int) -> Callable[[Tensor], Tensor]:
    """Returns a bf16 layer of torch."""
    weight = torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda")
    return lambda x: torch.nn.functional.linear(x, weight)


def packed_layer(
    inputs: int, outputs: int, grid: Grid, *, weight_only: bool = False
) -> Callable[[Tensor], Tensor]:
    """Returns a layer of packed weights."""
    index = torch.randint(grid.levels, (outputs, inputs), device="cuda")
    packed = pack(index * grid.step + grid.lo, grid)
    scale = torch.rand(outputs, 1, device="cuda")
    if weight_only:
        return lambda x: triton_weight_only_linear(x, packed, scale, None, inputs, grid)
    return lambda x: triton_packed_linear(x, packed, scale, None, inputs, grid, 127)


def gemlite_layer(inputs: int, outputs: int) -> Callable[[Tensor], Tensor]:
    """Returns gemlite's layer of ternary weights and 8-bit activations."""
    from gemlite.helper import A8W158_INT_dynamic

    codes = torch.randint(-1, 2, (outputs, inputs), device="cuda").to(torch.bfloat16)
    scale = torch.tensor(0.02, device="cuda", dtype=torch.bfloat16)
    layer: Callable[[Tensor], Tensor] = A8W158_INT_dynamic(
        device="cuda:0", dtype=torch.bfloat16
    ).from_weights(codes, scale)
    return layer


def contenders(inputs: int, outputs: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """Returns what is compared: bytes of a weight, and how a layer is made."""
    count = inputs * outputs
    found: dict[str, tuple[int, Callable[[], Any]]] = {
        BASELINE: (2 * count, lambda: torch_layer(inputs, outputs))
    }
    for name, grid in GRIDS.items():
        found[name] = (
            count * grid.bits // 8,
            lambda grid=grid: packed_layer(inputs, outputs, grid),
        )
    found["ternary, weight only"] = (
        count // 4,
        lambda: packed_layer(inputs, outputs, TERNARY, weight_only=True),
    )
    try:
        import gemlite
    except ImportError:
        print("gemlite is not installed and not timed.")
    else:
        found[f"gemlite {gemlite.__version__} A8W158"] = (
            count // 4,
            lambda: gemlite_layer(inputs, outputs),
        )
    return found


def milliseconds(call: Callable[[], object], *, graph: bool = False) -> float:
    """Returns the median time of a call on the device."""
    from triton import testing

    if graph:
        return float(testing.do_bench_cudagraph(call, rep=20, return_mode="median"))
    return float(testing.do_bench(call, warmup=5, rep=20, return_mode="median"))


def peaks() -> dict[str, float]:
    """Measures a copy (bytes a second) and large products (operations a second)."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randint(-127, 128, (size, size), device="cuda", dtype=torch.int8)
    work = 2.0 * size**3
    return {
        "copy": 2.0 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3,
        "bf16": work / milliseconds(lambda: a @ a.t()) * 1e3,
        "int8": work / milliseconds(lambda: torch._int_mm(b, b.t())) * 1e3,
    }


def measure(
    inputs: int, outputs: int, tokens: int, rounds: int, peak: dict[str, float]
) -> list[dict[str, object]]:
    """Times all contenders at one shape, in turn, several rounds."""
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {}
    sizes: dict[str, int] = {}
    for name, (size, make) in contenders(inputs, outputs).items():
        following = itertools.cycle(rotating(size, make))
        calls[name], sizes[name] = (lambda following=following: next(following)(x)), size
        calls[name]()  # compiles and tunes
    times: dict[str, list[float]] = {name: [] for name in calls}
    graphs: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(milliseconds(call))
            graphs[name].append(milliseconds(call, graph=True))

    def ratios(of: dict[str, list[float]], name: str) -> list[float]:
        return [base / own for base, own in zip(of[BASELINE], of[name], strict=True)]

    rows: list[dict[str, object]] = []
    for name in calls:
        own, inside = statistics.median(times[name]), statistics.median(graphs[name])
        width = 2 if name == BASELINE or "gemlite" in name else 4
        moved = sizes[name] + tokens * (2 * inputs + width * outputs)
        kind = "bf16" if name == BASELINE or "only" in name else "int8"
        rows.append(
            {
                "inputs": inputs,
                "outputs": outputs,
                "tokens": tokens,
                "contender": name,
                "us": 1e3 * own,
                "graph_us": 1e3 * inside,
                "ratio": statistics.median(ratios(times, name)),
                "graph_ratio": statistics.median(ratios(graphs, name)),
                "ratio_min": min(ratios(times, name)),
                "ratio_max": max(ratios(times, name)),
                "share_of_copy": moved / inside * 1e3 / peak["copy"],
                "share_of_products": 2e3 * tokens * inputs * outputs / inside / peak[kind],
            }
        )
    return rows


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "4096x11008"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 1024])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels.py measures on a CUDA device, and torch sees none here.")
    if not triton_status().startswith("active"):
        sys.exit(f"There is nothing to measure: the Triton kernels are {triton_status()}.")
    import triton

    torch.manual_seed(0)
    peak = peaks()
    machine = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "copy_GBps": peak["copy"] / 1e9,
        "bf16_Tops": peak["bf16"] / 1e12,
        "int8_Tops": peak["int8"] / 1e12,
    }
    rows: list[dict[str, object]] = []
    for shape, tokens in itertools.product(args.shapes, args.tokens):
        inputs, outputs = map(int, shape.split("x"))
        rows += measure(inputs, outputs, tokens, args.rounds, peak)
        torch.cuda.empty_cache()
    print(" | ".join(f"{key} {value}" for key, value in machine.items()))
    print("| in x out | tokens | contender | us | x bf16 (min, max) | graph us | x bf16 | copy |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['inputs']} x {row['outputs']} | {row['tokens']} | {row['contender']} | "
            f"{row['us']:.1f} | {row['ratio']:.2f} ({row['ratio_min']:.2f}, "
            f"{row['ratio_max']:.2f}) | {row['graph_us']:.1f} | {row['graph_ratio']:.2f} | "
            f"{row['share_of_copy']:.0%} of bytes, {row['share_of_products']:.0%} of products |"
        )
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
