"""Runs: from a recipe to a small model with its figures."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from .._machine import machine
from .._prepare import prepared
from .._summary import summary
from .._threads import threads
from ..artefacts import load, save, weight_bytes, write_text
from ..artefacts._card import model_card
from ._inference import Measured, measure
from ._output import RECIPE_FILE, clear, portable, refuse_output, sweep, writing
from ._phases import ProgressFactory, obtain_teacher, train_student
from ._plan import Plan, make_plan
from ._result import Figures, FurtherFigures, RunResult, read_result, versions, write_result
from .recipe import Recipe, save_recipe

__all__ = ["Figures", "FurtherFigures", "RunResult", "read_result", "run_recipe"]

_PACKED = ".packed"


def run_recipe(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    resume: bool = False,
    report: Callable[[str], None] = lambda line: None,
    progress: ProgressFactory | None = None,
) -> RunResult:
    """Trains the student that a recipe describes, saves it, and measures what was saved.

    Everything is checked before anything is trained or written. The output folder then gets
    ``recipe.yaml``, ``teacher/`` (where it had to be fine-tuned), ``augmented.parquet`` (where the
    recipe asks for more texts), ``teacher-cache/`` (where it asks for stored answers, until the
    student is trained), ``checkpoints/``, ``training.json`` (the course of the losses; in
    ``teacher/``, too), the packed student, and at the very end ``result.json``. Killed at any
    moment and resumed, a run ends with the same weights as an uninterrupted one on the same machine
    with as many threads.

    Args:
        recipe: What is trained.
        overwrite: Replace an earlier run in the output folder; other files there stay.
        resume: Go on with the run in the output folder, or start it if there is none. A finished
            run's result is returned as it is.
        report: Called with a line at every phase.
        progress: Makes the display of a phase from its name; none by default.

    Returns:
        The figures that ``result.json`` holds.

    Raises:
        TutelageError: The recipe, its data or its models do not fit, or writing failed.
    """
    recipe = portable(recipe)
    folder = Path(recipe.output)
    refuse_output(recipe, overwrite=overwrite, resume=resume)
    if resume and (done := read_result(folder)) is not None:
        report(f"{folder} holds the finished run")
        return done
    from transformers import set_seed

    with threads(recipe.threads):
        set_seed(recipe.seed)
        plan = make_plan(recipe, report)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                clear(folder)
            sweep(folder)
            save_recipe(recipe, folder / RECIPE_FILE)
            return _run(plan, report, progress, resume=resume)


def _run(
    plan: Plan, report: Callable[[str], None], progress: ProgressFactory | None, *, resume: bool
) -> RunResult:
    seconds: dict[str, float] = {}
    with _clock(seconds, "teacher"):
        teacher, fine_tuned = obtain_teacher(plan, report, progress)
    if plan.augment is not None:
        with _clock(seconds, "augmentation"):
            plan = dataclasses.replace(plan, train=plan.augment(), augment=None)
    steps = plan.schedule.steps
    report(
        f"training the student: {plan.scheme.name}, {plan.recipe.student.max_steps} steps, "
        + (f"the teacher intervenes in the first {steps}" if steps else "without intervention")
    )
    with _clock(seconds, "student"):
        student = train_student(plan, teacher, report, progress, resume=resume)
    report(f"saving the student and evaluating what was saved on {len(plan.eval)} examples")
    packed = plan.folder / _PACKED
    save(student, packed, processor=plan.processor, overwrite=True)
    with _clock(seconds, "evaluation"):
        result = _measure(plan, teacher.eval(), packed, fine_tuned=fine_tuned)
    result = result.model_copy(update={"seconds": seconds})
    total, scheme = summary(student), cast("Any", prepared(student)).scheme.name
    figures = _card_figures(result)
    card = model_card(
        type(student).__name__, scheme, total.packed_bytes, total.float_bytes, figures
    )
    write_text(packed / "README.md", card)
    _publish(packed, plan.folder)
    write_result(result, plan.folder)
    return result


def _measure(plan: Plan, teacher: nn.Module, packed: Path, *, fine_tuned: bool) -> RunResult:
    device = next(teacher.parameters()).device
    student = load(packed).to(device)
    measured = measure(plan.task, plan.eval, plan.processor, student, teacher)
    also = {
        name: _further(measure(plan.task, data, plan.processor, student, teacher), len(data))
        for name, data in plan.eval_also.items()
    }
    count = sum(p.numel() for p in teacher.parameters())
    return RunResult(
        folder=str(plan.folder),
        task=plan.task.kind,
        metric=plan.task.metric,
        scheme=plan.scheme.name,
        train_examples=len(plan.train),
        eval_examples=len(plan.eval),
        teacher=Figures(metrics=measured.metrics[1], bytes=4 * count, parameters=count),
        student=Figures(metrics=measured.metrics[0], bytes=weight_bytes(packed), parameters=count),
        teacher_fine_tuned=fine_tuned,
        agreement=measured.agreement,
        kl=measured.kl,
        also=also,
        seconds={},
        seed=plan.recipe.seed,
        threads=torch.get_num_threads(),
        versions=versions(),
        machine=machine(),
    )


def _further(measured: Measured, examples: int) -> FurtherFigures:
    student, teacher = measured.metrics
    return FurtherFigures(
        examples=examples,
        teacher=teacher,
        student=student,
        agreement=measured.agreement,
        kl=measured.kl,
    )


def _card_figures(result: RunResult) -> dict[str, Any]:
    figures: dict[str, Any] = dict(result.student.metrics)
    if result.metric in result.teacher.metrics:
        figures[f"{result.metric} of the teacher"] = result.teacher.metrics[result.metric]
    if result.agreement is not None:
        figures["agreement with the teacher"] = result.agreement
        figures["KL from the teacher"] = result.kl
    for name, found in result.also.items():
        figures |= {f"{metric} ({name})": value for metric, value in found.student.items()}
    return figures


def _publish(packed: Path, folder: Path) -> None:
    """Moves the packed files to the top of the folder, the weights last."""
    for file in sorted(packed.iterdir(), key=lambda f: (f.suffix == ".safetensors", f.name)):
        os.replace(file, folder / file.name)
    packed.rmdir()


@contextlib.contextmanager
def _clock(seconds: dict[str, float], phase: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[phase] = round(time.monotonic() - start, 1)
