"""One process of a study: fine-tunes teachers, trains and measures students."""

from __future__ import annotations

import copy
import dataclasses
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from .._machine import processor_name
from .._prepare import prepare
from .._threads import threads
from ..errors import NonFiniteLossError, StudyError
from ..train._phases import obtain_teacher, train_student
from ..train._plan import Plan, make_losses, make_plan, make_schedule, make_scheme
from ..train.recipe import Recipe
from ._evaluation import Curve, Evaluator
from ._grid import Cell, evaluation_steps
from ._records import Point, Record

__all__ = ["Task", "machine", "make_teacher", "run_cell", "task_of", "train_cell"]


@dataclass(frozen=True)
class Task:
    """What the runs of a task share.

    Attributes:
        plan: Data and models.
        teacher: In eval mode.
        evaluator: Measures students.
    """

    plan: Plan
    teacher: nn.Module
    evaluator: Evaluator


_KEPT: dict[str, Task] = {}
"""The last task of this process, by its sections: reading and tokenizing take seconds."""


def _task(recipe: Recipe) -> Task:
    sections = recipe.model_dump_json(include={"model", "data", "teacher", "output"})
    if sections not in _KEPT:
        _KEPT.clear()
        transformers.set_seed(recipe.seed)  # a fresh head is drawn
        plan = make_plan(recipe, lambda line: None)
        plan.folder.mkdir(parents=True, exist_ok=True)
        if plan.augment is not None:
            raise StudyError(
                "a study does not augment its data; write the augmented texts with tutelage train "
                "first, and name them in data.train."
            )
        teacher, _ = obtain_teacher(plan, lambda line: None, None)
        teacher = teacher.to(_device()).eval()
        _KEPT[sections] = Task(plan, teacher, Evaluator(plan, teacher))
    return _KEPT[sections]


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def make_teacher(recipe: Recipe, count: int) -> None:
    """Fine-tunes the teacher of a task unless that was done, and measures it.

    Args:
        recipe: The recipe of one of the task's runs.
        count: CPU threads.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with threads(count):
        _task(recipe)


def run_cell(cell: Cell) -> tuple[Record, npt.NDArray[np.float32] | None]:
    """Makes one run.

    Args:
        cell: What is run.

    Returns:
        Its figures, and KL(teacher || student) of every evaluation example at its end. A loss or
        output that is not finite is a figure, too: the record says so.

    Raises:
        TutelageError: Anything else that is refused.
    """
    with threads(cell.recipe.threads or torch.get_num_threads()):
        task = _task(_shared(cell.recipe))
        start, failed = time.monotonic(), None
        points: tuple[Point, ...] = ()
        divergences = None
        try:
            points, divergences = _run(cell, task)
        except NonFiniteLossError as error:
            failed = str(error)
        record = Record(
            key=cell.key,
            task=cell.task,
            scheme=cell.scheme,
            method=cell.method,
            steps=cell.steps,
            learning_rate=cell.learning_rate,
            seed=cell.seed,
            metric=task.evaluator.metric,
            teacher=task.evaluator.teacher,
            points=points,
            seconds=round(time.monotonic() - start, 2),
            failed=failed,
            machine=machine(),
        )
    return record, divergences


def _shared(recipe: Recipe) -> Recipe:
    """Returns the recipe with what a method may say of the teacher left to the plan's own."""
    return recipe.model_copy(
        update={"teacher": recipe.teacher.model_copy(update={"cache": None}), "seed": 0}
    )


def _run(cell: Cell, task: Task) -> tuple[tuple[Point, ...], npt.NDArray[np.float32] | None]:
    if not cell.steps:
        source = task.plan.model if task.plan.model_has_head else task.teacher
        student = (
            prepare(copy.deepcopy(source), make_scheme(cell.recipe.student)).to(_device()).eval()
        )
        point, divergences = task.evaluator(student, 0)
        return (point,), divergences
    curve = Curve(task.evaluator, evaluation_steps(cell.steps, cell.points))
    _train(cell, task, [curve])
    return tuple(curve.points), curve.divergences


def _train(cell: Cell, task: Task, watchers: Sequence[TrainerCallback]) -> nn.Module:
    with tempfile.TemporaryDirectory(dir=task.plan.folder, prefix="run-") as folder:
        plan = dataclasses.replace(
            task.plan,
            recipe=cell.recipe,
            folder=Path(folder),
            scheme=make_scheme(cell.recipe.student),
            schedule=make_schedule(cell.recipe),
            losses=make_losses(cell.recipe.student),
        )
        return train_student(
            plan,
            task.teacher,
            lambda line: None,
            None,
            resume=False,
            watchers=watchers,
            store=False,
        )


def task_of(cell: Cell) -> Task:
    """Returns data, teacher and evaluation of a run's task; the teacher is trained if need be.

    Args:
        cell: The run.
    """
    return _task(_shared(cell.recipe))


def train_cell(cell: Cell, watchers: Sequence[TrainerCallback] = ()) -> nn.Module:
    """Makes a run and returns its student with latent weights, in eval mode; writes no record.

    Args:
        cell: What is run, with one step or more.
        watchers: Told of every step, see ``Trainer``.

    Raises:
        TutelageError: As ``run_cell``, and where a loss is not finite.
    """
    with threads(cell.recipe.threads or torch.get_num_threads()):
        return _train(cell, task_of(cell), watchers)


def machine() -> dict[str, object]:
    """Returns processor, threads and versions."""
    device = _device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
