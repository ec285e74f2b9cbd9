"""Spoils saved students in thousands of seeded ways and loads them.

    python tests/artefacts/fuzz.py [--cases 10000] [--seed 0] [--output FILE.json]

Every case must load to the logits of the original, bit for bit, or raise a ``TutelageError``, in
bounded time and memory. Where that is transformers' own ``from_pretrained``, any exception will do.
A process of its own runs the cases, so that a crash is found and named, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import transformers
from mutations import LARGE, MUTATIONS

import tutelage
from helpers import inputs_of, make_batch, make_student, same_bits
from tutelage.artefacts import weight_bytes
from tutelage.errors import TutelageError

SECONDS = 20.0
"""A case that takes longer hangs."""

SLACK = 2**18
"""Bytes of Python objects and of the allocator that do not depend on the file."""

VOCABULARY = 30_000


class Hang(BaseException):
    """No ``except Exception`` may swallow it."""


def make_originals(root: Path) -> tuple[list[Path], list[Path]]:
    """Writes the students that are spoilt, and others whose files are mixed in."""
    shape: dict[str, Any] = {"width": 64, "heads": 4, "layers": 1}

    def student(
        family: str = "bert", preset: str = "ternary-a8", seed: int = 0, **more: Any
    ) -> Any:
        from helpers import redraw, tiny_config

        config = tiny_config(family, **(shape | more))
        config.vocab_size = VOCABULARY
        model = getattr(transformers, f"{family.capitalize()}ForSequenceClassification")(config)
        redraw(model, seed)
        return tutelage.prepare(model.eval(), tutelage.Scheme.preset(preset))

    first = student()
    originals = [
        tutelage.save(first, root / "bits"),
        tutelage.save(first, root / "small", encoding="base3", rest="bfloat16"),
        root / "shards",
    ]
    first.save_pretrained(root / "shards", max_shard_size="200KB")
    others = [
        tutelage.save(student(seed=1), root / "other-seed"),
        tutelage.save(student(preset="w2-a8"), root / "other-scheme"),
        tutelage.save(student(layers=2), root / "other-depth"),
        tutelage.save(make_student("distilbert"), root / "other-family"),
        root / "other-shards",
    ]
    student(seed=2).save_pretrained(root / "other-shards", max_shard_size="200KB")
    return originals, [*originals, *others]


@contextlib.contextmanager
def limited_time() -> Iterator[None]:
    """Raises ``Hang`` after ``SECONDS``."""

    def stop(*_: Any) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


class Peak:
    """Bytes by which the memory of the process grew at most since ``reset``; Linux only."""

    def __init__(self) -> None:
        self.works = Path("/proc/self/clear_refs").exists()

    def reset(self) -> None:
        if self.works:
            Path("/proc/self/clear_refs").write_text("5")
            self._before = _status("VmRSS")

    def read(self) -> int:
        return _status("VmHWM") - self._before if self.works else 0


class Fuzzer:
    """Runs cases; each is determined by seed and number."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed, self.peak = root, seed, Peak()
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.originals, self.others = make_originals(root)
        self.batch = inputs_of(make_batch())
        self.want = [self.logits(tutelage.load(folder)) for folder in self.originals]
        for folder in self.originals:
            self._plain(folder)
        self.sizes = [weight_bytes(folder) for folder in self.originals]

    @torch.no_grad()
    def logits(self, model: Any) -> torch.Tensor:
        return model(**self.batch).logits

    @staticmethod
    def _plain(folder: Path) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            auto = transformers.AutoModelForSequenceClassification
            return auto.from_pretrained(folder, local_files_only=True).eval()

    def run(self, number: int) -> dict[str, Any]:
        """Returns what became of a case: mutation, outcome by either loader, seconds, bytes."""
        draw = random.Random(f"{self.seed}-{number}")
        name = list(MUTATIONS)[number % len(MUTATIONS)]
        which = draw.randrange(len(self.originals))
        folder = self.root / "case"
        shutil.copytree(self.originals[which], folder)
        try:
            others = [other for other in self.others if other != self.originals[which]]
            MUTATIONS[name](draw, folder, others)
            row = {"number": number, "mutation": name, "original": self.originals[which].name}
            row |= self._try(tutelage.load, folder, which, TutelageError)
            if name not in LARGE:
                plain = self._try(self._plain, folder, which, Exception)
                row["plain"] = plain["outcome"]
                row["plain_detail"] = plain.get("detail")
        finally:
            shutil.rmtree(folder)
        return row

    def _try(self, load: Any, folder: Path, which: int, fine: Any) -> dict[str, Any]:
        started = time.perf_counter()
        self.peak.reset()
        detail = None
        try:
            with limited_time(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = load(folder)
                grown = self.peak.read()
                same = same_bits(self.logits(model), self.want[which])
            outcome = "equal" if same else "WRONG"
        except Hang:
            outcome, grown = "HANG", self.peak.read()
        except fine as error:
            outcome, grown = "refused", self.peak.read()
            detail = f"{type(error).__name__}: {error}"
        except BaseException as error:
            outcome, grown = "ESCAPED", self.peak.read()
            detail = f"{type(error).__name__}: {error}"[:500]
        if outcome in ("equal", "refused") and grown > 2 * self.sizes[which] + SLACK:
            outcome = "MEMORY"
        seconds = time.perf_counter() - started
        relative = grown / self.sizes[which]
        return {
            "outcome": outcome,
            "detail": detail,
            "seconds": round(seconds, 4),
            "bytes": grown,
            "times_the_size": round(relative, 3),
        }


GOOD = {"equal", "refused"}


def is_bad(row: dict[str, Any]) -> bool:
    """Whether a case found something."""
    return row["outcome"] not in GOOD or row.get("plain", "equal") not in GOOD


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns counts by mutation and outcome, and the extremes."""
    by = {name: Counter(r["outcome"] for r in rows if r["mutation"] == name) for name in MUTATIONS}
    return {
        "cases": len(rows),
        "outcomes": dict(Counter(row["outcome"] for row in rows)),
        "plain": dict(Counter(row["plain"] for row in rows if "plain" in row)),
        "by_mutation": {name: dict(counts) for name, counts in by.items()},
        "slowest_seconds": max(row["seconds"] for row in rows),
        "largest_bytes": max(row["bytes"] for row in rows),
        "largest_times_the_size": max(row["times_the_size"] for row in rows),
        "bad": [row for row in rows if is_bad(row)],
    }


def _work(cases: range, seed: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        fuzzer = Fuzzer(Path(root), seed)
        for number in cases:
            print(f"start {number}", flush=True)
            print(json.dumps(fuzzer.run(number)), flush=True)


def _crashed(number: int, code: int) -> dict[str, Any]:
    name = list(MUTATIONS)[number % len(MUTATIONS)]
    return {"number": number, "mutation": name, "outcome": "CRASH", "detail": f"exit code {code}",
            "seconds": 0.0, "bytes": 0, "times_the_size": 0.0}  # fmt: skip


def _tell(rows: list[dict[str, Any]]) -> None:
    if is_bad(rows[-1]):
        print(json.dumps(rows[-1]), file=sys.stderr)
    if len(rows) % 500 == 0:
        print(f"{len(rows)} cases", file=sys.stderr)


def run_cases(cases: int, seed: int) -> list[dict[str, Any]]:
    """Runs cases in a process of their own, a new one after a crash."""
    rows: list[dict[str, Any]] = []
    first = 0
    while first < cases:
        command = [sys.executable, __file__, "--worker", str(first), str(cases), str(seed)]
        begun = None
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("start "):
                    begun = int(line.split()[1])
                elif line.startswith("{"):
                    rows.append(json.loads(line))
                    _tell(rows)
            code = process.wait()
        if code == 0:
            break
        if begun is None:
            raise SystemExit("the cases could not be made; see above")
        rows.append(_crashed(begun, code))
        first = begun + 1
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", nargs=3, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        first, last, seed = args.worker
        _work(range(first, last), seed)
        return
    started = time.perf_counter()
    found = summary(run_cases(args.cases, args.seed)) | {"seed": args.seed}
    found["seconds"] = round(time.perf_counter() - started, 1)
    for name, counts in found["by_mutation"].items():
        print(f"{name:<18}" + "  ".join(f"{k} {v}" for k, v in sorted(counts.items())))
    print(json.dumps({k: v for k, v in found.items() if k not in ("by_mutation", "bad")}))
    if args.output:
        args.output.write_text(json.dumps(found, indent=1) + "\n")
    if found["bad"]:
        raise SystemExit(f"{len(found['bad'])} of {found['cases']} cases went wrong")


if __name__ == "__main__":
    main()
