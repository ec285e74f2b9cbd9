"""Speed of one quantized Linear beside packaged int8 and 2-bit engines, paired in one run.

    python benchmarks/layer_speed.py [--threads 1] [--shapes 384x384 ...] [--rows 1 8 ...]
                                     [--rounds 9] [--without-amx]
                                     [--output benchmarks/results/...]

Weights are ternary, eight different layers in rotation, activations are quantized to 8 bits a
token inside every engine. Every round times all engines in turn; a ratio is the median of the
ratios round by round. Speed does not depend on the values. OpenVINO runs as it does by default on
this processor (``auto``, bfloat16 where there is AMX) and in float32; that each of its layers ran
compressed is asserted. The ceilings are measured on the same core in the same run.

``--without-amx`` makes the kernel of Linux refuse this process the tiles of AMX, so that every
engine, this library included, computes as on a processor that ends at AVX-512 VNNI.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Call = Callable[[Any], object]
LAYERS = 8
SHAPES = ["384x384", "384x1536", "1536x384", "768x768", "768x3072", "3072x768"]
ROWS = [1, 8, 32, 128, 1024]


def parse() -> argparse.Namespace:
    """Returns the command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="inputs x outputs")
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.03, help="for one engine in one round")
    parser.add_argument("--without-amx", action="store_true")
    parser.add_argument("--output", type=Path)
    return parser.parse_args()


def refuse_amx() -> None:
    """Makes every later request of this process for AMX fail."""
    load, jump_if, answer = 0x20, 0x15, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | errno.EPERM
    program = [
        (load, 0, 0, 0),  # number of the system call
        (jump_if, 0, 3, 158),  # arch_prctl
        (load, 0, 0, 16),  # its first argument
        (jump_if, 0, 1, 0x1023),  # ARCH_REQ_XCOMP_PERM
        (answer, 0, 0, refuse),
        (answer, 0, 0, allow),
    ]
    packed = b"".join(struct.pack("HBBI", *step) for step in program)
    steps = ctypes.create_string_buffer(packed, len(packed))
    header = struct.pack("HxxxxxxP", len(program), ctypes.addressof(steps))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_filter = 38, 22
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_filter, 2, header, 0, 0):
        raise OSError(ctypes.get_errno(), "this system does not let a process filter its calls")
    amx_tile_data = 18
    assert libc.syscall(158, 0x1023, amx_tile_data), "AMX is still granted"


def ceilings(names: list[str]) -> dict[str, float]:
    """Returns GOP/s of one core, by instruction set."""
    source = Path(__file__).parent / "native" / "ceiling.cpp"
    flags = {"vnni": [], "amx": ["-mamx-tile", "-mamx-int8"]}
    flags = {name: flags[name] for name in names}
    found = {}
    with tempfile.TemporaryDirectory() as work:
        for name, more in flags.items():
            built = Path(work) / f"{name}.so"
            command = ["g++", "-O3", "-shared", "-fPIC", "-mavx512f", "-mavx512bw", "-mavx512vnni"]
            subprocess.run([*command, *more, str(source), "-o", str(built)], check=True)
            measure = getattr(ctypes.CDLL(str(built)), f"{name}_ceiling")
            measure.restype = ctypes.c_double
            found[name] = max(measure() for _ in range(5))
    return found


