"""A recipe over several seeds: teacher and student, mean and spread.

    python benchmarks/accuracy.py RECIPE.yaml [key=value ...] --seeds 0 1 2 --output FILE.json

Every seed is a whole run: it fine-tunes a teacher (where the recipe's model has no head), trains
the student, saves it packed, reloads it and evaluates it. A finished run is not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from step_time import cpu_name

from tutelage.train.recipe import load_recipe
from tutelage.train.run import RunResult, run_recipe


def run(args: argparse.Namespace, seed: int) -> RunResult:
    """Runs the recipe with one seed."""
    base = load_recipe(args.recipe, args.overrides).output
    overrides = [*args.overrides, f"seed={seed}", f"data.seed={seed}", f"output={base}-seed{seed}"]
    return run_recipe(load_recipe(args.recipe, overrides), resume=True, report=print)


def row(result: RunResult) -> dict[str, Any]:
    """Returns the figures of one run."""
    metric = result.metric
    return {
        "seed": result.seed,
        "metric": metric,
        "teacher": result.teacher.metrics[metric],
        "student": result.student.metrics[metric],
        "agreement": result.agreement,
        "kl": result.kl,
        "also": {
            name: {
                "examples": further.examples,
                "teacher": further.teacher.get(metric),
                "student": further.student.get(metric),
                "kl": further.kl,
            }
            for name, further in result.also.items()
        },
        "teacher_bytes": result.teacher.bytes,
        "student_bytes": result.student.bytes,
        "seconds": result.seconds,
    }


def print_further(rows: list[dict[str, Any]]) -> None:
    """Prints teacher and student on the further evaluation data."""
    for name in rows[0]["also"]:
        found = [r["also"][name] for r in rows]
        print(f"{name}: teacher {spread([f['teacher'] for f in found])}", end="; ")
        print(f"student {spread([f['student'] for f in found])}", end="; ")
        print(f"difference {spread([f['student'] - f['teacher'] for f in found])}")


def spread(values: list[float]) -> str:
    """Returns mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} +- {deviation:.4f}"


def main() -> None:
    """Runs all seeds and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", type=Path)
    args = parser.parse_intermixed_args()
    results = [run(args, seed) for seed in args.seeds]
    rows = [row(result) for result in results]
    print("| seed | teacher | student | difference | agreement | KL | ratio |")
    print("|---|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['seed']} | {r['teacher']:.4f} | {r['student']:.4f} | "
            f"{r['student'] - r['teacher']:+.4f} | {r['agreement'] or 0:.4f} | {r['kl'] or 0:.4f} "
            f"| {r['teacher_bytes'] / r['student_bytes']:.1f} |"
        )
    print(f"teacher {spread([r['teacher'] for r in rows])}", end="; ")
    print(f"student {spread([r['student'] for r in rows])}", end="; ")
    print(f"difference {spread([r['student'] - r['teacher'] for r in rows])}")
    print_further(rows)
    if args.output:
        machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), **results[0].versions}
        record = {"recipe": args.recipe.name, "machine": machine, "rows": rows}
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
