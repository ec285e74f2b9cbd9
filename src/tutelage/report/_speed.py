"""A quick look at speed: student and teacher in torch, in turns."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from .._machine import machine
from .._threads import threads
from ..artefacts import load
from ..bench._cases import default_cases, make_inputs
from ..bench._timing import Ratio, paired_rounds, ratio
from ..bench._torch import TorchRunner
from ..errors import UnsupportedModelError
from ..nn import fuse

__all__ = ["QuickCase", "QuickSpeed", "quick_speed"]

_ROUNDS = 5
_PAUSE = 0.02


@dataclass(frozen=True)
class QuickCase:
    """Speed at one size of batch.

    Attributes:
        label: The size, ``"32x128"`` for 32 examples of 128 tokens.
        milliseconds: Median over rounds of a batch, by name: ``"teacher"``, ``"student"`` and,
            where its blocks can be fused, ``"student-fused"``.
        ratios: Times faster than the teacher, by name.
    """

    label: str
    milliseconds: dict[str, float]
    ratios: dict[str, Ratio]


@dataclass(frozen=True)
class QuickSpeed:
    """What was measured.

    Attributes:
        cases: By size of batch.
        threads: Threads of torch.
        rounds: Turns of each model.
        machine: Processor and cores.
    """

    cases: tuple[QuickCase, ...]
    threads: int
    rounds: int
    machine: str


def quick_speed(folder: Path, teacher: nn.Module) -> QuickSpeed:
    """Times the student of a folder beside its teacher, on one CPU thread.

    Args:
        folder: The student's.
        teacher: The full-precision model; it is moved to the CPU.

    Raises:
        UnsupportedModelError: The model takes something else than text, images or speech.
    """
    runners = {"teacher": TorchRunner(teacher.cpu()), "student": TorchRunner(load(folder))}
    with contextlib.suppress(UnsupportedModelError):
        runners["student-fused"] = TorchRunner(fuse(load(folder)))
    found = []
    with threads(1):
        for case in default_cases(runners["student"].model):
            inputs = make_inputs(runners["student"].model, case)
            calls: dict[str, Callable[[], object]] = {
                name: partial(r.run, r.prepare(inputs)) for name, r in runners.items()
            }
            times, failed = paired_rounds(calls, _ROUNDS, _PAUSE)
            for error in failed.values():
                raise error
            found.append(
                QuickCase(
                    label=case.label,
                    milliseconds={n: 1e3 * statistics.median(t) for n, t in times.items()},
                    ratios={n: ratio(times["teacher"], t) for n, t in times.items()},
                )
            )
    here = machine()
    return QuickSpeed(tuple(found), 1, _ROUNDS, f"{here['processor']}, {here['cores']} cores")
