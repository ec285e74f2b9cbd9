"""Teacher, student and data of a run, loaded again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..study._folder import load_teacher
from ..train._models import encode_for
from ..train.recipe import Recipe
from ..train.tasks import TASKS, Task, TaskDataset

__all__ = ["Pair", "load_pair"]


@dataclass(frozen=True)
class Pair:
    """What is compared.

    Attributes:
        student: The packed student, in eval mode.
        teacher: The full-precision model, likewise.
        task: The task.
        processor: Tokenizer or image processor.
        train: The training examples as they were read.
        eval: The evaluation examples as they were read.
        data: The evaluation examples as inputs.
        limit: Tokens after which an input was cut; 0 where there is no such limit.
    """

    student: nn.Module
    teacher: nn.Module
    task: Task
    processor: Any
    train: Any
    eval: Any
    data: TaskDataset
    limit: int


def load_pair(folder: Path, recipe: Recipe, student: nn.Module) -> Pair:
    """Loads the teacher and the data of a run.

    Args:
        folder: Written by ``tutelage train``.
        recipe: Its recipe.
        student: Its student.

    Raises:
        TutelageError: The teacher or the data are gone, or do not fit.
    """
    kind = TASKS[recipe.data.task]
    train, eval = kind.read(recipe.data)
    task = kind.of_model(student, recipe.data, eval)
    teacher = load_teacher(folder, recipe, task)
    processor = kind.load_processor(str(folder), student.config)
    limit = task.limit(recipe.data, [student, teacher], processor)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return Pair(
        student=student.eval().to(device),
        teacher=teacher.to(device),
        task=task,
        processor=processor,
        train=train,
        eval=eval,
        data=encode_for(teacher, task, eval, processor, limit),
        limit=limit,
    )
