"""What teacher and student answer on the evaluation data, example by example."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from ..distill._teacher import prediction
from ..train._bio import entities, is_bio
from ..train._inference import divergence
from ..train.metrics import METRICS, compute_metrics, refuse_non_finite
from ..train.tasks import CausalLM, QuestionTask, TokenTask, batches
from ._measures import ClassScores, Errors, paired_errors, proportion_errors
from ._pair import Pair

__all__ = ["Answers", "answers_of", "inputs_in_training"]

Array = npt.NDArray[Any]
Kind = Literal["classes", "numbers", "blocks", "spans"]


@dataclass(frozen=True)
class Answers:
    """Answers of two models to the same questions.

    Attributes:
        kind: ``"classes"`` (of examples or words), ``"numbers"`` (a regression), ``"blocks"`` (of
            text, a language model), or ``"spans"`` (answers in a context).
        unit: What one answer is about, in a word.
        names: Names of the classes, in their order.
        labels: The right answers, class indices or numbers, (answers,); ``None`` without labels,
            for blocks and for spans.
        teacher: The teacher's answers, likewise; of blocks the mean loss of a token, in nats; of
            spans whether they are right (always false without labels).
        student: The student's.
        same: Whether both models give the same answer, (answers,); ``None`` for numbers and blocks.
        kl: KL(teacher || student) of every example, in nats: mean over what is compared in it.
        metrics: Every metric that fits, of teacher and of student.
        errors: Standard errors of the headline metric; ``None`` without labels.
        entities: Scores of teacher and student by type of entity.
        examples: Number of items, as ``RunResult.eval_examples`` counts them.
        limit: Tokens after which an item was cut; 0 where none is cut.
        cut: Items that have so many tokens, so that something may be missing.
        inputs: Number of evaluation examples as they were read.
        in_training: How many of them are training inputs, too; ``None`` where not looked for.
    """

    kind: Kind
    unit: str
    names: tuple[str, ...]
    labels: Array | None
    teacher: Array
    student: Array
    same: Array | None
    kl: Array
    metrics: tuple[dict[str, float], dict[str, float]]
    errors: Errors | None
    examples: int
    limit: int
    cut: int
    inputs: int
    in_training: int | None
    entities: dict[str, tuple[ClassScores, ClassScores]] = field(default_factory=dict)


def answers_of(pair: Pair) -> Answers:
    """Runs both models over the evaluation data.

    Args:
        pair: Models and data.

    Raises:
        NonFiniteLossError: An output is NaN or infinite.
    """
    (teacher, student), kl = _run(pair)
    task, data = pair.task, pair.data
    common: dict[str, Any] = {
        "kl": kl,
        "metrics": (
            (task.metrics(teacher, data), task.metrics(student, data))
            if task.labelled
            else ({}, {})
        ),
        "examples": len(data),
        "limit": pair.limit,
        "cut": sum(data.length(row) >= pair.limit > 0 for row in range(len(data))),
        "inputs": len(pair.eval),
        "in_training": inputs_in_training(pair.train, pair.eval),
    }
    if isinstance(task, CausalLM):
        return _blocks(task, teacher, student, common | {"cut": 0})
    if isinstance(task, QuestionTask):
        return _spans(task, data, teacher, student, common | {"cut": 0})
    if isinstance(task, TokenTask):
        return _words(task, data, teacher, student, common)
    return _examples(pair, np.stack(teacher), np.stack(student), common)


def _run(pair: Pair) -> tuple[tuple[list[Array], list[Array]], Array]:
    task, data = pair.task, pair.data
    device = next(pair.student.parameters()).device
    reduced: tuple[dict[int, Array], dict[int, Array]] = ({}, {})
    kl = np.full(len(data), np.nan)
    broken = 0
    with torch.inference_mode():
        for rows, batch in batches(data, task.collator(pair.processor), task.eval_batch_size):
            labels = batch.pop("labels", None)
            inputs = {key: value.to(device) for key, value in batch.items()}
            values = [
                prediction(model(**inputs)).values.float().cpu()
                for model in (pair.teacher, pair.student)
            ]
            broken += sum(int((~v.flatten(1).isfinite().all(dim=1)).sum()) for v in values)
            for found, value in zip(reduced, values, strict=True):
                found.update(zip(rows, task.reduce(value, labels).numpy(), strict=True))
            for number, row in enumerate(rows):
                ours, theirs = (task.compared(v[number], data, row) for v in reversed(values))
                if ours is not None and theirs is not None and len(ours):
                    kl[row] = float(divergence(ours, theirs).mean())
    refuse_non_finite(broken, 2 * len(data))
    first, second = ([found[row] for row in range(len(data))] for found in reduced)
    return (first, second), kl


def _examples(pair: Pair, teacher: Array, student: Array, common: dict[str, Any]) -> Answers:
    task, given = pair.task, getattr(pair.data, "labels", None)
    unit = "image" if task.kind == "image_classification" else "example"
    common |= {"unit": unit, "names": task.label_names}
    if not task.label_names:
        labels = np.asarray(given, dtype=np.float64)
        theirs, ours = (v.reshape(len(v)).astype(np.float64) for v in (teacher, student))
        return Answers(
            kind="numbers",
            labels=labels,
            teacher=theirs,
            student=ours,
            same=None,
            errors=_resampled(task.metric, labels, theirs, ours),
            **common,
        )
    theirs, ours = teacher.argmax(-1), student.argmax(-1)
    common |= {"kind": "classes", "teacher": theirs, "student": ours, "same": theirs == ours}
    if given is None:
        return Answers(labels=None, errors=None, **common)
    labels = np.asarray(given)
    if task.metric == "accuracy":
        errors = proportion_errors(theirs == labels, ours == labels)
    else:
        errors = _resampled(task.metric, labels, theirs, ours)
    return Answers(labels=labels, errors=errors, **common)


def _resampled(metric: str, labels: Array, teacher: Array, student: Array) -> Errors:
    compute = METRICS[metric].compute
    return paired_errors(
        lambda some: (compute(teacher[some], labels[some]), compute(student[some], labels[some])),
        len(labels),
    )


def _words(
    task: TokenTask, data: Any, teacher: list[Array], student: list[Array], common: dict[str, Any]
) -> Answers:
    chosen = [[row[data.starts[i]] for i, row in enumerate(rows)] for rows in (teacher, student)]
    one, other = (np.concatenate(rows).astype(np.int64) for rows in chosen)
    common |= {"kind": "classes", "unit": "word", "names": task.label_names}
    common |= {"teacher": one, "student": other, "same": one == other}
    if data.labels is None:
        return Answers(labels=None, errors=None, **common)
    given = [np.asarray(row)[data.starts[i]] for i, row in enumerate(data.labels)]
    tags = [[[task.label_names[int(k)] for k in row] for row in rows] for rows in (given, *chosen)]
    wanted, theirs, ours = tags

    def score(some: Array) -> tuple[float, float]:
        right = [wanted[i] for i in some]
        found = [
            compute_metrics(task.kind, [rows[i] for i in some], right)[task.metric]
            for rows in (theirs, ours)
        ]
        return found[0], found[1]

    return Answers(
        labels=np.concatenate(given).astype(np.int64),
        errors=paired_errors(score, len(given)),
        entities=_by_type(wanted, theirs, ours) if is_bio(task.label_names) else {},
        **common,
    )


def _by_type(
    wanted: list[list[str]], theirs: list[list[str]], ours: list[list[str]]
) -> dict[str, tuple[ClassScores, ClassScores]]:
    sets = [
        {(row, *entity) for row, tags in enumerate(rows) for entity in entities(tags)}
        for rows in (wanted, theirs, ours)
    ]
    kinds = sorted({kind for found in sets for _, kind, _, _ in found})
    scores = {}
    for kind in kinds:
        right, *found = ({e for e in each if e[1] == kind} for each in sets)
        teacher, student = (ClassScores.of(len(f & right), len(f), len(right)) for f in found)
        scores[kind] = (teacher, student)
    return scores


def _blocks(
    task: CausalLM, teacher: list[Array], student: list[Array], common: dict[str, Any]
) -> Answers:
    sums = [np.stack(rows) for rows in (teacher, student)]
    compute = METRICS[task.metric].compute

    def score(some: Array) -> tuple[float, float]:
        found = [compute(s[some, 0], s[some, 1]) for s in sums]
        return found[0], found[1]

    theirs, ours = (s[:, 0] / s[:, 1] for s in sums)
    return Answers(
        kind="blocks",
        unit="block",
        names=(),
        labels=None,
        teacher=theirs,
        student=ours,
        same=None,
        errors=paired_errors(score, len(theirs)),
        **common,
    )


def _spans(
    task: QuestionTask,
    data: Any,
    teacher: list[Array],
    student: list[Array],
    common: dict[str, Any],
) -> Answers:
    found = [[a.answer for a in task.answers(rows, data)] for rows in (teacher, student)]
    same = np.array([one == other for one, other in zip(*found, strict=True)])
    common |= {"kind": "spans", "unit": "question", "names": (), "labels": None, "same": same}
    given = data.examples.labels
    if given is None:
        none = np.zeros(len(same), dtype=bool)
        return Answers(teacher=none, student=none, errors=None, **common)
    accepted = [[text for text, _ in texts] or [""] for texts in given]
    theirs, ours = (
        np.array(
            [
                compute_metrics(task.kind, [answer], [texts])["exact_match"] == 1
                for answer, texts in zip(answers, accepted, strict=True)
            ]
        )
        for answers in found
    )

    def score(some: Array) -> tuple[float, float]:
        texts = [accepted[i] for i in some]
        values = [
            compute_metrics(task.kind, [answers[i] for i in some], texts)[task.metric]
            for answers in found
        ]
        return values[0], values[1]

    errors = paired_errors(score, len(same))
    return Answers(teacher=theirs, student=ours, errors=errors, **common)


def inputs_in_training(train: Any, eval: Any) -> int | None:
    """Counts evaluation inputs that are training inputs, too, letter for letter.

    Args:
        train: Examples as a task reads them.
        eval: Likewise.

    Returns:
        The number, ``None`` for images and plain text, where it is not looked for.
    """

    def keys(examples: Any) -> list[Any] | None:
        if hasattr(examples, "texts") and hasattr(examples, "pairs"):
            return list(zip(examples.texts, examples.pairs or examples.texts, strict=True))
        if hasattr(examples, "words"):
            return [tuple(words) for words in examples.words]
        if hasattr(examples, "questions"):
            return list(zip(examples.contexts, examples.questions, strict=True))
        return None

    known, asked = keys(train), keys(eval)
    if known is None or asked is None:
        return None
    found = set(known)
    return sum(key in found for key in asked)
