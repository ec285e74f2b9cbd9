"""Cost of a quantization-aware step beside a plain fine-tuning step, paired in one run.

    python benchmarks/step_time.py [--model minilm-l6] [--threads 2] [--repeats 15] [--profile]
        [--variants plain-bf16 live ...] [--output benchmarks/results/step_time.json]

Random weights serve: speed does not depend on their values. Every repeat times one plain
fine-tuning step in float32 (forward, backward, clipping, AdamW, dropout on) and one step of a
variant, in X
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import multiprocessing
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor, nn

import tutelage
from tutelage.distill import SAMPLE_IDS, CudaRecorder
from tutelage.intervention import stages

MODELS = {
    "minilm-l6": ("bert", {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}),
    "minilm-l3": ("bert", {"hidden_size": 384, "num_hidden_layers": 3, "intermediate_size": 1536}),
    "bert-base": ("bert", {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}),
    "vit-s": ("vit", {"hidden_size": 384, "num_hidden_layers": 12, "intermediate_size": 1536}),
    "llama-135m": (
        "llama",
        {
            "hidden_size": 576,
            "num_hidden_layers": 30,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    ),
}
VARIANTS = {
    "plain-bf16": "plain fine-tuning under autocast to bfloat16",
    "plain-bf16-graphed": "the same as one CUDA graph",
    "live": "live teacher",
    "live-bf16-teacher": "live teacher in bfloat16",
    "bf16": "live teacher, both under autocast to bfloat16",
    "compiled": "live teacher, the student through torch.compile",
    "cached": "cached teacher, float32",
    "cached-int8": "cached teacher, int8",
    "graphed": "live teacher, the step as a CUDA graph",
    "graphed-bf16": "the same, both under autocast to bfloat16",
    "graphed-cached": "cached teacher, the step as a CUDA graph",
}


_PROFILED = 3


def make(name: str) -> nn.Module:
    """Returns a model of a shape, with random weights."""
    kind, shape = MODELS[name]
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(num_labels=6, **{"num_attention_heads": 12, **shape})
        return transformers.BertForSequenceClassification(config)
    if kind == "vit":
        config = transformers.ViTConfig(num_labels=6, num_attention_heads=6, **shape)
        return transformers.ViTForImageClassification(config)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(pad_token_id=0, **shape))


def make_batch(name: str, rows: int, tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Returns a full batch without padding; of images the number of tokens is the model's."""
    kind = MODELS[name][0]
    if kind == "vit":
        batch = {"pixel_values": torch.randn(rows, 3, 224, 224)}
        batch["labels"] = torch.randint(0, 6, (rows,))
    else:
        ids = torch.randint(1, 30000, (rows, tokens))
        batch = {"input_ids": ids, "attention_mask": torch.ones(rows, tokens, dtype=torch.long)}
        batch["labels"] = ids if kind == "llama" else torch.randint(0, 6, (rows,))
    return {key: value.to(device) for key, value in batch.items()}


def autocast(device: torch.device, on: bool) -> Any:
    """Returns autocast to bfloat16, or nothing."""
    return torch.autocast(device.type, torch.bfloat16) if on else contextlib.nullcontext()


def optimizer_of(model: nn.Module, fused: bool, graphed: bool = False) -> torch.optim.Optimizer:
    """Returns AdamW, in torch's default form or in one fused pass."""
    settings = {name: True for name, on in (("fused", fused), ("capturable", graphed)) if on}
    return torch.optim.AdamW(model.parameters(), lr=1e-4, **settings)


def plain(
    args: argparse.Namespace, batch: dict[str, Tensor], half: bool, graphed: bool = False
) -> Callable[[], object]:
    """Returns a fine-tuning step."""
    device = batch["labels"].device
    model = make(args.model).to(device).train()
    optimizer = optimizer_of(model, args.fused, graphed)

    def step() -> None:
        with autocast(device, half):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if not graphed:
        return step
    recorder = CudaRecorder()
    recorder.warm_up(step, 3)
    return recorder.record(step)


