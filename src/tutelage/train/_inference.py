"""Models over a data set: predictions, metrics, and how near two models are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..distill._teacher import prediction
from .metrics import refuse_non_finite
from .tasks import Task, TaskDataset, batches

__all__ = ["Measured", "divergence", "measure"]


@dataclass(frozen=True)
class Measured:
    """Figures of models over the same data.

    Attributes:
        metrics: Every metric that fits, of each model; empty for data without labels.
        agreement: Share of the compared predictions in which the likeliest class of the first
            two models is the same; ``None`` for one model or where outputs are not classes.
        kl: Mean of KL(second || first) over the compared predictions, in nats, in float64.
    """

    metrics: list[dict[str, float]]
    agreement: float | None
    kl: float | None


def divergence(
    student: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"]
) -> Float[Tensor, " rows"]:
    """Returns KL(teacher || student) at temperature 1 of every row of logits, in nats, float64.

    Args:
        student: Logits.
        teacher: Logits.
    """
    log_q = torch.log_softmax(student, dim=-1, dtype=torch.float64)
    log_p = torch.log_softmax(teacher, dim=-1, dtype=torch.float64)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


class _Comparison:
    """Sums over compared predictions."""

    def __init__(self) -> None:
        self.equal, self.divergence, self.count = 0, 0.0, 0

    def add(self, student: Tensor, teacher: Tensor) -> None:
        self.divergence += float(divergence(student, teacher).sum())
        self.equal += int((student.argmax(-1) == teacher.argmax(-1)).sum())
        self.count += student.shape[0]


def measure(task: Task, data: TaskDataset, processor: Any, *models: nn.Module) -> Measured:
    """Runs models over data in batches of like length and measures them.

    Args:
        task: The task.
        data: The examples as inputs.
        processor: Tokenizer or image processor.
        *models: Models in eval mode on one device; agreement and KL compare the first (student)
            with the second (teacher).

    Raises:
        NonFiniteLossError: An output is NaN or infinite.
    """
    device = next(models[0].parameters()).device
    reduced: list[dict[int, npt.NDArray[Any]]] = [{} for _ in models]
    broken = [0 for _ in models]
    comparison = _Comparison()
    with torch.inference_mode():
        for rows, batch in batches(data, task.collator(processor), task.eval_batch_size):
            labels = batch.pop("labels", None)
            inputs = {key: value.to(device) for key, value in batch.items()}
            values = [prediction(model(**inputs)).values.float().cpu() for model in models]
            for index, value in enumerate(values):
                broken[index] += int((~value.flatten(1).isfinite().all(dim=1)).sum())
                if task.labelled:
                    kept = task.reduce(value, labels).numpy()
                    reduced[index].update(zip(rows, kept, strict=True))
            if len(values) > 1 and not any(broken):
                for number, row in enumerate(rows):
                    pair = [task.compared(value[number], data, row) for value in values[:2]]
                    if pair[0] is not None and pair[1] is not None:
                        comparison.add(pair[0], pair[1])
    for count in broken:
        refuse_non_finite(count, len(data))
    metrics = [
        task.metrics([found[row] for row in range(len(data))], data) if task.labelled else {}
        for found in reduced
    ]
    if not comparison.count:
        return Measured(metrics, None, None)
    return Measured(
        metrics,
        comparison.equal / comparison.count,
        max(0.0, comparison.divergence / comparison.count),
    )
