"""Figures of classes, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ClassScores", "Errors", "confusion", "paired_errors", "proportion_errors", "scores_of"]

Array = npt.NDArray[Any]

_DRAWS = 200


@dataclass(frozen=True)
class ClassScores:
    """How well a class is found.

    Attributes:
        support: Examples of the class.
        predicted: Examples that were given the class.
        precision: Share of right ones among the predicted, 0 where there are none.
        recall: Share of found ones among those of the class, 0 where there are none.
        f1: Their harmonic mean, 0 where both are 0.
    """

    support: int
    predicted: int
    precision: float
    recall: float
    f1: float

    @classmethod
    def of(cls, right: int, predicted: int, support: int) -> ClassScores:
        """Makes scores of counts.

        Args:
            right: Examples of the class that were given it.
            predicted: Examples that were given the class.
            support: Examples of the class.
        """
        return cls(
            support=support,
            predicted=predicted,
            precision=right / predicted if predicted else 0.0,
            recall=right / support if support else 0.0,
            f1=2 * right / (predicted + support) if predicted + support else 0.0,
        )


@dataclass(frozen=True)
class Errors:
    """Standard errors of a metric, by the choice of the evaluation examples.

    Attributes:
        teacher: Of the teacher's.
        student: Of the student's.
        difference: Of student minus teacher, over the same examples.
    """

    teacher: float
    student: float
    difference: float


def confusion(rows: Array, columns: Array, classes: int) -> npt.NDArray[np.int64]:
    """Counts how often two classes meet.

    Args:
        rows: Class indices, of shape ``(examples,)``.
        columns: Likewise.
        classes: Number of classes.

    Returns:
        Counts of shape ``(classes, classes)``.
    """
    counts = np.bincount(rows.astype(np.int64) * classes + columns, minlength=classes * classes)
    return counts.reshape(classes, classes)


def scores_of(labels: Array, predictions: Array, classes: int) -> list[ClassScores]:
    """Returns precision, recall and F1 of every class.

    Args:
        labels: Class indices, of shape ``(examples,)``.
        predictions: Likewise.
        classes: Number of classes.
    """
    counts = confusion(labels, predictions, classes)
    support, predicted = counts.sum(1), counts.sum(0)
    return [
        ClassScores.of(int(counts[i, i]), int(predicted[i]), int(support[i]))
        for i in range(classes)
    ]


def proportion_errors(teacher: Array, student: Array) -> Errors:
    """Returns the standard errors of two shares of right answers.

    A share p of n examples has the standard error sqrt(p (1 - p) / n); the difference of two over
    the same examples has sqrt((b + c - (b - c)^2 / n)) / n, where b and c count the examples that
    one of the two alone gets right (McNemar).

    Args:
        teacher: Whether each answer is right, of shape ``(examples,)``.
        student: Likewise.
    """
    n = len(teacher)
    only_teacher = int((teacher & ~student).sum())
    only_student = int((student & ~teacher).sum())
    one, other = (math.sqrt(p * (1 - p) / n) for p in (teacher.mean(), student.mean()))
    apart = only_teacher + only_student - (only_teacher - only_student) ** 2 / n
    return Errors(teacher=one, student=other, difference=math.sqrt(max(apart, 0.0)) / n)


def paired_errors(
    score: Callable[[npt.NDArray[np.int64]], tuple[float, float]], examples: int, seed: int = 0
) -> Errors:
    """Returns standard errors by the bootstrap: examples are drawn anew, the same for both models.

    Args:
        score: From numbers of examples to the metric of teacher and student over them.
        examples: How many there are.
        seed: Seed of the draws.
    """
    random = np.random.default_rng(seed)
    found = np.array([score(random.integers(0, examples, examples)) for _ in range(_DRAWS)])
    teacher, student = found.std(axis=0, ddof=1)
    return Errors(float(teacher), float(student), float((found[:, 1] - found[:, 0]).std(ddof=1)))