def openvino_layer(codes: Any, scale: Any, kind: str, precision: str | None, threads: int) -> Call:
    """Returns a layer of OpenVINO whose weights are ``u2`` or ``i8``, asserted to run so."""
    import numpy as np
    import openvino as ov
    import openvino.opset13 as op

    rows, width = codes.shape
    x = op.parameter([-1, width], np.float32)
    if kind == "u2":
        index = (codes + 1).astype(np.uint8).reshape(-1, 4)
        packed = index[:, 0] | index[:, 1] << 2 | index[:, 2] << 4 | index[:, 3] << 6
        weight = op.constant(ov.Tensor(packed, ov.Shape([rows, width]), ov.Type.u2))
        zero = op.constant(ov.Tensor(np.array([1], np.uint8), ov.Shape([1, 1]), ov.Type.u2))
        weight = op.subtract(op.convert(weight, np.float32), op.convert(zero, np.float32))
    else:
        weight = op.convert(op.constant(codes.astype(np.int8)), np.float32)
    y = op.matmul(x, op.multiply(weight, op.constant(scale)), False, True)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": width,
    }
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    compiled = ov.Core().compile_model(ov.Model([y], [x], "layer"), "CPU", settings)
    ran = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    ran = [info for info in ran if str(info["layerType"].value) == "FullyConnected"]
    kinds = [str(info["runtimePrecision"].value) for info in ran]
    assert kinds == [kind], f"OpenVINO ran {kinds} in place of {kind}"
    request = compiled.create_infer_request()

    def call(value: Any) -> object:
        request.set_input_tensor(ov.Tensor(value, shared_memory=True))
        request.infer()
        return request.get_output_tensor().data

    return call


def onnxruntime_layer(codes: Any, scale: Any) -> Call:
    """Returns ``DynamicQuantizeLinear`` and ``MatMulInteger`` of ONNX Runtime."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    rows, width = codes.shape
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["both"]),
        helper.make_node("Mul", ["f", "both"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", rows])],
        [
            numpy_helper.from_array(codes.T.astype(np.int8).copy(), "w"),
            numpy_helper.from_array(scale.reshape(-1), "ws"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    # Eight pools, each of whose threads spins after its work, would be in each other's way.
    options.use_per_session_threads = False
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda value: session.run(None, {"x": value})[0]


def torch_layer(codes: Any, scale: Any) -> Call:
    """Returns torch's dynamically quantized Linear."""
    import torch

    layer = torch.nn.Linear(codes.shape[1], codes.shape[0], bias=False)
    layer.weight.data = torch.from_numpy(codes * scale)
    kinds = {torch.nn.Linear}
    quantized = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(layer), kinds)
    assert "dynamic" in type(quantized[0]).__module__
    return quantized


def our_layer(codes: Any, scale: Any, isa: int) -> Call:
    """Returns the compiled kernel on one instruction set."""
    import torch

    from tutelage.kernels import packed_linear, to_panels
    from tutelage.quantizers._grid import TERNARY

    rows, width = codes.shape
    panels = to_panels((torch.from_numpy(codes) + 1).to(torch.uint8), TERNARY.bits)
    scales = torch.from_numpy(scale)
    return lambda x: packed_linear(x, panels, scales, None, rows, width, TERNARY, 127, isa=isa)


def make_engines(rows: int, width: int, threads: int, paths: list[str]) -> dict[str, list[Call]]:
    """Returns eight layers of every engine, by name."""
    import numpy as np

    from tutelage.kernels import native

    draw = np.random.default_rng(0)
    weights = [
        (
            draw.integers(-1, 2, (rows, width)).astype(np.float32),
            draw.random((rows, 1), dtype=np.float32) + 0.5,
        )
        for _ in range(LAYERS)
    ]
    assert native().active, native().reason
    engines = {}
    for name in paths:
        isa = native().isas.index(name)
        engines[f"tutelage {name}"] = [our_layer(*pair, isa) for pair in weights]
    for kind in ("u2", "i8"):
        for precision in (None, "f32"):
            engines[f"openvino {kind} {precision or 'auto'}"] = [
                openvino_layer(*pair, kind, precision, threads) for pair in weights
            ]
    engines["onnxruntime int8"] = [onnxruntime_layer(*pair) for pair in weights]
    engines["torch int8"] = [torch_layer(*pair) for pair in weights]
    return engines