def variant(
    args: argparse.Namespace, name: str, batch: dict[str, Tensor], stage: str, folder: Path
) -> Callable[[], object]:
    """Returns a quantization-aware step."""
    device = batch["labels"].device
    teacher = make(args.model).to(device)
    student = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset(args.scheme))
    if args.checkpointing:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    student.train()
    half = torch.bfloat16 if name == "live-bf16-teacher" else torch.float32
    distiller = tutelage.Distiller(student, tutelage.LiveTeacher(teacher, dtype=half))
    if "cached" in name:
        rows = torch.arange(len(batch["labels"]))
        inputs = {k: v for k, v in batch.items() if k != "labels"} | {SAMPLE_IDS: rows}
        codec = "int8" if name == "cached-int8" else "float32"
        cached = tutelage.CachedTeacher.build(
            folder / f"{name}-{stage}", distiller, [inputs], stages=[stage], codec=codec
        )
        distiller = tutelage.Distiller(student, cached)
        batch = inputs
        del teacher
    train_step = tutelage.TrainStep(distiller, optimizer_of(student, args.fused))
    graphed = tutelage.GraphedTrainStep(train_step) if name.startswith("graphed") else None

    model = torch.compile(student) if name == "compiled" else None
    given: Any = batch
    if args.micro_batches > 1:
        parts = {key: value.chunk(args.micro_batches) for key, value in batch.items()}
        given = [dict(zip(parts, part, strict=True)) for part in zip(*parts.values(), strict=True)]

    def step() -> object:
        with autocast(device, name.endswith("bf16")):
            if graphed is not None:
                return graphed(batch, stage)
            return train_step(given, stage, model=model)

    return step


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Returns the wall time of one call."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(args: argparse.Namespace, rows: int, tokens: int) -> list[dict[str, object]]:
    """Times all variants and stages at one batch shape."""
    device = torch.device(args.device)
    batch = make_batch(args.model, rows, tokens, device)
    if "pixel_values" in batch:
        tokens = (224 // 16) ** 2 + 1
    baseline = plain(args, batch, half=False)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.variants:
            for stage in args.stages if name in ("live", "cached") else args.stages[:1]:
                if name.startswith("plain-bf16"):
                    graphed = name.endswith("graphed")
                    call, stage = plain(args, batch, half=True, graphed=graphed), "-"
                else:
                    call = variant(args, name, batch, stage, Path(folder))
                pairs = []
                for repeat in range(args.repeats + 2):
                    pair = seconds(baseline, device), seconds(call, device)
                    if repeat >= 2:
                        pairs.append(pair)
                del call
                row = {
                    "model": args.model,
                    "scheme": args.scheme,
                    "rows": rows,
                    "tokens": tokens,
                    "variant": name,
                    "stage": stage,
                    "plain_ms": 1e3 * statistics.median(p for p, _ in pairs),
                    "step_ms": 1e3 * statistics.median(q for _, q in pairs),
                    "ratio": statistics.median(q / p for p, q in pairs),
                    "ratio_min": min(q / p for p, q in pairs),
                    "ratio_max": max(q / p for p, q in pairs),
                }
                if args.memory:
                    row["peak_mib"] = peak(args, name, rows, tokens, stage)
                found.append(row)
                print(line(row), flush=True)
    return found


def line(row: dict[str, Any]) -> str:
    """Returns a row of the table."""
    memory = f" {row['peak_mib']:.0f} |" if "peak_mib" in row else ""
    return (
        f"| {row['rows']} x {row['tokens']} | {row['variant']} | {row['stage']} | "
        f"{row['plain_ms']:.1f} | {row['step_ms']:.1f} | {row['ratio']:.2f} | "
        f"{row['ratio_min']:.2f} | {row['ratio_max']:.2f} |{memory}"
    )


def peak(args: argparse.Namespace, name: str, rows: int, tokens: int, stage: str) -> float:
    """Returns the peak memory of a variant's steps, in MiB, measured in a fresh process."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    given = (args, name, rows, tokens, stage, sender)
    process = context.Process(target=_peak, args=given)
    process.start()
    found = float(receiver.recv())
    process.join()
    return found


class Watch(threading.Thread):
    """Keeps the largest resident size of this process."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest, self._over = 0, threading.Event()

    def run(self) -> None:
        process = psutil.Process()
        while not self._over.wait(0.002):
            self.largest = max(self.largest, process.memory_info().rss)

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.largest


def _peak(
    args: argparse.Namespace, name: str, rows: int, tokens: int, stage: str, sender: Any
) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    batch = make_batch(args.model, rows, tokens, device)
    before, watch = psutil.Process().memory_info().rss, Watch()
    with tempfile.TemporaryDirectory() as folder:
        if name.startswith("plain"):
            half, graphed = name.startswith("plain-bf16"), name.endswith("graphed")
            call = plain(args, batch, half=half, graphed=graphed)
        else:
            call = variant(args, name, batch, stage, Path(folder))
        watch.start()
        for _ in range(3):
            call()
    found = torch.cuda.max_memory_allocated() if device.type == "cuda" else watch.stop() - before
    sender.send(found / 2**20)


def profile_of(args: argparse.Namespace, rows: int, tokens: int) -> list[dict[str, object]]:
    """Prints and returns where the time of a step goes, of the first variant and stage."""
    from torch.profiler import ProfilerActivity, profile

    device = torch.device(args.device)
    batch = make_batch(args.model, rows, tokens, device)
    with tempfile.TemporaryDirectory() as folder:
        step = variant(args, args.variants[0], batch, args.stages[0], Path(folder))
        for _ in range(2):
            step()
        kinds = [ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        with profile(activities=kinds) as found:
            for _ in range(_PROFILED):
                step()
    key = f"self_{device.type}_time_total" if device.type == "cpu" else "self_device_time_total"
    averages = sorted(found.key_averages(), key=lambda event: -getattr(event, key))
    total = sum(getattr(event, key) for event in averages)
    table: list[dict[str, object]] = []
    print("| operation | ms a step | share | calls a step |\n|---|---|---|---|")
    for event in averages[:25]:
        spent = getattr(event, key)
        row = {
            "operation": event.key,
            "ms": spent / 1e3 / _PROFILED,
            "share": spent / total,
            "calls": event.count / _PROFILED,
        }
        table.append(row)
        print("| {operation} | {ms:.2f} | {share:.1%} | {calls:.0f} |".format(**row))
    return table


def device_name(device: torch.device) -> str:
    """Returns the processor's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for row in info.read_text().splitlines():
            if row.startswith("model name"):
                return row.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="minilm-l6")
    parser.add_argument("--scheme", default="ternary-a8")
    parser.add_argument("--shapes", nargs="+", default=["16x32", "32x64"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["live", "cached"])
    parser.add_argument("--stages", nargs="+", default=list(stages()))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fused", action="store_true", help="AdamW in one fused pass, for all")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--micro-batches", type=int, default=1, help="a step adds up so many")
    parser.add_argument("--memory", action="store_true", help="measure peak memory, too")
    parser.add_argument("--profile", action="store_true", help="say where the time goes")
    parser.add_argument("--float32-products", action="store_true", help="as without VNNI or AMX")
    parser.add_argument("--tf32", action="store_true", help="float32 products in TF32, for all")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.float32_products:
        tutelage.kernels._integer._int8_is_fast = lambda: False
    if args.tf32:
        torch.set_float32_matmul_precision("high")
    torch.set_num_threads(args.threads)
    machine = {
        "device": device_name(torch.device(args.device)),
        "threads": args.threads,
        "integer_products": tutelage.kernels.active_path(torch.device(args.device)),
        "optimizer": "fused AdamW" if args.fused else "AdamW",
        "checkpointing": args.checkpointing,
        "micro_batches": args.micro_batches,
        "float32_products": torch.get_float32_matmul_precision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(" | ".join(f"{key} {value}" for key, value in machine.items()))
    memory = " peak MiB |" if args.memory else ""
    print(f"| batch | variant | stage | plain ms | step ms | ratio (median) | min | max |{memory}")
    print("|---|---|---|---|---|---|---|---|" + ("---|" if args.memory else ""))
    rows: list[dict[str, object]] = []
    memories: dict[str, float] = {}
    profiles: dict[str, list[dict[str, object]]] = {}
    for shape in args.shapes:
        batch, tokens = map(int, shape.split("x"))
        rows += measure(args, batch, tokens)
        if args.memory:
            memories[shape] = peak(args, "plain", batch, tokens, "-")
            print(f"plain fine-tuning: {memories[shape]:.0f} MiB at most")
        if args.profile:
            profiles[shape] = profile_of(args, batch, tokens)
    found = {"machine": machine, "rows": rows}
    if memories:
        found["plain_peak_mib"] = memories
    if profiles:
        found["profile"] = profiles
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
