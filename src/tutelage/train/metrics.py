"""Metrics of text tasks, and how near a student's outputs are to its teacher's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError, NonFiniteLossError
from ._answers import exact_match, overlap_f1
from ._scores import (
    accuracy,
    correlation,
    entity_f1,
    entity_precision,
    entity_recall,
    f1,
    macro_f1,
    matthews,
    mean_loss,
    pearson,
    perplexity,
    spearman,
    token_accuracy,
)

__all__ = [
    "METRICS",
    "Metric",
    "agreement",
    "compute_metrics",
    "evaluate_metrics",
    "kl_divergence",
    "refuse_non_finite",
]

Array = npt.NDArray[Any]

CLASSIFICATION = ("classification", "pair", "image_classification")
TAGGING = ("token_classification",)
ANSWERING = ("question_answering",)
REGRESSION = ("regression", "pair_regression")


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        kinds: The task kinds that it measures.
        compute: From predictions and labels, one of each per example, to a value. Predictions are
            class indices, real numbers for regression; for language models the summed negative log
            likelihood of a block, with the number of its predicted tokens in place of labels;
            for tagging the label names of a sentence's words; for answers texts, and the accepted
            texts of each.
        description: What the value says.
        binary_only: Whether it is defined for two classes only.
        greater_is_better: Whether a larger value is the better one.
        fraction: Whether the value is a fraction.
    """

    kinds: tuple[str, ...]
    compute: Callable[[Any, Any], float]
    description: str
    binary_only: bool = False
    greater_is_better: bool = True
    fraction: bool = True


def evaluate_metrics(kind: str, logits: Array, labels: Array) -> dict[str, float]:
    """Computes every metric that applies to a task.

    Constant predictions or labels give 0.0 where a correlation is undefined.

    Args:
        kind: ``"classification"``, ``"pair"``, ``"regression"`` or ``"pair_regression"``.
        logits: The model's outputs, floating point, of shape ``(examples, classes)``; for a
            regression ``(examples, 1)`` or ``(examples,)``.
        labels: Class indices (integers), or real numbers for a regression, of shape
            ``(examples,)``.

    Returns:
        Metric name to value, all as fractions.

    Raises:
        DataError: If the kind is unknown, there are no examples, or the shapes do not fit.
        NonFiniteLossError: If an output is NaN or infinite.
    """
    logits, labels = np.asarray(logits), np.asarray(labels)
    if kind in REGRESSION:
        if logits.ndim == 1:
            logits = logits[:, None]
        columns_fit = logits.ndim == 2 and logits.shape[1] == 1
    elif kind in CLASSIFICATION:
        columns_fit = logits.ndim == 2 and logits.shape[1] >= 2
    else:
        raise DataError(
            f"unknown task kind {kind!r}; use one of {', '.join(CLASSIFICATION + REGRESSION)}."
        )
    if not columns_fit or labels.shape != logits.shape[:1]:
        raise DataError(
            f"outputs of shape {logits.shape} and labels of shape {labels.shape} do not fit a "
            f"{kind} task; evaluate with the model and the data of that task."
        )
    _check(logits)
    predictions = logits[:, 0].astype(np.float64) if kind in REGRESSION else logits.argmax(axis=1)
    classes = logits.shape[1]
    with warnings.catch_warnings():
        # Undefined values are settled in the functions below; scikit-learn warns of them as well.
        warnings.simplefilter("ignore")
        return {
            name: float(metric.compute(predictions, labels))
            for name, metric in METRICS.items()
            if kind in metric.kinds and not (metric.binary_only and classes != 2)
        }


def compute_metrics(kind: str, predictions: Any, labels: Any) -> dict[str, float]:
    """Computes every metric of a task whose predictions are not logits of examples.

    Args:
        kind: The task.
        predictions: What ``Metric.compute`` takes.
        labels: Likewise.

    Returns:
        Metric name to value.
    """
    return {
        name: float(metric.compute(predictions, labels))
        for name, metric in METRICS.items()
        if kind in metric.kinds
    }


