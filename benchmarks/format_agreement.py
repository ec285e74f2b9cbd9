"""How near the formats of other engines come to saved students, on the data of their recipes.

    python benchmarks/format_agreement.py DIR [DIR ...] [--examples N] [--formats NAME ...]
                                          [--output benchmarks/results/format_agreement.json]

Every student is exported in every format, and each file is run in a process of its own over the
same batches; where the format promises to do without this library, the process asserts that the
library was never imported. Reported beside the size: the task's accuracy, the share of equal
labels, the mean KL(student || engine), and the largest difference of a logit. A format that
refuses a student is a row with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]
FORMATS: dict[str, tuple[str | None, dict[str, Any], str]] = {
    "packed": (None, {}, ""),
    "packed, fused": (None, {}, ""),
    "compressed-tensors": ("compressed-tensors", {}, "model"),
    "onnx": ("onnx", {}, "model.onnx"),
    "onnx, matmulnbits": ("onnx", {"kernel": "matmulnbits"}, "model.onnx"),
    "onnx, float attention": ("onnx", {"quantized_attention": False}, "model.onnx"),
    "openvino": ("openvino", {}, "model.xml"),
    "gguf": ("gguf", {"encoding": "tq2_0"}, "model.gguf"),
}
"""By name: format, options and file of ``tutelage.export``."""


def run_torch(path: Path, fused: bool | None) -> Callable[[Arrays], np.ndarray]:
    """Returns a model of transformers, loaded with this library or, if ``fused`` is None, not."""
    import torch

    if fused is None:
        import transformers

        config = json.loads((path / "config.json").read_text())
        model = getattr(transformers, config["architectures"][0]).from_pretrained(path).eval()
    else:
        import tutelage

        model = tutelage.load(path)
        model = tutelage.fuse(model) if fused else model

    def run(batch: Arrays) -> np.ndarray:
        with torch.inference_mode():
            return model(**{k: torch.from_numpy(v) for k, v in batch.items()}).logits.numpy()

    return run


def run_onnx(path: Path) -> Callable[[Arrays], np.ndarray]:
    """Returns a session of ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return lambda batch: session.run(["logits"], {name: batch[name] for name in names})[0]


def run_openvino(path: Path) -> Callable[[Arrays], np.ndarray]:
    """Returns a model compiled by OpenVINO."""
    import openvino

    model = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [next(iter(value.names)) for value in model.inputs]
    return lambda batch: model({name: batch[name] for name in names})["logits"]


def run(name: str, path: Path, work: Path) -> None:
    """Runs one format over the batches; the whole of a fresh process."""
    kind = FORMATS[name][0]
    if kind is None or kind == "compressed-tensors":
        call = run_torch(path, None if kind else name.endswith("fused"))
    else:
        call = {"onnx": run_onnx, "openvino": run_openvino}[kind](path)
    found, seconds = {}, 0.0
    for file in sorted(work.glob("batch-*.npz")):
        batch = dict(np.load(file))
        call(batch)
        start = time.perf_counter()
        found[file.stem] = call(batch)
        seconds += time.perf_counter() - start
    assert kind is None or "tutelage" not in sys.modules, f"{name} needed this library"
    np.savez(work / "found.npz", seconds=seconds, **found)


def store_batches(folder: Path, work: Path, limit: int) -> tuple[Any, list[Any]]:
    """Writes the batches of a student's evaluation data; returns the student and the labels."""
    import tutelage
    from tutelage.train.recipe import load_recipe
    from tutelage.train.tasks import TASKS

    section = load_recipe(folder / "recipe.yaml").data
    kind = TASKS[section.task]
    examples = kind.read(section)[1]
    model = tutelage.load(folder)
    task = kind.of_model(model, section, examples)
    processor = kind.load_processor(str(folder), model.config)
    data = task.encode(examples, processor, task.limit(section, [model], processor))
    collate, labels = task.collator(processor), []
    for number, start in enumerate(range(0, min(limit, len(data)), 25)):
        rows = [data[row] for row in range(start, min(start + 25, limit, len(data)))]
        batch = dict(collate(rows))
        labels.append(batch.pop("labels", None))
        arrays = {name: value.numpy() for name, value in batch.items()}
        np.savez(work / f"batch-{number:04d}.npz", **arrays)
    return model, labels


