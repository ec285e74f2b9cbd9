"""Warnings about the course of a training."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator

from ..train._log import Logged, TrainingLog
from ..train.metrics import METRICS
from ._facts import Facts
from ._format import named, percent, shown
from ._page import Finding

__all__ = ["TRAINING_RULES", "jump", "still_falling"]

_FALL, _JUMP, _BEFORE = 0.05, 1.5, 3
_PARTS = 4


def no_log(facts: Facts) -> Iterator[Finding]:
    """The folder is of an earlier version."""
    if facts.log is None:
        yield Finding(
            "no_log",
            "The folder holds no training.json, as runs of earlier versions do not: the course of "
            "the training is not known.",
            "Train again to see curves.",
        )


def falling(facts: Facts) -> Iterator[Finding]:
    """The loss was still going down at the end."""
    fall = None if facts.log is None else still_falling(facts.log, after=facts.ramp_steps)
    if fall is not None:
        yield Finding(
            "falling",
            f"The loss was still falling at the end: by {percent(fall, 0)} from the last but one "
            "to the last quarter of the training without intervention.",
            f"Train longer: student.max_steps={2 * facts.recipe.student.max_steps}.",
        )


def still_falling(log: TrainingLog, *, after: float = 0.0) -> float | None:
    """Returns the relative fall of the loss over the end of the part without intervention.

    The mean over the last quarter is compared with that over the quarter before; a fall counts
    from 5 % on, and where it is more than twice its standard error.

    Args:
        log: The log.
        after: Entries that begin before this step do not count.

    Returns:
        The fall, ``None`` where there is none to speak of.
    """
    plain = [e.loss for e in log.logged if e.since >= after and set(e.stages) <= {"none"}]
    size = len(plain) // _PARTS
    if size < 2:
        return None
    before, last = plain[-2 * size : -size], plain[-size:]
    means = statistics.fmean(before), statistics.fmean(last)
    error = math.sqrt((statistics.variance(before) + statistics.variance(last)) / size)
    fall = means[0] - means[1]
    if fall <= 2 * error or fall < _FALL * means[0]:
        return None
    return fall / means[0]


def jumped(facts: Facts) -> Iterator[Finding]:
    """The loss jumped up within a stage."""
    found = None if facts.log is None else jump(facts.log, after=facts.ramp_steps)
    if found is not None:
        entry, factor, rate = found
        at = "" if rate is None else f" at the learning rate {rate:.2g}"
        lower = "" if rate is None else f": student.learning_rate={rate / 3:.1e}"
        yield Finding(
            "jumped",
            f"The loss jumped to {factor:.1f} times its level before step {entry.step}{at}.",
            f"Lower the learning rate{lower}, or warm up longer.",
        )


def jump(log: TrainingLog, *, after: float = 0.0) -> tuple[Logged, float, float | None] | None:
    """Returns the entry at which the loss rose most, where it rose by half or more.

    An entry is compared with the median of the three before it in the same stage.

    Args:
        log: The log.
        after: Entries that begin before this step do not count.

    Returns:
        The entry, how many times the median its loss is, and the larger learning rate of that
        entry and the one before; ``None`` where the loss did not jump.
    """
    worst: tuple[Logged, float, float | None] | None = None
    counted = (e for e in log.logged if e.since >= after)
    for _, group in itertools.groupby(counted, lambda e: sorted(e.stages)):
        entries = list(group)
        for index in range(_BEFORE, len(entries)):
            some = entries[index - _BEFORE : index]
            level = statistics.median(e.loss for e in some)
            factor = entries[index].loss / level if level > 0 else 0.0
            if factor >= _JUMP and (worst is None or factor > worst[1]):
                rates = [
                    e.learning_rate
                    for e in (some[-1], entries[index])
                    if e.learning_rate is not None
                ]
                worst = entries[index], factor, max(rates, default=None)
    return worst


def long_intervention(facts: Facts) -> Iterator[Finding]:
    """The teacher intervened for more than half of the training."""
    steps, total = facts.recipe.schedule_steps, facts.recipe.student.max_steps
    if steps > total / 2:
        yield Finding(
            "long_intervention",
            f"The teacher intervenes in {steps} of {total} steps: little is left for the student "
            "to learn on its own.",
            "Lower schedule.steps to a third of student.max_steps or less.",
        )


def peaked(facts: Facts) -> Iterator[Finding]:
    """The metric was better in the middle of the training than at its end."""
    log, metric = facts.log, facts.result.metric
    if log is None or metric not in METRICS or facts.recipe.student.keep == "best":
        return
    values = [(e.metrics[metric], e.step) for e in log.evaluated if metric in e.metrics]
    if len(values) < 2 or not METRICS[metric].greater_is_better:
        return
    best, step = max(values)
    errors = None if facts.answers is None else facts.answers.errors
    slack = 0.01 if errors is None else max(0.01, 2 * errors.student)
    if best - values[-1][0] > slack:
        yield Finding(
            "peaked",
            f"The student's {named(metric)} was {shown(metric, best)} at step {step} and "
            f"{shown(metric, values[-1][0])} at the end.",
            "Keep the best checkpoint (student.keep=best; choose it on other data than those you "
            "report), or train for fewer steps.",
        )


TRAINING_RULES: tuple[Callable[[Facts], Iterable[Finding]], ...] = (
    no_log,
    falling,
    jumped,
    long_intervention,
    peaked,
)
