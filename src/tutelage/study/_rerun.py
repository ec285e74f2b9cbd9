"""The student's training once more, watched, for what a folder of packed weights does not hold."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import TrainerCallback

from .._threads import threads
from ..train._phases import obtain_teacher, train_student
from ..train._plan import make_plan
from ..train._result import read_result
from ._folder import RunFolder, equal_codes
from ._latents import LatentWeights, latent_weights
from ._oscillation import LayerFlips, OscillationWatcher

__all__ = ["Retrained", "retrain"]


@dataclass(frozen=True)
class Retrained:
    """A student with its latent weights.

    Attributes:
        student: In eval mode, on the CPU.
        flips: How often its codes changed in training.
        first: Its latent weights before the first step.
        equal: Share of its codes that equal those of the packed student; 1 where the training was
            repeated bit for bit.
    """

    student: nn.Module
    flips: list[LayerFlips]
    first: list[LatentWeights]
    equal: float


class _Beginning(TrainerCallback):
    found: list[LatentWeights]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.found = latent_weights(kwargs["model"])


def retrain(run: RunFolder, report: Callable[[str], None] = lambda line: None) -> Retrained:
    """Trains the student of a folder again, as its recipe says, and watches it.

    The same seed, teacher and number of threads give the same weights on the same machine; the
    folder itself is left as it is.

    Args:
        run: The folder.
        report: Told what happens.

    Raises:
        TutelageError: As ``tutelage train``.
    """
    result = read_result(run.path)
    recipe = run.recipe.model_copy(update={"output": str(run.path.resolve())})
    count = recipe.threads or (torch.get_num_threads() if result is None else result.threads)
    flips, beginning = OscillationWatcher(), _Beginning()
    with threads(count), tempfile.TemporaryDirectory(prefix="tutelage-") as folder:
        transformers.set_seed(recipe.seed)
        plan = make_plan(recipe, report)
        teacher, _ = obtain_teacher(plan, report, None)
        if plan.augment is not None:
            plan = dataclasses.replace(plan, train=plan.augment(), augment=None)
        report(f"training the student again: {recipe.student.max_steps} steps")
        student = train_student(
            dataclasses.replace(plan, folder=Path(folder)),
            teacher,
            report,
            None,
            resume=False,
            watchers=[flips, beginning],
            store=recipe.student.keep == "best",
        )
    student = student.cpu()
    equal = equal_codes(student, run.student)
    report(f"{100 * equal:.2f} % of its codes equal those of {run.path}")
    return Retrained(student, flips.layers(), beginning.found, equal)
