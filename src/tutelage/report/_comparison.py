"""Teacher against student: class by class, entity by entity, or point by point."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ._answers import Answers
from ._facts import Facts
from ._format import change, count, named, percent, shown, significant
from ._measures import ClassScores, confusion, scores_of
from ._page import Block, Cell, Chart, Table, Text
from ._points import scatter

__all__ = ["comparison_blocks"]

Array = npt.NDArray[Any]

_CLASSES, _MATRIX, _PAIRS = 40, 15, 15


def comparison_blocks(facts: Facts) -> Iterator[Block]:
    """Yields what a report shows of the answers of both models.

    Args:
        facts: The run.
    """
    yield _metrics(facts)
    yield from _also(facts)
    answers = facts.answers
    if answers is None:
        yield Text(facts.missing["answers"], missing=True)
        return
    if answers.kind == "classes":
        yield from _classes(answers)
    elif answers.kind == "spans":
        yield from _spans(answers)
    else:
        yield from _numbers(answers)


def _metrics(facts: Facts) -> Table:
    result, answers = facts.result, facts.answers
    theirs, ours = result.teacher.metrics, result.student.metrics
    errors = None if answers is None else answers.errors
    rows: list[tuple[str | Cell, ...]] = []
    for name in sorted(ours, key=lambda name: name != result.metric):
        sure = ""
        if name == result.metric and errors is not None:
            sure = change(name, errors.difference).lstrip("+-")
        rows.append(
            (
                Cell(named(name), strong=name == result.metric),
                shown(name, theirs.get(name)),
                shown(name, ours[name]),
                change(name, ours[name] - theirs[name]) if name in theirs else "-",
                sure,
            )
        )
    if result.agreement is not None:
        rows.append(("agreement", "", percent(result.agreement), "", ""))
    if result.kl is not None:
        rows.append(("KL(teacher || student), nats", "", significant(result.kl), "", ""))
    return Table(
        f"Both models on {count(result.eval_examples, 'evaluation example')}, without intervention",
        ("", "teacher", "student", "difference", "standard error of the difference"),
        tuple(rows),
    )


def _also(facts: Facts) -> Iterator[Block]:
    metric = facts.result.metric
    rows = tuple(
        (
            name,
            f"{found.examples:,}",
            shown(metric, found.teacher.get(metric)),
            shown(metric, found.student.get(metric)),
            "-" if found.agreement is None else percent(found.agreement),
            "-" if found.kl is None else significant(found.kl),
        )
        for name, found in facts.result.also.items()
    )
    if rows:
        columns = ("data", "examples", f"teacher's {named(metric)}", "student's", "agreement", "KL")
        yield Table("Both models on further data", columns, rows)


def _classes(answers: Answers) -> Iterator[Block]:
    names, unit = answers.names, answers.unit
    if answers.labels is not None:
        yield _outcomes(
            f"Who is right, {unit} by {unit}",
            answers.teacher == answers.labels,
            answers.student == answers.labels,
            unit,
        )
    if answers.entities:
        yield _scores(
            "Entities by type: precision, recall and F1 of teacher and student",
            [(name, *pair) for name, pair in answers.entities.items()],
            {},
        )
    agreement = {
        name: float((answers.student == index)[answers.teacher == index].mean())
        for index, name in enumerate(names)
        if (answers.teacher == index).any()
    }
    if answers.labels is None:
        rows = tuple(
            (
                name,
                f"{int((answers.teacher == index).sum()):,}",
                f"{int((answers.student == index).sum()):,}",
                percent(agreement[name]) if name in agreement else "-",
            )
            for index, name in enumerate(names[:_CLASSES])
        )
        columns = ("class", "given by the teacher", "by the student", "agreement")
        caption = f"Classes as both models give them{_more(names, f'the first {_CLASSES}')}"
        yield Table(caption, columns, rows)
    else:
        both = [
            scores_of(answers.labels, given, len(names))
            for given in (answers.teacher, answers.student)
        ]
        found = sorted(zip(names, *both, strict=True), key=lambda row: row[2].f1 - row[1].f1)
        if len(names) <= _CLASSES:
            found = list(zip(names, *both, strict=True))
        yield _scores(
            "Classes: precision, recall and F1 of teacher and student"
            + _more(names, f"the {_CLASSES} whose F1 fell most"),
            found[:_CLASSES],
            agreement,
        )
    yield _confusion(answers)


def _more(names: tuple[str, ...], which: str) -> str:
    """Returns which of many classes are shown, empty where all are."""
    return f" ({which} of {len(names)} classes)" if len(names) > _CLASSES else ""


def _scores(
    caption: str, found: list[tuple[str, ClassScores, ClassScores]], agreement: dict[str, float]
) -> Table:
    rows: list[tuple[str | Cell, ...]] = []
    for name, theirs, ours in found:
        cells: list[str | Cell] = [name, f"{theirs.support:,}"]
        for key in ("precision", "recall", "f1"):
            one, other = getattr(theirs, key), getattr(ours, key)
            empty = not (theirs.support or theirs.predicted or ours.predicted)
            cells += ["-", "-"] if empty else [percent(one), percent(other)]
        cells.append(Cell(f"{100 * (ours.f1 - theirs.f1):+.1f}", strong=ours.f1 < theirs.f1 - 0.1))
        if agreement:
            cells.append(percent(agreement[name]) if name in agreement else "-")
        rows.append(tuple(cells))
    columns = ["", "number"]
    for key in ("precision", "recall", "F1"):
        columns += [f"{key}, teacher", "student"]
    columns.append("F1 difference, points")
    if agreement:
        columns.append("agreement where the teacher gives it")
    return Table(caption, tuple(columns), tuple(rows))


def _outcomes(caption: str, teacher: Array, student: Array, unit: str) -> Table:
    total = len(teacher)
    rows = tuple(
        (name, f"{int(some.sum()):,}", percent(float(some.mean())))
        for name, some in (
            ("both right", teacher & student),
            ("the teacher alone", teacher & ~student),
            ("the student alone", student & ~teacher),
            ("both wrong", ~teacher & ~student),
        )
    )
    return Table(f"{caption} ({total:,} in all)", ("", f"{unit}s", "share"), rows)


def _confusion(answers: Answers) -> Table:
    names = answers.names
    counts = confusion(answers.teacher, answers.student, len(names))
    if len(names) > _MATRIX:
        apart = counts.copy()
        np.fill_diagonal(apart, 0)
        order = np.argsort(-apart, axis=None, kind="stable")[:_PAIRS]
        pairs = [(int(i) // len(names), int(i) % len(names)) for i in order]
        rows = tuple(
            (names[i], names[j], f"{apart[i, j]:,}", percent(apart[i, j] / counts[i].sum()))
            for i, j in pairs
            if apart[i, j]
        )
        return Table(
            f"Where student and teacher differ most often, of {len(names)} classes",
            ("teacher", "student", f"{answers.unit}s", "of the teacher's"),
            rows,
            left=(1,),
        )
    totals = np.maximum(counts.sum(1, keepdims=True), 1)
    shares = counts / totals
    matrix: tuple[tuple[str | Cell, ...], ...] = tuple(
        (
            names[i],
            *(
                Cell(
                    f"{counts[i, j]:,}" if counts[i, j] else "·",
                    heat=float(shares[i, j]) if counts[i, j] else None,
                    strong=i != j and shares[i, j] > 0.1,
                )
                for j in range(len(names))
            ),
        )
        for i in range(len(names))
    )
    return Table(
        f"What the student gives (columns) where the teacher gives a class (rows), in "
        f"{answers.unit}s; the darker, the larger the share of the row",
        ("teacher \\ student", *names),
        matrix,
        matrix=True,
    )


def _spans(answers: Answers) -> Iterator[Block]:
    assert answers.same is not None
    yield Text(
        f"Teacher and student give the same answer, letter for letter, to "
        f"{percent(float(answers.same.mean()))} of {count(len(answers.same), 'question')}."
    )
    if answers.errors is not None:
        yield _outcomes(
            "Who gives an accepted answer, letter for letter",
            answers.teacher,
            answers.student,
            "question",
        )


def _numbers(answers: Answers) -> Iterator[Block]:
    x, y = answers.teacher, answers.student
    regression = answers.kind == "numbers"
    what = "answer" if regression else "loss of a token in a block, nats"
    apart = y - x
    yield Chart(
        scatter(
            x.tolist(),
            y.tolist(),
            title=f"{what.capitalize()} of the student over that of the teacher",
            x_label=f"teacher: {what}",
            y_label=f"student: {what}",
        ),
        f"Every {answers.unit} is a point; on the line both models are equal. On average the "
        f"student is {significant(float(np.abs(apart).mean()))} off its teacher.",
    )
    rows = [
        (name, *(significant(float(np.quantile(values, q))) for q in (0.05, 0.25, 0.5, 0.75, 0.95)))
        for name, values in (("teacher", x), ("student", y), ("student minus teacher", apart))
    ]
    if answers.labels is not None:
        rows.append(
            (
                "label",
                *(
                    significant(float(np.quantile(answers.labels, q)))
                    for q in (0.05, 0.25, 0.5, 0.75, 0.95)
                ),
            )
        )
    yield Table(
        f"How the {what if regression else 'losses'} are spread over {answers.unit}s",
        ("", "5 %", "25 %", "median", "75 %", "95 %"),
        tuple(rows),
    )
