"""Evaluation of students beside a teacher whose answers are computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..distill import Distiller
from ..distill._teacher import prediction
from ..errors import NonFiniteLossError
from ..intervention import Schedule
from ..train._inference import divergence
from ..train._plan import Plan
from ..train.tasks import batches
from ._records import Point

__all__ = ["AssistedCurve", "Curve", "Evaluator"]


@dataclass(frozen=True)
class _Batch:
    rows: tuple[int, ...]
    inputs: dict[str, Tensor]
    labels: Tensor | None
    teacher: Tensor


class Evaluator:
    """Measures students on the evaluation data of a plan.

    Attributes:
        metric: Name of the headline metric.
        teacher: The teacher's.
    """

    def __init__(self, plan: Plan, teacher: nn.Module) -> None:
        """Runs the teacher once.

        Args:
            plan: Data and task.
            teacher: The full-precision model, in eval mode.
        """
        self._plan, task = plan, plan.task
        self.metric = task.metric
        device = next(teacher.parameters()).device
        collator = task.collator(plan.processor)
        self._batches: list[_Batch] = []
        with torch.no_grad():
            for rows, batch in batches(plan.eval, collator, task.eval_batch_size):
                labels = batch.pop("labels", None)
                inputs = {key: value.to(device) for key, value in batch.items()}
                values = prediction(teacher(**inputs)).values.float().cpu()
                self._batches.append(_Batch(tuple(rows), inputs, labels, values))
        self.teacher = self._headline([batch.teacher for batch in self._batches])

    def __call__(
        self,
        student: nn.Module,
        step: int,
        predict: Callable[[dict[str, Tensor]], Tensor] | None = None,
    ) -> tuple[Point, npt.NDArray[np.float32] | None]:
        """Measures a student; its mode is left as it was.

        Args:
            student: The student.
            step: Optimizer steps it has done.
            predict: From inputs to predictions; default: the student's own.

        Returns:
            The figures, and KL(teacher || student) of every example where outputs are classes.

        Raises:
            NonFiniteLossError: An output is not finite.
        """
        modes = {module: module.training for module in student.modules()}
        student.eval()
        with torch.no_grad():
            made = predict or (lambda inputs: prediction(student(**inputs)).values)
            values = [made(batch.inputs).float().cpu() for batch in self._batches]
        for module, mode in modes.items():
            module.training = mode
        if not all(bool(value.isfinite().all()) for value in values):
            raise NonFiniteLossError(
                f"outputs of the student are not finite after {step} steps; lower the learning "
                "rate."
            )
        found = np.full(len(self._plan.eval), np.nan)
        equal = total = 0
        for batch, value in zip(self._batches, values, strict=True):
            for number, row in enumerate(batch.rows):
                own = self._plan.task.compared(value[number], self._plan.eval, row)
                other = self._plan.task.compared(batch.teacher[number], self._plan.eval, row)
                if own is None or other is None or not len(own):
                    continue
                found[row] = float(divergence(own, other).mean())
                equal += int((own.argmax(-1) == other.argmax(-1)).sum())
                total += len(own)
        metric = self._headline(values)
        if not total:
            return Point(step, metric, None, None), None
        kept = found[~np.isnan(found)].astype(np.float32)
        return Point(step, metric, float(kept.mean(dtype=np.float64)), equal / total), kept

    def _headline(self, values: list[Tensor]) -> float | None:
        task = self._plan.task
        if not task.labelled:
            return None
        reduced: dict[int, Any] = {}
        for batch, value in zip(self._batches, values, strict=True):
            reduced.update(zip(batch.rows, task.reduce(value, batch.labels).numpy(), strict=True))
        metrics = task.metrics([reduced[i] for i in range(len(self._plan.eval))], self._plan.eval)
        return float(metrics[task.metric])


class Curve(TrainerCallback):
    """Measures a student in training, after given steps.

    Attributes:
        points: The figures so far.
        divergences: Of every example at the last of them.
    """

    def __init__(self, evaluator: Evaluator, steps: tuple[int, ...]) -> None:
        """Keeps the steps.

        Args:
            evaluator: Measures.
            steps: Numbers of steps done.
        """
        self._evaluator, self._steps = evaluator, set(steps)
        self.points: list[Point] = []
        self.divergences: npt.NDArray[np.float32] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures where a step of the list is done."""
        if state.global_step in self._steps:
            point, self.divergences = self._evaluator(kwargs["model"], state.global_step)
            self.points.append(point)


class AssistedCurve(TrainerCallback):
    """Measures a student in training with the teacher stepping in, as in the step just done.

    The figures are ASSISTED: the teacher's signals are in the student's forward pass (Kim et al.,
    arXiv 2302.11812, evaluate so during their first step), so that they say nothing of what the
    student can do on its own.

    Attributes:
        points: The figures so far.
    """

    def __init__(
        self, evaluator: Evaluator, steps: tuple[int, ...], teacher: nn.Module, schedule: Schedule
    ) -> None:
        """Keeps the steps.

        Args:
            evaluator: Measures.
            steps: Numbers of steps done.
            teacher: Whose signals step in.
            schedule: Says which stage was on.
        """
        self._evaluator, self._steps = evaluator, set(steps)
        self._teacher, self._schedule = teacher, schedule
        self.points: list[Point] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures where a step of the list is done."""
        if state.global_step not in self._steps:
            return
        student, stage = kwargs["model"], self._schedule(state.global_step - 1)
        distiller = Distiller(student, self._teacher)
        point, _ = self._evaluator(
            student,
            state.global_step,
            lambda inputs: distiller.step(inputs, stage).student_logits,
        )
        self.points.append(point)
