"""Cost of a quantization-aware step beside a plain fine-tuning step, paired in one run.

    python benchmarks/step_time.py [--threads 2] [--repeats 15] [--output benchmarks/results/...]

Random weights of the MiniLM-L6 shape serve: speed does not depend on their values. Every repeat
times one plain step (forward, backward, clipping, AdamW, dropout on) and one step of each stage,
in turn; the ratio is the median of the ratios pair by pair.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import tutelage
from tutelage.intervention import stages

MODELS = {
    "minilm-l6": {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536},
    "minilm-l3": {"hidden_size": 384, "num_hidden_layers": 3, "intermediate_size": 1536},
    "bert-base": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072},
}


def make_batch(config: BertConfig, rows: int, tokens: int) -> dict[str, Tensor]:
    """Returns a full batch without padding."""
    return {
        "input_ids": torch.randint(1, config.vocab_size, (rows, tokens)),
        "attention_mask": torch.ones(rows, tokens, dtype=torch.long),
        "labels": torch.randint(0, config.num_labels, (rows,)),
    }


def seconds(call: Callable[[], object]) -> float:
    """Returns the wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def plain_step(model: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Returns a fine-tuning step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(args: argparse.Namespace, rows: int, tokens: int) -> list[dict[str, object]]:
    """Times all stages at one batch shape."""
    torch.manual_seed(0)
    config = BertConfig(num_attention_heads=12, num_labels=6, **MODELS[args.model])
    teacher = BertForSequenceClassification(config)
    student = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset(args.scheme))
    plain = copy.deepcopy(teacher)
    batch = make_batch(config, rows, tokens)
    baseline = plain_step(plain.train(), batch)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
    train_step = tutelage.TrainStep(tutelage.Distiller(student.train(), teacher), optimizer)
    times: dict[str, list[tuple[float, float]]] = {stage: [] for stage in stages()}
    for repeat in range(args.repeats + 2):
        for stage, pairs in times.items():
            pair = (seconds(baseline), seconds(lambda s=stage: train_step(batch, s)))
            if repeat >= 2:
                pairs.append(pair)
    return [
        {
            "model": args.model,
            "scheme": args.scheme,
            "rows": rows,
            "tokens": tokens,
            "stage": stage,
            "plain_ms": 1e3 * statistics.median(p for p, _ in pairs),
            "qat_ms": 1e3 * statistics.median(q for _, q in pairs),
            "ratio": statistics.median(q / p for p, q in pairs),
            "ratio_min": min(q / p for p, q in pairs),
            "ratio_max": max(q / p for p, q in pairs),
        }
        for stage, pairs in times.items()
    ]


def cpu_name() -> str:
    """Returns the processor's name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def main() -> None:
    """Runs the benchmark and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="minilm-l6")
    parser.add_argument("--scheme", default="ternary-a8")
    parser.add_argument("--shapes", nargs="+", default=["16x32", "32x64"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--float32-products", action="store_true", help="as without VNNI or AMX")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.float32_products:
        tutelage.kernels._integer._int8_is_fast = lambda: False
    torch.set_num_threads(args.threads)
    rows: list[dict[str, object]] = []
    for shape in args.shapes:
        batch, tokens = map(int, shape.split("x"))
        rows += measure(args, batch, tokens)
    machine = {
        "cpu": cpu_name(),
        "threads": args.threads,
        "integer_products": tutelage.kernels.active_path(torch.device("cpu")),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(" | ".join(f"{key} {value}" for key, value in machine.items()))
    print("| batch | stage | plain ms | QAT ms | ratio (median) | min | max |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['rows']} x {row['tokens']} | {row['stage']} | {row['plain_ms']:.0f} | "
            f"{row['qat_ms']:.0f} | {row['ratio']:.2f} | {row['ratio_min']:.2f} | "
            f"{row['ratio_max']:.2f} |"
        )
    if args.output:
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
