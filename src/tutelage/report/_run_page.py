"""The page about a run."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from ..errors import ArtefactError
from ..study._analysis import COLUMNS as BLOCK_COLUMNS
from ..study._analysis import table as block_rows
from ..study._layers import BlockError, SignalError
from ..train.metrics import METRICS
from ._comparison import comparison_blocks
from ._costs import size_blocks, speed_blocks, speed_headline
from ._curves import training_blocks
from ._facts import Facts
from ._format import change, count, duration, mib, named, percent, shown, significant
from ._page import Block, Card, Page, Picture, Pre, Section, Table, Text
from ._rules import findings, headline
from ._stored import Analysis, data_uri

__all__ = ["run_page"]


def run_page(facts: Facts) -> Page:
    """Makes the page about a run.

    Args:
        facts: The run.
    """
    result = facts.result
    kind = result.task.replace("_", " ")
    sections = (
        Section("done", "What was done", tuple(_done(facts))),
        Section("training", "The training", tuple(training_blocks(facts))),
        Section("comparison", "Teacher against student", tuple(comparison_blocks(facts))),
        Section("size", "Size", tuple(size_blocks(facts))),
        Section("speed", "Speed", tuple(speed_blocks(facts))),
        Section("inside", "Inside the student", tuple(_inside(facts))),
    )
    return Page(
        title=facts.folder.resolve().name,
        subtitle=f"{result.scheme} student, {kind}, {facts.recipe.student.max_steps} steps, seed "
        f"{result.seed}",
        verdict=_verdict(facts),
        cards=tuple(_cards(facts)),
        findings=findings(facts),
        sections=sections,
    )


def _verdict(facts: Facts) -> str:
    result, pair = facts.result, headline(facts)
    size = f"in weights {result.ratio:.1f} times smaller"
    if pair is None:
        if result.agreement is None:
            return f"The student does its teacher's work {size}."
        return (
            f"The student gives its teacher's answer in {percent(result.agreement)} of "
            f"{count(result.eval_examples, 'example')} {size}."
        )
    teacher, student = pair
    said = (
        f"The student has {named(result.metric)} {shown(result.metric, student)}, its teacher "
        f"{shown(result.metric, teacher)}, {size}"
    )
    if METRICS[result.metric].greater_is_better and teacher > 0:
        said += f": it keeps {percent(student / teacher)} of it"
    return said + "."


def _cards(facts: Facts) -> Iterator[Card]:
    result, pair = facts.result, headline(facts)
    if pair is not None:
        errors = None if facts.answers is None else facts.answers.errors
        sure = ""
        if errors is not None:
            sure = " ± " + change(result.metric, errors.difference).lstrip("+").split(" ")[0]
        off = change(result.metric, pair[1] - pair[0])
        number, _, unit = off.partition(" ")
        yield Card(
            f"{named(result.metric)} of the student",
            shown(result.metric, pair[1]),
            f"teacher {shown(result.metric, pair[0])}; {number}{sure} {unit}".rstrip(),
        )
    yield Card(
        "weights",
        mib(result.student.bytes),
        f"{result.ratio:.1f} times smaller than {mib(result.teacher.bytes)} in float32",
    )
    if result.agreement is not None and result.kl is not None:
        yield Card(
            "agreement with the teacher",
            percent(result.agreement),
            f"KL(teacher || student) {significant(result.kl)} nats",
        )
    speed = speed_headline(facts)
    if speed is not None:
        yield Card("speed", speed[0], f"of {speed[1]}")


def _done(facts: Facts) -> Iterator[Block]:
    result, recipe = facts.result, facts.recipe
    section, schedule = recipe.student, recipe.schedule
    teacher = "fine-tuned by this run" if result.teacher_fine_tuned else "as it was given"
    stage = f", {named(str(schedule.stage))}" if schedule.kind == "constant" else ""
    rows = [
        ("model", recipe.model.name_or_path),
        ("teacher", f"{recipe.model.teacher or 'the model itself'}, {teacher}"),
        ("scheme", result.scheme),
        (
            "training",
            f"{count(section.max_steps, 'step')} of {section.batch_size}, of them "
            f"{recipe.schedule_steps} under intervention ({schedule.kind}{stage})",
        ),
        (
            "learning rate",
            "the default" if section.learning_rate is None else significant(section.learning_rate),
        ),
        (
            "data",
            f"{count(result.train_examples, 'training example')}, "
            f"{count(result.eval_examples, 'evaluation example')}",
        ),
        ("seed", str(result.seed)),
        ("machine", _machine(facts)),
        ("versions", ", ".join(f"{name} {number}" for name, number in result.versions.items())),
        (
            "durations",
            ", ".join(f"{name} {duration(taken)}" for name, taken in result.seconds.items())
            + " (in the process that finished the run)",
        ),
    ]
    yield Table("The run", ("", "what"), tuple(rows), left=(1,))
    plain = yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
    yield Pre("The resolved recipe, every default included", plain)


def _machine(facts: Facts) -> str:
    found = facts.result.machine
    threads = count(facts.result.threads, "thread")
    if not found:
        return f"not recorded (a run of an earlier version), {threads}"
    cores = f"{found['cores']} cores" if found.get("cores") else ""
    parts = (found.get("processor"), found.get("gpu"), cores, threads)
    return ", ".join(str(part) for part in parts if part)


def _inside(facts: Facts) -> Iterator[Block]:
    if not facts.analyses:
        yield Text(facts.missing["analysis"], missing=True)
    for analysis in facts.analyses:
        if analysis.png is None:
            yield Text(f"{analysis.title}: {analysis.caption} No figure was drawn.", missing=True)
        else:
            yield Picture(data_uri(analysis.png), analysis.title, analysis.caption)
        if analysis.name == "blocks":
            yield _blocks(facts, analysis)


def _blocks(facts: Facts, analysis: Analysis) -> Table:
    try:
        found = [
            BlockError(
                block=str(block["block"]),
                signals={name: SignalError(**e) for name, e in block["signals"].items()},
                attention_kl=tuple(map(float, block["attention_kl"])),
            )
            for block in analysis.figures["blocks"]
        ]
        rows = tuple(block_rows(found))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtefactError(
            f"{facts.folder / 'analysis' / 'blocks.json'} is damaged ({error}); run tutelage "
            "analyze again, or remove it."
        ) from None
    return Table(
        "Errors of every block (attention KL: mean over heads and the worst head)",
        BLOCK_COLUMNS,
        rows,
        closed=True,
    )
