"""Scores of predictions against labels; ``metrics.METRICS`` names and describes them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ._bio import entity_scores

__all__ = [
    "accuracy",
    "correlation",
    "entity_f1",
    "entity_precision",
    "entity_recall",
    "f1",
    "macro_f1",
    "matthews",
    "mean_loss",
    "pearson",
    "perplexity",
    "spearman",
    "token_accuracy",
]

Array = npt.NDArray[Any]
Tags = Sequence[Sequence[str]]


def accuracy(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predictions))


def f1(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, average="binary", zero_division=0))


def macro_f1(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def matthews(predictions: Array, labels: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    if _constant(predictions) or _constant(labels):
        return 0.0
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: Array, labels: Array) -> float:
    from scipy.stats import pearsonr

    if _constant(predictions) or _constant(labels):
        return 0.0
    return _finite(float(pearsonr(predictions, labels).statistic))


def spearman(predictions: Array, labels: Array) -> float:
    from scipy.stats import spearmanr

    if _constant(predictions) or _constant(labels):
        return 0.0
    return _finite(float(spearmanr(predictions, labels).statistic))


def correlation(predictions: Array, labels: Array) -> float:
    return (pearson(predictions, labels) + spearman(predictions, labels)) / 2


def _constant(values: Array) -> bool:
    return bool((values == values[0]).all())


def _finite(value: float) -> float:
    return value if np.isfinite(value) else 0.0


def mean_loss(sums: Array, counts: Array) -> float:
    return float(sums.sum() / counts.sum())


def perplexity(sums: Array, counts: Array) -> float:
    # Beyond 700 nats a token the exponential leaves the range of a double.
    return math.exp(min(mean_loss(sums, counts), 700.0))


def entity_f1(predicted: Tags, given: Tags) -> float:
    return entity_scores(predicted, given)[2]


def entity_precision(predicted: Tags, given: Tags) -> float:
    return entity_scores(predicted, given)[0]


def entity_recall(predicted: Tags, given: Tags) -> float:
    return entity_scores(predicted, given)[1]


def token_accuracy(predicted: Tags, given: Tags) -> float:
    ours, theirs = itertools.chain(*predicted), itertools.chain(*given)
    right = [one == other for one, other in zip(ours, theirs, strict=True)]
    return sum(right) / max(len(right), 1)