def reference(model: Any, work: Path) -> dict[str, np.ndarray]:
    """Returns the student's own logits."""
    import torch

    found = {}
    with torch.inference_mode():
        for file in sorted(work.glob("batch-*.npz")):
            batch = {k: torch.from_numpy(v) for k, v in np.load(file).items()}
            found[file.stem] = model(**batch).logits.numpy()
    return found


def compare(wanted: dict[str, np.ndarray], got: Any, work: Path, labels: list[Any]) -> Any:
    """Returns the figures of one format; padding counts in none."""
    equal, divergence, right, judged, count, largest = 0, 0.0, 0, 0, 0, 0.0
    for (name, expected), truth in zip(wanted.items(), labels, strict=True):
        mask = np.load(work / f"{name}.npz").get("attention_mask")
        pair = [expected.astype(np.float64), got[name].astype(np.float64)]
        if expected.ndim == 3:
            pair = [values[mask.astype(bool)] for values in pair]
        p, q = (v - np.logaddexp.reduce(v, -1, keepdims=True) for v in pair)
        divergence += float((np.exp(p) * (p - q)).sum())
        equal += int((pair[0].argmax(-1) == pair[1].argmax(-1)).sum())
        largest = max(largest, float(np.abs(pair[0] - pair[1]).max()))
        count += len(pair[0])
        if truth is not None and expected.ndim == 2:
            right += int((pair[1].argmax(-1) == truth.numpy()).sum())
            judged += len(truth)
    return {
        "predictions": count,
        "accuracy": right / judged if judged else None,
        "labels_equal": equal / count,
        "kl": divergence / count,
        "largest_difference": largest,
    }


def measure(folder: Path, name: str, student: Any, work: Path) -> dict[str, Any]:
    """Exports a student, runs it elsewhere, and returns size and time."""
    import tutelage

    kind, options, file = FORMATS[name]
    path = folder if kind is None else work / name.replace(", ", "-").replace(" ", "-") / file
    if kind is not None:
        tutelage.export(student, path, format=kind, **options)
    weights = [path] if path.is_file() else list(path.glob("*.safetensors"))
    weights += [path.with_suffix(".bin")] if path.suffix == ".xml" else []
    row: dict[str, Any] = {"bytes": sum(file.stat().st_size for file in weights)}
    if kind == "gguf":
        return {**row, "reason": "not run: llama.cpp is no package of Python"}
    command = [sys.executable, __file__, "--run", name, str(path), str(work)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        return {**row, "reason": ended.stderr.strip().splitlines()[-1]}
    return row


def examine(folder: Path, names: list[str], limit: int) -> dict[str, Any]:
    """Returns the rows of one student."""
    from tutelage.errors import TutelageError

    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        work = Path(root)
        student, labels = store_batches(folder, work, limit)
        wanted = reference(student, work)
        for name in names:
            (work / "found.npz").unlink(missing_ok=True)
            try:
                rows[name] = measure(folder, name, student, work)
            except TutelageError as error:
                rows[name] = {"reason": str(error)}
            if (work / "found.npz").exists():
                got = np.load(work / "found.npz")
                rows[name] |= compare(wanted, got, work, labels)
            print(folder.name, name, json.dumps(rows[name]), flush=True)
    return {"folder": folder.name, "class": type(student).__name__, "formats": rows}


def main() -> None:
    """Measures every folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--examples", type=int, default=500, help="at most, of each student")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    from step_time import cpu_name

    from tutelage.train._result import versions

    rows = []
    for folder in args.folders:
        rows.append(examine(folder, args.formats, args.examples))
        if args.output:
            machine = {"cpu": cpu_name(), "cores": os.cpu_count(), **versions()}
            text = json.dumps({"machine": machine, "students": rows}, indent=1)
            args.output.write_text(text + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