def time_rounds(
    engines: dict[str, list[Call]], count: int, width: int, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Returns microseconds of one product, for every engine and round."""
    import torch

    x = torch.randn(count, width)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(arguments.rounds):
        for name, layers in engines.items():
            value = x.numpy() if name.startswith(("openvino", "onnx")) else x
            for layer in layers:
                layer(value)
            calls, start = 0, time.perf_counter()
            while True:
                for layer in layers:
                    layer(value)
                calls += len(layers)
                passed = time.perf_counter() - start
                if passed > arguments.seconds:
                    break
            times[name].append(1e6 * passed / calls)
            if arguments.threads > 1:
                time.sleep(0.01)  # threads of one engine spin for a while after their work
    return times


def summarize(
    shape: str, count: int, times: dict[str, list[float]], top: dict[str, float], threads: int
) -> dict[str, Any]:
    """Returns medians, ratios by round, and the share of the ceilings."""
    width, rows = map(int, shape.split("x"))
    theirs = [name for name in times if not name.startswith("tutelage")]
    rounds = range(len(next(iter(times.values()))))
    row: dict[str, Any] = {
        "shape": shape,
        "rows": count,
        "microseconds": {name: statistics.median(values) for name, values in times.items()},
    }
    for name in times:
        if not name.startswith("tutelage"):
            continue
        short = name.removeprefix("tutelage ")
        u2 = [
            min(v[r] for n, v in times.items() if n.startswith("openvino u2")) / times[name][r]
            for r in rounds
        ]
        best = [min(times[n][r] for n in theirs) / times[name][r] for r in rounds]
        speed = 2e-3 * count * width * rows / statistics.median(times[name])
        limit = top["amx" if short.startswith("amx") and count > 3 else "vnni"] * threads
        row[short] = {
            "over_openvino_u2": statistics.median(u2),
            "over_best": statistics.median(best),
            "gop_per_second": speed,
            "share_of_ceiling": speed / limit,
            "share_of_vnni_ceiling": speed / (top["vnni"] * threads),
        }
    row["best_other"] = min(theirs, key=lambda name: row["microseconds"][name])
    return row


def main() -> None:
    """Runs the benchmark and prints a line for every shape and count of rows."""
    arguments = parse()
    if os.environ.get("OMP_NUM_THREADS") != str(arguments.threads):
        # It is read when torch is imported.
        environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
        sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)
    import warnings

    if arguments.without_amx:
        refuse_amx()
    import onnxruntime
    import torch

    from tutelage.kernels import native

    warnings.filterwarnings("ignore")  # of torch, about the end of its quantized tensors
    torch.set_num_threads(arguments.threads)
    onnxruntime.set_global_thread_pool_sizes(arguments.threads, 1)
    paths = [name for name in native().isas if name.startswith(("amx", "avx512"))]
    top = ceilings(["vnni", "amx"] if any(name.startswith("amx") for name in paths) else ["vnni"])
    print(f"ceilings of a core, GOP/s: {', '.join(f'{k} {v:.0f}' for k, v in top.items())}")
    result: dict[str, Any] = {
        "threads": arguments.threads,
        "without_amx": arguments.without_amx,
        "rounds": arguments.rounds,
        "machine": {"processor": _processor(), "cores": os.cpu_count(), "os": platform.system()},
        "versions": {n: version(n) for n in ("torch", "openvino", "onnxruntime", "tutelage")},
        "ceilings_gop_per_second": top,
        "results": [],
    }
    with torch.inference_mode():
        for shape in arguments.shapes:
            width, rows = map(int, shape.split("x"))
            engines = make_engines(rows, width, arguments.threads, paths)
            for count in arguments.rows:
                times = time_rounds(engines, count, width, arguments)
                row = summarize(shape, count, times, top, arguments.threads)
                result["results"].append(row)
                _show(row)
                if arguments.output is not None:
                    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _show(row: dict[str, Any]) -> None:
    ours = {k: v for k, v in row.items() if isinstance(v, dict) and "over_best" in v}
    parts = [
        f"{name} {row['microseconds'][f'tutelage {name}']:.1f} us, {v['over_openvino_u2']:.2f} x "
        f"OpenVINO u2, {v['over_best']:.2f} x best, {100 * v['share_of_ceiling']:.0f} % of ceiling"
        for name, v in ours.items()
    ]
    best = row["best_other"]
    print(
        f"{row['shape']:>9} rows {row['rows']:>4}: {'; '.join(parts)}; best other {best} "
        f"{row['microseconds'][best]:.1f} us",
        flush=True,
    )


if __name__ == "__main__":
    main()
