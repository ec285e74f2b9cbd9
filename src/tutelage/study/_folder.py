"""The folder of a run, as analyses need it: its recipe, data, teacher and student."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from .._prepare import prepare
from ..artefacts import load
from ..distill import Distiller
from ..errors import ArtefactError, StudyError
from ..exporters._layers import quantized_layers, twin
from ..train._models import encode_for, load_config, load_model
from ..train._output import RECIPE_FILE, TEACHER
from ..train._plan import make_losses, make_scheme
from ..train.recipe import Recipe, load_recipe
from ..train.tasks import TASKS, Task, TaskDataset

__all__ = ["RunFolder", "equal_codes", "load_teacher", "spaced"]


class RunFolder:
    """What ``tutelage train`` left in a folder.

    Attributes:
        path: The folder.
        recipe: Its recipe.
        student: The packed student, in eval mode.
        teacher: The full-precision model that taught it, in eval mode.
        task: Labels and metric.
        processor: Tokenizer or image processor.
    """

    def __init__(self, path: Path) -> None:
        """Loads models and checks that data and teacher are there.

        Args:
            path: The folder.

        Raises:
            TutelageError: It holds no run, or its data or its teacher are gone.
        """
        self.path = path
        self.recipe = _recipe(path)
        self.student = load(path).eval()
        kind = TASKS[self.recipe.data.task]
        self._read = kind.read(self.recipe.data)
        self.task = kind.of_model(self.student, self.recipe.data, self._read[1])
        self.teacher = load_teacher(path, self.recipe, self.task)
        self.processor = kind.load_processor(str(path), self.student.config)
        self._limit = self.task.limit(self.recipe.data, [self.student], self.processor)

    @cached_property
    def train(self) -> TaskDataset:
        """The training examples as inputs, as they are in the recipe's data."""
        return self._encoded(0)

    @cached_property
    def eval(self) -> TaskDataset:
        """The evaluation examples as inputs."""
        return self._encoded(1)

    def _encoded(self, which: int) -> TaskDataset:
        found = (self.teacher, self.task, self._read[which], self.processor, self._limit)
        return encode_for(*found)

    def batches(self, data: TaskDataset, count: int, size: int = 32) -> list[dict[str, Tensor]]:
        """Returns some of the examples, evenly spaced, those of like length together.

        Args:
            data: ``train`` or ``eval``.
            count: At most so many examples.
            size: Examples a batch.
        """
        rows = sorted(spaced(len(data), count), key=data.length)
        collate = self.task.collator(self.processor)
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        return [dict(collate([data[row] for row in part])) for part in parts]

    def trainable(self) -> nn.Module:
        """Makes a student that can be differentiated out of the packed one.

        Its latent weights are the quantized values. Quantizers that round those to themselves give
        it the codes and scales of the packed student, and so its predictions.

        Raises:
            StudyError: They round them to something else.
        """
        scheme = make_scheme(self.recipe.student)
        made = prepare(twin(self.student), scheme).requires_grad_(True).eval()
        if equal_codes(made, self.student) < 1.0:
            raise StudyError(
                f"the codes of {self.path} do not stand for themselves under "
                f"{self.recipe.student.scheme!r}, so that its student cannot be made trainable "
                "again; add --retrain."
            )
        return made

    def distiller(self, student: nn.Module) -> Distiller:
        """Returns what computes the training loss of the recipe, labels left out.

        Args:
            student: A prepared student.
        """
        return Distiller(student, self.teacher, make_losses(self.recipe.student))


def spaced(total: int, count: int) -> list[int]:
    """Returns ``count`` of the numbers below ``total``, evenly spaced; all where there are fewer.

    Args:
        total: How many there are.
        count: How many are wanted.
    """
    count = min(count, total)
    return [total * index // count for index in range(count)]


def equal_codes(student: nn.Module, other: nn.Module) -> float:
    """Returns the share of the weights that have the same code in both models.

    Args:
        student: A prepared or a packed model.
        other: Another of the same structure and scheme.
    """
    own, theirs = quantized_layers(student), quantized_layers(other)
    equal = total = 0
    for name, layer in own.items():
        equal += int(torch.eq(layer.codes.cpu(), theirs[name].codes.cpu()).sum())
        total += layer.codes.numel()
    return equal / total if total else 1.0


def _recipe(folder: Path) -> Recipe:
    file = folder / RECIPE_FILE
    if not file.is_file():
        raise ArtefactError(
            f"{folder} holds no {RECIPE_FILE}, which names data and teacher; name the folder of a "
            "tutelage train run."
        )
    return load_recipe(file)


def load_teacher(folder: Path, recipe: Recipe, task: Task) -> nn.Module:
    """Loads the model that taught a run's student, in eval mode.

    Args:
        folder: Written by ``tutelage train``.
        recipe: Its recipe.
        task: Its task.

    Raises:
        ArtefactError: The teacher is gone.
    """
    own = folder / TEACHER
    name = str(own) if own.is_dir() else recipe.model.teacher or recipe.model.name_or_path
    config = load_config(name, "the teacher")
    if not task.head.on(config):
        raise ArtefactError(
            f"the teacher of {folder} is gone: {name!r} has no {task.head.name}; keep the folder "
            f"{own}."
        )
    return load_model(name, config, task, "the teacher").eval()
