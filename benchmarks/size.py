"""Bytes on disk of a BERT-base classifier, in every way a student can be stored.

    python benchmarks/size.py [--scheme ternary-a8] [--write] [--output FILE.json]

The model has the shape of ``BertConfig()`` with two labels. Sizes are computed from shapes, header
and digests included; ``--write`` also makes such a model with random weights, saves it in every
way, and fails unless each file has the size that was computed and every format loads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import tutelage
from tutelage._size import SizeReport, planned_size

LIMITS = {("bits", "float32"): 28.5, ("base3", "float32"): 23.3}
"""MiB that a BERT-base classifier may take."""

MIB = 2**20


def planned(scheme: str, encoding: str, rest: str) -> SizeReport:
    """Returns the computed size."""
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    return planned_size(
        "BERT-base, 2 labels", model, tutelage.Scheme.preset(scheme), encoding, rest
    )


def written(student: torch.nn.Module, encoding: str, rest: str) -> int:
    """Returns the size of a real file, after it was loaded."""
    with tempfile.TemporaryDirectory() as folder:
        out = tutelage.save(student, Path(folder) / "out", encoding=encoding, rest=rest)
        tutelage.load(out)
        return sum(file.stat().st_size for file in out.glob("*.safetensors"))


def main() -> None:
    """Prints a line for every way, and a table of the smallest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scheme", default="ternary-a8", choices=tutelage.Scheme.presets())
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    student = None
    if args.write:
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig()).eval()
        student = tutelage.prepare(model, tutelage.Scheme.preset(args.scheme))
    rows = []
    for encoding in ("bits", "base3"):
        for rest in ("float32", "bfloat16"):
            report = planned(args.scheme, encoding, rest)
            size = report.weight_bytes
            limit = LIMITS.get((encoding, rest))
            row = report.to_dict() | {
                "mib": round(size / MIB, 3),
                "float32_mib": round(report.float_bytes / MIB, 3),
                "ratio": round(report.float_bytes / size, 2),
                "limit_mib": limit,
            }
            if student is not None:
                row["written_bytes"] = written(student, encoding, rest)
                if row["written_bytes"] != size:
                    raise SystemExit(f"{row['written_bytes']:,} bytes written, {size:,} computed")
            rows.append(row)
            bound = "" if limit is None else f", at most {limit} wanted"
            print(
                f"{encoding:<6} {rest:<9} {size:>11,} bytes  {size / MIB:6.2f} MiB  "
                f"{row['ratio']:5.2f} times smaller{bound}"
            )
    print()
    kinds = [part["kind"] for part in rows[0]["parts"]]
    print(f"{'':<24}" + "".join(f"{r['encoding'] + ' ' + r['rest']:>18}" for r in rows))
    for place, kind in enumerate(kinds):
        print(f"{kind:<24}" + "".join(f"{r['parts'][place]['bytes']:>18,}" for r in rows))
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