def agreement(student_logits: Array, teacher_logits: Array) -> float:
    """Returns the share of examples to which student and teacher give the same label.

    Args:
        student_logits: The student's outputs, floating point, of shape ``(examples, classes)``.
        teacher_logits: The teacher's outputs, of the same shape.

    Returns:
        A fraction between 0 and 1.

    Raises:
        DataError: If there are no examples, fewer than two classes, or the shapes differ.
        NonFiniteLossError: If an output is NaN or infinite.
    """
    student, teacher = _both(student_logits, teacher_logits)
    return float(np.mean(student.argmax(axis=1) == teacher.argmax(axis=1)))


def kl_divergence(teacher_logits: Array, student_logits: Array) -> float:
    """Returns the mean of KL(teacher || student) over the examples, in nats.

    Args:
        teacher_logits: The teacher's outputs, floating point, of shape ``(examples, classes)``.
        student_logits: The student's outputs, of the same shape.

    Returns:
        The divergence, computed in float64, at least 0.

    Raises:
        DataError: If there are no examples, fewer than two classes, or the shapes differ.
        NonFiniteLossError: If an output is NaN or infinite.
    """
    from scipy.special import log_softmax

    teacher, student = _both(teacher_logits, student_logits)
    log_p = log_softmax(teacher.astype(np.float64), axis=1)
    log_q = log_softmax(student.astype(np.float64), axis=1)
    mean = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    return max(0.0, float(mean))  # Equal outputs can round to just below zero.


def _both(first: Array, second: Array) -> tuple[Array, Array]:
    first, second = np.asarray(first), np.asarray(second)
    if first.shape != second.shape or first.ndim != 2 or first.shape[1] < 2:
        raise DataError(
            f"outputs of shape {first.shape} and {second.shape} cannot be compared as classes; "
            "give two arrays of one shape (examples, classes) with at least two classes."
        )
    _check(first)
    _check(second)
    return first, second


def _check(logits: Array) -> None:
    if logits.shape[0] == 0:
        raise DataError("there are no examples to evaluate; give at least one.")
    refuse_non_finite(int((~np.isfinite(logits).all(axis=1)).sum()), logits.shape[0])


def refuse_non_finite(broken: int, count: int) -> None:
    """Refuses outputs that are not numbers.

    Args:
        broken: Number of examples with such outputs.
        count: Number of all examples.

    Raises:
        NonFiniteLossError: There are any.
    """
    if broken:
        raise NonFiniteLossError(
            f"the model's outputs are NaN or infinite for {broken} of {count} examples; "
            "train again with a lower learning rate."
        )


METRICS: dict[str, Metric] = {
    "accuracy": Metric(CLASSIFICATION, accuracy, "share of right labels"),
    "f1": Metric(CLASSIFICATION, f1, "F1 of class 1 of two", binary_only=True),
    "macro_f1": Metric(CLASSIFICATION, macro_f1, "mean of the classes' F1"),
    "matthews": Metric(CLASSIFICATION, matthews, "Matthews correlation coefficient"),
    "pearson": Metric(REGRESSION, pearson, "linear correlation"),
    "spearman": Metric(REGRESSION, spearman, "rank correlation"),
    "correlation": Metric(REGRESSION, correlation, "mean of pearson and spearman"),
    "entity_f1": Metric(TAGGING, entity_f1, "F1 of whole entities in BIO tags"),
    "entity_precision": Metric(TAGGING, entity_precision, "share of right entities among found"),
    "entity_recall": Metric(TAGGING, entity_recall, "share of found entities among given"),
    "token_accuracy": Metric(TAGGING, token_accuracy, "share of words with the right label"),
    "exact_match": Metric(ANSWERING, exact_match, "share of answers equal to an accepted one"),
    "answer_f1": Metric(ANSWERING, overlap_f1, "F1 of the words shared with an accepted answer"),
    "perplexity": Metric(
        ("causal_lm",), perplexity, "exp of loss", greater_is_better=False, fraction=False
    ),
    "loss": Metric(
        ("causal_lm",),
        mean_loss,
        "negative log likelihood of a token in nats",
        greater_is_better=False,
        fraction=False,
    ),
}
"""Every metric by its name."""
