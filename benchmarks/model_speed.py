"""Whole models beside int8 engines: ``tutelage bench`` with one thread and two, and without AMX.

    python benchmarks/model_speed.py DIR [--teacher DIR] [--threads 1 2] [--rounds 10]
                                     [--output benchmarks/results/model_speed.json]

Runs with AMX and, where the system lets a process refuse it, without: what a processor computes
that ends at AVX-512 VNNI. Of a folder its name alone is stored.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from layer_speed import refuse_amx


def measure(args: argparse.Namespace) -> None:
    """Prints the figures of one run as JSON."""
    if args.without_amx:
        refuse_amx()
    from tutelage.bench import run_bench

    found = run_bench(
        args.folder,
        teacher=args.teacher,
        threads=args.threads[0],
        rounds=args.rounds,
        cases=args.cases,
        report=lambda line: print(line, file=sys.stderr),
    ).to_dict()
    found["folder"] = Path(found["folder"]).name
    found["teacher"] = None if found["teacher"] is None else Path(found["teacher"]).name
    print(json.dumps({"without_amx": args.without_amx, **found}))


def show(found: dict[str, Any]) -> None:
    """Prints a table of one run."""
    amx = "without AMX" if found["without_amx"] else "as it is"
    print(f"\n{found['model']}, threads: {found['threads']}, processor {amx}")
    cases = found["cases"]
    print(f"{'engine':<18}{'weights MB':>11}{'disk MB':>9}{''.join(f'{c:>22}' for c in cases)}")
    for row in found["engines"]:
        if row["reason"]:
            print(f"{row['name']:<18}{row['reason']}")
            continue
        speeds = [row["speeds"][case] for case in cases]
        ratios = [s["ratio"] if s["ratio"] is not None else float("nan") for s in speeds]
        cells = [f"{s['ms']:>11.2f} ms {r:>5.2f} x" for s, r in zip(speeds, ratios, strict=True)]
        sizes = f"{row['weight_bytes'] / 1e6:>11.2f}{row['disk_bytes'] / 1e6:>9.2f}"
        print(f"{row['name']:<18}{sizes}{''.join(f'{cell:>22}' for cell in cells)}", flush=True)


def main() -> None:
    """Measures with every count of threads, each run in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", metavar="DIR")
    parser.add_argument("--teacher")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cases", default="1x32,32x128")
    parser.add_argument("--without-amx", action="store_true", help="only without")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.one:
        measure(args)
        return
    runs: list[dict[str, Any]] = []
    for without in (True,) if args.without_amx else (False, True):
        for threads in args.threads:
            command = [sys.executable, __file__, args.folder, "--one", "--threads", str(threads)]
            command += ["--rounds", str(args.rounds), "--cases", args.cases]
            command += ["--teacher", args.teacher] if args.teacher else []
            command += ["--without-amx"] if without else []
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            ended = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            runs.append(json.loads(ended.stdout.splitlines()[-1]))
            show(runs[-1])
            if args.output:
                args.output.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
