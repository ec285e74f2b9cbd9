"""The course of a training: losses over steps, learning rate, evaluations."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

from ..train._log import Logged, TrainingLog
from ..train.metrics import METRICS
from ._facts import Facts
from ._format import named, percent, shown, significant
from ._lines import Band, Line, line_chart
from ._page import Block, Chart, Table, Text

__all__ = ["bands_of", "training_blocks"]

STAGES = {
    "attention_output": ("attention output (TI-O)", "O", 1),
    "context": ("context (TI-C)", "C", 2),
    "attention_map": ("attention map (TI-M)", "M", 3),
    "none": ("no intervention", "-", 0),
}
_DRAWN = ("one of the three, drawn anew every step", "?", 2)
_POINTS = 60
"""Up to so many entries are marked one by one."""


def training_blocks(facts: Facts) -> Iterator[Block]:
    """Yields what a report shows of the student's and the teacher's training.

    Args:
        facts: The run.
    """
    if facts.log is None or not facts.log.logged:
        yield Text(
            "The course of the training is not known: the folder holds no training.json, which "
            "runs of earlier versions did not write."
            if facts.log is None
            else "The training was too short for an entry of its log.",
            missing=True,
        )
    else:
        yield from _student(facts, facts.log)
    if facts.teacher_log is not None and facts.teacher_log.logged:
        log = facts.teacher_log
        line = Line("loss", tuple((e.step, e.loss) for e in log.logged), marks=False)
        svg = line_chart(
            [line],
            title="Loss of the teacher over steps of its fine-tuning",
            x_label="step",
            y_label="loss",
            x_range=(0, log.steps),
            zero=True,
            height=230,
        )
        yield Chart(svg, "Fine-tuning of the teacher: its task loss, in nats for classes.")


def _student(facts: Facts, log: TrainingLog) -> Iterator[Block]:
    bands, ends = bands_of(log), (0.0, float(log.steps))
    names = list(dict.fromkeys(name for entry in log.logged for name in entry.terms))
    marks = len(log.logged) <= _POINTS
    lines = [Line("loss", _points((e.step, e.loss) for e in log.logged), marks=marks)]
    lines += [
        Line(
            named(name),
            _points((e.step, e.terms.get(name)) for e in log.logged),
            series=index,
            marks=marks,
        )
        for index, name in enumerate(names, 1)
    ]
    yield Chart(
        line_chart(
            lines,
            title="Loss of the student and its terms over training steps",
            x_label="step",
            y_label="mean since the point before",
            bands=bands,
            x_range=ends,
            log_y=True,
        ),
        _loss_caption(log, facts.recipe.student.ramp),
        _losses(log, names),
    )
    rates = [(float(e.step), e.learning_rate) for e in log.logged]
    if any(rate is not None for _, rate in rates):
        yield Chart(
            line_chart(
                [Line("learning rate", tuple(rates), marks=False)],
                title="Learning rate over training steps",
                x_label="step",
                y_label="learning rate",
                bands=bands,
                x_range=ends,
                zero=True,
                height=200,
            ),
            "Learning rate. Each of the two steps of the training, with and without intervention, "
            "has its own warm-up and decay.",
        )
    if log.evaluated:
        yield from _evaluations(facts, log, bands)
    else:
        yield Text(
            "The student was not evaluated while it trained; student.eval_steps=N has it evaluated "
            "every N steps."
        )


def _points(
    pairs: Iterable[tuple[int, float | None]],
) -> tuple[tuple[float, float | None], ...]:
    return tuple((float(step), value) for step, value in pairs)


def _loss_caption(log: TrainingLog, ramp: float) -> str:
    said = (
        "The loss that was minimised (the weighted sum) and every term of it (unweighted), on a "
        "logarithmic scale. "
    )
    if ramp:
        said += (
            f"Over the first {percent(ramp, 0)} of the steps weights and activations went from "
            "full precision to quantized, so that the loss rises there. "
        )
    if not log.schedule_steps:
        return said + "The teacher did not intervene."
    return said + (
        "Above: what the teacher put in place of the student's own signals, O the attention "
        "output, C the context, M the attention map. Under another stage the same term compares "
        "other things, so that steps between stages are no progress or loss."
    )


def bands_of(log: TrainingLog) -> tuple[Band, ...]:
    """Returns the stages of a training as stretches of its steps.

    Args:
        log: The log.
    """
    found = []
    for key, group in itertools.groupby(log.logged, _stage):
        entries = list(group)
        name, short, tone = STAGES.get(key, _DRAWN if key == "?" else (named(key), key[:1], 2))
        found.append(Band(entries[0].since, entries[-1].step, name, short, tone))
    return tuple(found) if log.schedule_steps else ()


def _stage(entry: Logged) -> str:
    """Returns the stage of an entry, ``"?"`` where it holds several."""
    return next(iter(entry.stages)) if len(entry.stages) == 1 else "?"


def _losses(log: TrainingLog, names: list[str]) -> Table:
    rows = [
        (
            f"{e.since + 1} to {e.step}",
            ", ".join(named(stage) for stage in e.stages),
            "-" if e.learning_rate is None else significant(e.learning_rate),
            significant(e.loss),
            *(significant(e.terms[n]) if n in e.terms else "-" for n in names),
        )
        for e in log.logged
    ]
    columns = ("steps", "intervention", "next rate", "loss", *map(named, names))
    return Table("The figures of the curves", columns, tuple(rows), left=(1,), closed=True)


def _evaluations(facts: Facts, log: TrainingLog, bands: tuple[Band, ...]) -> Iterator[Block]:
    metric = facts.result.metric
    names = sorted({n for e in log.evaluated for n in e.metrics}, key=lambda n: (n != metric, n))
    alike = [n for n in names if n in METRICS and METRICS[n].fraction]
    scale = 100.0 if alike else 1.0
    drawn = alike or names[:1]
    lines = [
        Line(
            named(name),
            _points((e.step, _scaled(e.metrics.get(name), scale)) for e in log.evaluated),
            series=index,
        )
        for index, name in enumerate(drawn)
    ]
    teacher = facts.result.teacher.metrics.get(metric)
    if teacher is not None and metric in drawn:
        flat = tuple((x, scale * teacher) for x in (0.0, float(log.steps)))
        lines.append(Line(f"teacher's {named(metric)}", flat, series=6, marks=False))
    if lines:
        yield Chart(
            line_chart(
                lines,
                title="Metrics of the student on the evaluation data over training steps",
                x_label="step",
                y_label="per cent" if alike else named(drawn[0]),
                bands=bands,
                x_range=(0.0, float(log.steps)),
                height=260,
            ),
            "The student on the evaluation data while it trained, always without intervention.",
            _evaluated(log, names),
        )


def _scaled(value: float | None, scale: float) -> float | None:
    return None if value is None else scale * value


def _evaluated(log: TrainingLog, names: list[str]) -> Table:
    rows = [
        (
            str(e.step),
            "-" if e.loss is None else significant(e.loss),
            *(shown(n, e.metrics.get(n)) for n in names),
        )
        for e in log.evaluated
    ]
    columns = ("step", "task loss", *map(named, names))
    return Table("The figures of the evaluations", columns, tuple(rows), closed=True)
