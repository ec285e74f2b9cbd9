"""What each process of a measurement does."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, cast

import numpy as np

from ..errors import TutelageError
from ._cases import Case, default_cases, make_inputs, parse_cases, sample
from ._engine import Engine, Runner
from ._models import class_of, first_line, is_decoder, load_plain
from ._registry import ENGINES
from ._timing import paired_rounds, timed
from ._torch import TorchRunner
from ._workspace import Workspace

__all__ = ["convert", "latency", "prepare", "residence"]

_PROMPT = 32


def prepare(work: Workspace) -> None:
    """Makes inputs, the outputs that others are compared with, and a twin if there is no teacher.

    Args:
        work: Where things are; gets ``"model"``.

    Raises:
        TutelageError: The folder holds no packed model, or the options do not fit it.
    """
    from ..artefacts import load

    student = load(work.student)
    given = work.plan.cases
    cases = default_cases(student) if given is None else parse_cases(given, student)
    for case in cases:
        work.store_inputs(case.label, make_inputs(student, case))
    of_sample = sample(student, cases)
    work.store_inputs("sample", of_sample)
    np.save(work.root / "output-student.npy", TorchRunner(student).output(of_sample))
    decoder = is_decoder(student)
    if decoder:
        longest = max(case.tokens or 1 for case in cases)
        prompt = make_inputs(student, Case(1, min(_PROMPT, longest)), seed=2)
        work.store_inputs("prompt", prompt)
    if work.plan.teacher is None:
        from ..exporters._layers import twin

        cast("Any", twin(student)).save_pretrained(work.teacher)
    teacher = load_plain(work.teacher)
    np.save(work.root / "output-teacher.npy", TorchRunner(teacher).output(of_sample))
    work.put(
        "model",
        {"cases": [asdict(c) for c in cases], "decoder": decoder, "class": type(student).__name__},
    )


def convert(work: Workspace) -> None:
    """Converts the models for every engine.

    Args:
        work: Where things are; gets ``"convert"``: by name why it failed, ``None`` if it is ready.
    """
    ended: dict[str, str | None] = {}
    for name in work.plan.engines:
        ended[name] = _attempt(partial(_convert_one, ENGINES[name], work))
        work.put("convert", ended)
        gc.collect()


def _convert_one(engine: Engine, work: Workspace) -> None:
    engine.require()
    engine.convert(work)


def _attempt(action: Callable[[], None]) -> str | None:
    try:
        action()
    except TutelageError as error:
        return str(error)
    except Exception as error:  # of any library: a row with the reason
        return f"{type(error).__name__}: {first_line(error)}"
    return None


def residence(work: Workspace, name: str) -> None:
    """Loads one engine in a process of its own: load time, memory, and the check.

    Args:
        work: Where things are; gets ``"residence-NAME"``.
        name: Of the engine.
    """
    engine = ENGINES[name]
    found: dict[str, Any] = {}

    def act() -> None:
        engine.require()
        _import_all(engine, work)
        smallest = min(work.cases, key=lambda case: (case.batch, case.tokens or 0))
        inputs = work.inputs(smallest.label)
        before = _resident()
        start = time.perf_counter()
        runner = engine.load(work)
        found["load_s"] = time.perf_counter() - start
        runner.run(runner.prepare(inputs))
        found["rss_bytes"] = _resident() - before
        found["disk_bytes"] = sum(file.stat().st_size for file in engine.files(work))
        found.update(_verified(engine, runner, work))
        found["weight_bytes"] = runner.weight_bytes()

    reason = _attempt(act)
    work.put(f"residence-{name}", {"reason": reason} if reason else found)


def _import_all(engine: Engine, work: Workspace) -> None:
    """Imports what loading would, so that memory and time are those of the model."""
    import importlib

    for module in engine.library:
        importlib.import_module(module)
    if not engine.library:
        import torch

        from ..artefacts import _huggingface

        class_of(work.student if engine.source == "student" else work.teacher)
        _huggingface.register()
        torch.ones(64, 64) @ torch.ones(64, 64)


def _resident() -> int:
    """Returns the resident bytes of this process, after free memory went back to the system."""
    import psutil

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return int(psutil.Process().memory_info().rss)


def _verified(engine: Engine, runner: Runner, work: Workspace) -> dict[str, Any]:
    """Returns how the engine computes and how near its outputs are.

    Raises:
        BenchError: It is not what its name says, or its outputs are wrong.
    """
    from ..errors import BenchError

    output = runner.output(work.inputs("sample")).astype(np.float64)
    computes = runner.check()
    reference = np.load(work.root / f"output-{engine.source}.npy").astype(np.float64)
    if output.shape != reference.shape or not np.isfinite(output).all():
        raise BenchError(f"its output is not finite or of shape {output.shape}")
    size = max(float(np.linalg.norm(reference)), 1e-12)
    error = float(np.linalg.norm(output - reference)) / size
    if error > engine.tolerance:
        raise BenchError(f"its outputs are off by {100 * error:.2g} % of those in torch")
    agreement = float((output.argmax(-1) == reference.argmax(-1)).mean())
    return {"compression": computes, "error": error, "agreement": agreement}


def latency(work: Workspace, names: tuple[str, ...]) -> None:
    """Times engines side by side in this one process.

    Args:
        work: Where things are; gets ``"latency"``.
        names: Engines that could be loaded.
    """
    import torch

    plan = work.plan
    torch.set_num_threads(plan.threads)
    runners: dict[str, Runner] = {}
    reasons: dict[str, str] = {}

    def start(name: str) -> None:
        runner = ENGINES[name].load(work)
        _verified(ENGINES[name], runner, work)
        runners[name] = runner

    for name in names:
        reason = _attempt(partial(start, name))
        if reason is not None:
            reasons[name] = reason
    found: dict[str, dict[str, list[float]]] = {}

    def turns(
        calls: dict[str, Callable[[], object]],
        measure: Callable[[Callable[[], object]], float] = timed,
    ) -> dict[str, list[float]]:
        times, failed = paired_rounds(calls, plan.rounds, plan.pause, measure)
        for name, error in failed.items():
            reasons[name] = f"{type(error).__name__}: {first_line(error)}"
            del runners[name]
        return times

    for case in work.cases:
        inputs = work.inputs(case.label)
        found[case.label] = turns(
            {name: partial(r.run, r.prepare(inputs)) for name, r in runners.items()}
        )
    speeds: dict[str, list[float]] = {}
    if work.get("model")["decoder"] and plan.new_tokens:
        prompt = work.inputs("prompt")
        able = {n: r for n, r in runners.items() if r.generates}
        times = turns(
            {n: partial(r.generate, prompt, plan.new_tokens) for n, r in able.items()}, _once
        )
        speeds = {n: [plan.new_tokens / seconds for seconds in each] for n, each in times.items()}
    work.put("latency", {"seconds": found, "tokens_per_s": speeds, "reasons": reasons})


def _once(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
