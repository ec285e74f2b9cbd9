"""Perplexity of language models on plain text, full-precision and packed ones side by side.

    python benchmarks/perplexity.py TEXT FOLDER [FOLDER ...] [--block 256] [--output FILE.json]

A folder is a model of transformers or one that Tutelage packed. The text is cut in blocks that do
not overlap, as ``tutelage evaluate`` cuts it. One model after another: memory holds one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from step_time import cpu_name

import tutelage
from tutelage.train._inference import measure
from tutelage.train._result import versions
from tutelage.train.recipe import DataSection
from tutelage.train.tasks.causal_lm import CausalLM


def load(folder: str) -> tuple[Any, bool]:
    """Returns a model and whether it is packed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if hasattr(AutoConfig.from_pretrained(folder), "quantization_config"):
        return tutelage.load(folder), True
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), False


def row(folder: str, section: DataSection) -> dict[str, Any]:
    """Measures one model."""
    model, packed = load(folder)
    begin = time.perf_counter()
    text = CausalLM.read_one(str(section.eval), section)
    task = CausalLM.of_model(model, section, text)
    tokenizer = CausalLM.load_processor(folder, model.config)
    data = task.encode(text, tokenizer, task.limit(section, [model], tokenizer))
    metrics = measure(task, data, tokenizer, model).metrics[0]
    return {
        "model": folder.rstrip("/"),
        "packed": packed,
        "blocks": len(data),
        "tokens": sum(data.length(index) for index in range(len(data))),
        **metrics,
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    """Measures all models and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("folders", nargs="+")
    parser.add_argument("--block", type=int, default=256, help="tokens of a block")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    section = DataSection(task="causal_lm", train=args.text, eval=args.text, max_length=args.block)
    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), **versions()}
    rows: list[dict[str, Any]] = []
    print("| model | perplexity | nats a token | tokens |\n|---|---|---|---|")
    for folder in args.folders:
        rows.append(row(folder, section))
        r = rows[-1]
        print(f"| {r['model']} | {r['perplexity']:.2f} | {r['loss']:.4f} | {r['tokens']} |")
        if args.output:
            text = json.dumps({"machine": machine, "block": args.block, "rows": rows}, indent=1)
            args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
