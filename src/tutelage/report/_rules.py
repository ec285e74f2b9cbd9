"""Warnings about a run: each rule looks at the facts and says what it sees, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ..train.metrics import METRICS
from ._answers import Answers
from ._facts import Facts
from ._format import change, count, named, percent, shown, significant
from ._measures import scores_of
from ._page import Finding
from ._rules_costs import COST_RULES
from ._rules_training import TRAINING_RULES

__all__ = ["RULES", "findings"]

Rule = Callable[[Facts], Iterable[Finding]]

_LOSS, _MUCH = 0.01, 0.03
_SURE = 2.0
"""Standard errors after which a difference is taken for one."""
_MAJORITY, _CONSTANT = 0.75, 0.95
_KL, _LIKE = 0.1, 0.01
_WEAK = 0.8
"""Part of the errors of always giving one class that a teacher may make."""
_SUPPORT = 5
_NAMED = 5


def findings(facts: Facts) -> tuple[Finding, ...]:
    """Returns the warnings about a run, the serious ones first.

    Args:
        facts: The run.
    """
    found = [finding for rule in RULES for finding in rule(facts)]
    return tuple(sorted(found, key=lambda finding: not finding.serious))


def headline(facts: Facts) -> tuple[float, float] | None:
    """Returns the headline metric of teacher and student, ``None`` without labels.

    Args:
        facts: The run.
    """
    metric = facts.result.metric
    theirs, ours = facts.result.teacher.metrics, facts.result.student.metrics
    return (theirs[metric], ours[metric]) if metric in theirs and metric in ours else None


def labels_of(facts: Facts) -> tuple[Answers, np.ndarray] | None:
    """Returns the answers and the labels where the task is of classes and has labels."""
    answers = facts.answers
    if answers is None or answers.kind != "classes" or answers.labels is None:
        return None
    return answers, answers.labels


def worse(facts: Facts) -> Iterator[Finding]:
    """The student's metric is clearly below the teacher's."""
    pair = headline(facts)
    if pair is None:
        return
    metric = facts.result.metric
    teacher, student = pair
    if METRICS[metric].greater_is_better:
        errors = None if facts.answers is None else facts.answers.errors
        sure = 0.0 if errors is None else _SURE * errors.difference
        lost = teacher - student
        bad, much = lost > max(_LOSS, sure), lost > _MUCH
    else:
        bad, much = student > 1.05 * teacher, student > 1.2 * teacher
    if bad:
        yield Finding(
            "worse",
            f"The student is {'much' if much else 'clearly'} worse than its teacher: "
            f"{named(metric)} {shown(metric, student)} against {shown(metric, teacher)} "
            f"({change(metric, student - teacher)}).",
            "Train longer (student.max_steps), try another learning rate, or take a scheme with "
            "more bits, such as w2-a8; tutelage compare tells which helps.",
            serious=much,
        )


def coarse(facts: Facts) -> Iterator[Finding]:
    """The metric is over few examples."""
    answers, pair = facts.answers, headline(facts)
    if answers is None or answers.errors is None or pair is None:
        return
    error, metric = answers.errors.difference, facts.result.metric
    step = _SURE * error
    if METRICS[metric].fraction and step > 0.01:
        yield Finding(
            "coarse",
            f"{count(answers.examples, 'evaluation example')} tell a difference of "
            f"{100 * step:.1f} points or more: the standard error of student minus teacher is "
            f"{100 * error:.1f} points, that of the student alone "
            f"{100 * answers.errors.student:.1f}, and this is one seed.",
            "Judge by the KL, which is finer, or evaluate on more examples and seeds (tutelage "
            "compare).",
        )


def no_labels(facts: Facts) -> Iterator[Finding]:
    """There are no labels."""
    if headline(facts) is None:
        yield Finding(
            "no_labels",
            "The evaluation data have no labels: the figures say how near the student is to its "
            "teacher, not how good either is.",
            "Label a few hundred examples and measure both with tutelage evaluate DIR --data FILE "
            "--label COLUMN.",
        )


def imbalance(facts: Facts) -> Iterator[Finding]:
    """Most examples are of one class, and the metric is accuracy."""
    known = labels_of(facts)
    if known is None or facts.result.metric not in ("accuracy", "token_accuracy"):
        return
    answers, labels = known
    shares = np.bincount(labels, minlength=len(answers.names)) / len(labels)
    top = int(shares.argmax())
    if shares[top] > _MAJORITY:
        yield Finding(
            "imbalance",
            f"{percent(shares[top], 0)} of the evaluation {answers.unit}s are of the class "
            f"{answers.names[top]!r}: always giving it would have that accuracy.",
            "Look at the classes one by one, or set data.metric to macro_f1 or matthews.",
        )


def constant(facts: Facts) -> Iterator[Finding]:
    """The student nearly always gives one class, more often than it is right."""
    answers = facts.answers
    if answers is None or answers.kind != "classes":
        return
    shares = np.bincount(answers.student, minlength=len(answers.names)) / len(answers.student)
    other = answers.teacher if answers.labels is None else answers.labels
    top = int(shares.argmax())
    usual = float((other == top).mean())
    if shares[top] > _CONSTANT and shares[top] > usual + 0.02:
        yield Finding(
            "constant",
            f"The student gives the class {answers.names[top]!r} to {percent(shares[top])} of the "
            f"{answers.unit}s, which is right for {percent(usual)}.",
            "It has not learnt the task: lower student.learning_rate, raise student.max_steps, "
            "and look at the curves.",
            serious=True,
        )


def lost_class(facts: Facts) -> Iterator[Finding]:
    """The teacher finds a class and the student does not."""
    known = labels_of(facts)
    if known is None:
        return
    answers, labels = known
    teacher, student = (
        scores_of(labels, given, len(answers.names)) for given in (answers.teacher, answers.student)
    )
    lost = [
        f"{name!r} (recall {percent(ours.recall, 0)}, the teacher's {percent(theirs.recall, 0)})"
        for name, theirs, ours in zip(answers.names, teacher, student, strict=True)
        if theirs.support >= _SUPPORT and theirs.recall >= 0.5 and ours.recall < theirs.recall / 2
    ]
    if lost:
        more = f" and {len(lost) - _NAMED} more" if len(lost) > _NAMED else ""
        yield Finding(
            "lost_class",
            f"The student lost {'a class' if len(lost) == 1 else 'classes'} that its teacher "
            f"finds: {', '.join(lost[:_NAMED])}{more}.",
            "Train longer, or give more training examples of it; the student learns from the "
            "teacher's answers, so they need no labels.",
            serious=True,
        )


def far_in_kl(facts: Facts) -> Iterator[Finding]:
    """The classes agree, the probabilities do not."""
    pair, kl = headline(facts), facts.result.kl
    if pair is None or kl is None or kl <= _KL or not METRICS[facts.result.metric].fraction:
        return
    if pair[0] - pair[1] < _LIKE:
        yield Finding(
            "far_in_kl",
            f"The {named(facts.result.metric)} is the teacher's, but the probabilities are not: KL "
            f"{significant(kl)} nats.",
            "Where probabilities or thresholds matter, calibrate the student or train it longer.",
        )


def weak_teacher(facts: Facts) -> Iterator[Finding]:
    """The teacher is little better than always giving one class."""
    known, metric = labels_of(facts), facts.result.metric
    if known is None or metric not in facts.result.teacher.metrics:
        return
    answers, labels = known
    right = float((answers.teacher == labels).mean())
    usual = float(np.bincount(labels).max() / len(labels))
    # Errors are compared, since where one class prevails a good teacher is but little more often
    # right than always giving that class.
    if 1 - right > _WEAK * (1 - usual):
        fine_tuned = facts.result.teacher_fine_tuned
        yield Finding(
            "weak_teacher",
            f"The teacher is right in {percent(right)} of the {answers.unit}s, and "
            f"always giving the most frequent class in {percent(usual)}: a student cannot learn "
            "more than its teacher knows.",
            "Fine-tune the teacher longer (teacher.epochs, teacher.learning_rate), or give a "
            "better one as model.teacher."
            if fine_tuned
            else "Give a better teacher as model.teacher.",
            serious=True,
        )


def overlap(facts: Facts) -> Iterator[Finding]:
    """Evaluation examples are training examples, too."""
    answers = facts.answers
    if answers is None or not answers.in_training:
        return
    share = answers.in_training / answers.inputs
    yield Finding(
        "overlap",
        f"{answers.in_training:,} of the evaluation inputs ({percent(share)}) are also training "
        "inputs, letter for letter: the figures flatter both models.",
        "Remove them from the training data.",
        serious=share > 0.05,
    )


def cut(facts: Facts) -> Iterator[Finding]:
    """Many inputs are as long as an input may be."""
    answers = facts.answers
    if answers is None or answers.cut < 0.1 * answers.examples or not answers.cut:
        return
    yield Finding(
        "cut",
        f"{percent(answers.cut / answers.examples, 0)} of the evaluation inputs have "
        f"{answers.limit} tokens, the most that are kept; what came after was cut off.",
        "Raise data.max_length if the model has more positions.",
    )


def moved(facts: Facts) -> Iterator[Finding]:
    """The figures of today are not those of the run."""
    pair, answers, metric = headline(facts), facts.answers, facts.result.metric
    if pair is None or answers is None or metric not in answers.metrics[0]:
        return
    now = (answers.metrics[0][metric], answers.metrics[1][metric])
    slack = 2 / answers.examples if METRICS[metric].fraction else 1e-3 * abs(pair[1])
    if answers.examples != facts.result.eval_examples or any(
        abs(a - b) > slack for a, b in zip(now, pair, strict=True)
    ):
        yield Finding(
            "moved",
            f"Run again, teacher and student have {named(metric)} {shown(metric, now[0])} and "
            f"{shown(metric, now[1])} on {answers.examples:,} examples; result.json says "
            f"{shown(metric, pair[0])} and {shown(metric, pair[1])} on "
            f"{facts.result.eval_examples:,}.",
            "Data, teacher or student changed since; train again, or restore them.",
            serious=True,
        )


RULES: tuple[Rule, ...] = (
    worse,
    constant,
    lost_class,
    weak_teacher,
    moved,
    *TRAINING_RULES,
    overlap,
    coarse,
    imbalance,
    far_in_kl,
    no_labels,
    cut,
    *COST_RULES,
)
"""Every rule; add yours here."""
