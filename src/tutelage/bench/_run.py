"""Starting the processes of a measurement and putting their figures together."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .._machine import processor_name
from ..errors import BenchError
from ._registry import ENGINES, chosen
from ._result import BenchResult, EngineFigures, Speed
from ._timing import ratio
from ._worker import REFUSED
from ._workspace import Plan, Workspace

__all__ = ["collect", "run_bench"]

Report = Callable[[str], None]
_LIBRARIES = ("torch", "transformers", "onnxruntime", "openvino")


def run_bench(
    folder: str | Path,
    *,
    teacher: str | Path | None = None,
    engines: str | None = None,
    threads: int = 1,
    rounds: int = 10,
    cases: str | None = None,
    new_tokens: int = 32,
    report: Report = lambda line: None,
) -> BenchResult:
    """Measures a saved student beside other engines that run its teacher.

    Latency is measured in one process, in rounds in which every engine has its turn; memory and
    load time in a fresh process each. An engine that fails, or that does not compute as its name
    says, is a row with the reason.

    Args:
        folder: Folder of a packed model.
        teacher: Folder of the full-precision model; by default ``folder/teacher``, and where
            there is none a full-precision twin of the student.
        engines: Names separated by commas, ``None`` for all of ``ENGINES``.
        threads: Of every engine.
        rounds: Of the latency measurement.
        cases: Sizes of batch such as ``"1x32,32x128"``, for images ``"1,32"``.
        new_tokens: Tokens that decoders generate, 0 for no generation.
        report: Called with a line about every part of the work.

    Raises:
        BenchError: An option is wrong, or the teacher cannot be loaded.
        ArtefactError: The folder holds no packed model.
    """
    folder = Path(folder).resolve()
    names = chosen(engines)
    if threads < 1 or rounds < 1 or new_tokens < 0:
        raise BenchError("threads and rounds must be at least 1, and new_tokens at least 0.")
    if teacher is None and (folder / "teacher" / "config.json").is_file():
        teacher = folder / "teacher"
    elif teacher is not None and not (Path(teacher) / "config.json").is_file():
        raise BenchError(f"{teacher} holds no config.json; name the teacher's folder.")
    given = None if teacher is None else str(Path(teacher).resolve())
    with tempfile.TemporaryDirectory(prefix="tutelage-bench-") as root:
        plan = Plan(str(folder), given, names, threads, rounds, cases, new_tokens)
        work = Workspace.start(Path(root), plan)
        report("converting")
        ended = _process(work, "prepare")
        if work.get("model") is None:
            raise BenchError(f"the models could not be prepared: {ended or 'no result'}.")
        converted: dict[str, str | None] = work.get("convert") or {}
        lost = ended or "its conversion left no result"
        failed = {n: r for n in names if (r := converted.get(n, lost)) is not None}
        for name in names:
            if name not in failed:
                report(f"loading {name}")
                ended = _process(work, "residence", name)
                found = work.get(f"residence-{name}") or {"reason": ended}
                if "reason" in found:
                    failed[name] = found["reason"] or "its process left no result"
        left = [name for name in names if name not in failed]
        if left:
            report(f"timing {', '.join(left)}")
            ended = _process(work, "latency", *left)
            if work.get("latency") is None:
                failed.update(dict.fromkeys(left, ended or "the timing left no result"))
        return collect(work, failed)


def _process(work: Workspace, job: str, *names: str) -> str | None:
    """Runs a job in a process with limited threads; returns why it ended, ``None`` if it is well.

    Raises:
        BenchError: The library refused.
    """
    threads = str(work.plan.threads)
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    ended = subprocess.run(
        [sys.executable, "-m", "tutelage.bench._worker", job, str(work.root), *names],
        env={**os.environ, **limits, "TOKENIZERS_PARALLELISM": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if ended.returncode == 0:
        return None
    lines = ended.stderr.strip().splitlines() or [f"the process ended with {ended.returncode}"]
    if ended.returncode == REFUSED:
        raise BenchError(lines[-1])
    return f"its process ended with {ended.returncode}: {lines[-1].strip()}"


def collect(work: Workspace, failed: dict[str, str]) -> BenchResult:
    """Puts the figures of all processes together.

    Args:
        work: Where their results are.
        failed: Reasons by engine.
    """
    model, timed = work.get("model"), work.get("latency") or {}
    reasons = {**failed, **timed.get("reasons", {})}
    plan, cases = work.plan, work.cases
    seconds: dict[str, dict[str, list[float]]] = timed.get("seconds", {})
    best = {label: _fastest_int8(each, reasons) for label, each in seconds.items()}
    rows = []
    for name in plan.engines:
        engine = ENGINES[name]
        row: dict[str, Any] = {"name": name, "title": engine.title, "source": engine.source}
        if name in reasons:
            rows.append(EngineFigures(**row, reason=reasons[name]))
            continue
        speeds = {
            case.label: _speed(case.batch, seconds[case.label], name, best[case.label])
            for case in cases
        }
        tokens = timed["tokens_per_s"].get(name)
        rows.append(
            EngineFigures(
                **row,
                **work.get(f"residence-{name}"),
                speeds=speeds,
                tokens_per_s=statistics.median(tokens) if tokens else None,
            )
        )
    return BenchResult(
        folder=plan.student,
        model=model["class"],
        teacher=plan.teacher,
        threads=plan.threads,
        rounds=plan.rounds,
        new_tokens=plan.new_tokens if model["decoder"] and plan.new_tokens else None,
        cases=[case.label for case in cases],
        best_int8={label: name for label, name in best.items() if name is not None},
        engines=rows,
        versions=_versions(),
        machine={"processor": processor_name(), "cores": os.cpu_count()},
    )


def _fastest_int8(seconds: dict[str, list[float]], reasons: dict[str, str]) -> str | None:
    able = [name for name in seconds if ENGINES[name].int8 and name not in reasons]
    return min(able, key=lambda name: statistics.median(seconds[name]), default=None)


def _speed(batch: int, seconds: dict[str, list[float]], name: str, best: str | None) -> Speed:
    own = seconds[name]
    median = statistics.median(own)
    spread = ratio(seconds[best], own) if best is not None else None
    return Speed(
        ms=1e3 * median,
        examples_per_s=batch / median,
        ratio=None if spread is None else spread.median,
        ratio_low=None if spread is None else spread.low,
        ratio_high=None if spread is None else spread.high,
        rounds_ms=[1e3 * s for s in own],
    )


def _versions() -> dict[str, str]:
    from .. import __version__

    found = {"python": platform.python_version(), "tutelage": __version__}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
