"""The page about a study."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import yaml

from ..errors import ArtefactError, StudyError
from ..study import COLUMNS, Comparison, Study, Summary, Variant, load_study, rows
from ._format import count, named, percent, shown, significant
from ._lines import Line, line_chart
from ._page import Block, Card, Cell, Chart, Page, Picture, Pre, Section, Table, Text
from ._points import interval_chart
from ._stored import PNG, data_uri, read_json
from ._study_rules import StudyFacts, study_findings

__all__ = ["STUDY_FILE", "gather_study", "study_page"]

STUDY_FILE = "study.yaml"
_SUMMARY, _PLOTS = "summary.json", "plots"

Place = tuple[str, str, int]


def gather_study(folder: Path) -> StudyFacts:
    """Reads a study.

    Args:
        folder: The output folder of ``tutelage compare``.

    Raises:
        StudyError: It has no results yet, or a file is damaged.
    """
    study = load_study(folder / STUDY_FILE)
    file = folder / _SUMMARY
    again = f"run tutelage compare {folder / STUDY_FILE} again"
    if not file.is_file():
        raise StudyError(f"{folder} holds a study without results ({_SUMMARY}); {again}.")
    try:
        summary = Summary.from_dict(read_json(file, again))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StudyError(f"{file} is damaged ({error}); {again}.") from None
    except ArtefactError as error:
        raise StudyError(str(error)) from None
    return StudyFacts(folder.resolve().name, study, summary, _plots(folder, summary))


def _plots(folder: Path, summary: Summary) -> dict[str, bytes]:
    """Returns the images of a study that are not drawn anew here."""
    drawn = {"_".join((v.task, v.scheme, str(v.steps))).replace(" ", "-") for v in summary.variants}
    found = {}
    for file in sorted((folder / _PLOTS).glob("*.png")):
        if file.stem not in drawn:
            found[file.stem] = file.read_bytes()
            if not found[file.stem].startswith(PNG):
                raise StudyError(f"{file} is no PNG image; remove it.")
    return found


def study_page(facts: StudyFacts) -> Page:
    """Makes the page about a study.

    Args:
        facts: The study.
    """
    summary, study = facts.summary, facts.study
    places = _places(summary)
    sections = [
        Section("methods", "Methods side by side", tuple(_methods(facts))),
        *(
            Section(f"place-{i}", _title(place), tuple(_place(summary, place)))
            for i, place in enumerate(places)
        ),
        Section("rates", "All learning rates", (_variants(summary),)),
    ]
    if facts.plots:
        pictures = tuple(
            Picture(data_uri(png), name.replace("_", " "), "") for name, png in facts.plots.items()
        )
        sections.append(Section("plots", "Further plots", pictures))
    sections.append(Section("done", "What was done", tuple(_done(facts))))
    return Page(
        title=facts.name,
        subtitle=f"{count(len(study.methods), 'method')}, {count(len(study.tasks), 'task')}, "
        f"{count(len(study.schemes), 'scheme')}, {count(len(study.seeds), 'seed')}; baseline "
        f"{study.baseline}",
        verdict=_verdict(summary),
        cards=tuple(_cards(summary)),
        findings=study_findings(facts),
        sections=tuple(sections),
    )


def _places(summary: Summary) -> list[Place]:
    """Returns task, scheme and budget of every comparison; no budget where nothing trains."""
    found = dict.fromkeys((v.task, v.scheme, v.steps) for v in summary.variants)
    trained = {place[:2] for place in found if place[2]}
    return [place for place in found if place[2] or place[:2] not in trained]


def _title(place: Place) -> str:
    task, scheme, steps = place
    return f"{task}, {scheme}, {count(steps, 'step')}"


def _best(summary: Summary) -> dict[Place, Comparison]:
    groups: dict[Place, list[Comparison]] = defaultdict(list)
    for found in summary.comparisons:
        if found.best.kl is not None and found.best.steps:
            groups[found.best.task, found.best.scheme, found.best.steps].append(found)
    return {place: min(g, key=lambda c: float(c.best.kl or 0.0)) for place, g in groups.items()}


def _verdict(summary: Summary) -> str:
    clear = [c for c in summary.comparisons if c.change is not None and c.change.high < 0]
    if not clear:
        return (
            f"No method has a KL to the teacher that is surely below that of the baseline, "
            f"{summary.baseline}."
        )
    best = min(clear, key=lambda c: c.change.value if c.change is not None else 0.0)
    change = best.change
    assert change is not None
    where = _title((best.best.task, best.best.scheme, best.best.steps))
    return (
        f"{best.best.method} is furthest ahead of the baseline, {summary.baseline}: its KL to the "
        f"teacher is {percent(-change.value, 0)} lower ({percent(-change.high, 0)} to "
        f"{percent(-change.low, 0)}; {where})."
    )


def _cards(summary: Summary) -> Iterator[Card]:
    for place, found in list(_best(summary).items())[:4]:
        metric = summary.metrics[found.best.task]
        rate = found.best.learning_rate
        yield Card(
            f"lowest KL, {_title(place)}",
            found.best.method,
            f"KL {significant(found.best.kl or 0.0)}, {named(metric)} "
            f"{shown(metric, found.best.metric)} (teacher "
            f"{shown(metric, summary.teachers[found.best.task])}), rate "
            f"{'default' if rate is None else f'{rate:g}'}",
        )


def _methods(facts: StudyFacts) -> Iterator[Block]:
    summary = facts.summary
    intervals = [
        (
            f"{c.best.method}, {_title((c.best.task, c.best.scheme, c.best.steps))}",
            100 * c.change.value,
            100 * c.change.low,
            100 * c.change.high,
        )
        for c in summary.comparisons
        if c.change is not None
    ]
    if intervals:
        yield Chart(
            interval_chart(
                intervals,
                title=f"Change of the KL against {summary.baseline}, with 95 % intervals",
                x_label=f"change of the KL against {summary.baseline}, per cent",
            ),
            "Left of 0 a method is nearer to the teacher than the baseline at its own best rate; "
            "95 % bootstrap intervals over seeds and examples, paired.",
        )
    else:
        yield Text("There is nothing to compare with the baseline yet.", missing=True)


def _table(summary: Summary, place: Place) -> Table:
    """Returns the rows of a place, and those of methods that do not train."""
    task, scheme, steps = place
    top = _best(summary).get(place)
    found: list[tuple[str | Cell, ...]] = []
    for comparison, row in zip(summary.comparisons, rows(summary), strict=True):
        best = comparison.best
        if (best.task, best.scheme) == (task, scheme) and best.steps in (steps, 0):
            method, *cells = (cell.replace("+-", "±") for cell in row[3:])
            found.append((Cell(method, strong=comparison is top), *cells))
    return Table(
        "Every method at the learning rate where its KL to the teacher is lowest, on the "
        "evaluation data and without intervention: mean and standard deviation over seeds",
        COLUMNS[3:],
        tuple(found),
    )


def _place(summary: Summary, place: Place) -> Iterator[Block]:
    names = list(dict.fromkeys(v.method for v in summary.variants))
    here = [v for v in summary.variants if (v.task, v.scheme, v.steps) == place]
    tops = [
        c.best for c in summary.comparisons if (c.best.task, c.best.scheme, c.best.steps) == place
    ]
    curves = [
        Line(
            v.method,
            tuple((float(step), kl) for step, kl in v.curve),
            series=names.index(v.method),
        )
        for v in tops
        if v.curve
    ]
    yield _table(summary, place)
    if not curves:
        yield Text("No run here has a KL to show.", missing=True)
        return
    yield Chart(
        line_chart(
            curves,
            title="KL to the teacher over training steps, each method at its best rate",
            x_label="step",
            y_label="KL(teacher || student), nats",
            log_y=True,
        ),
        "Convergence: mean over seeds, each method at its best learning rate.",
    )
    rated = []
    for name in names:
        found = sorted(
            (v.learning_rate, v.kl, v.kl_spread)
            for v in here
            if v.method == name and v.learning_rate is not None and v.kl is not None
        )
        if found:
            points = tuple((rate, kl) for rate, kl, _ in found)
            spreads = tuple(spread for *_, spread in found)
            rated.append(Line(name, points, spreads, series=names.index(name)))
    if rated and any(len(line.points) > 1 for line in rated):
        yield Chart(
            line_chart(
                rated,
                title="KL to the teacher over the learning rate",
                x_label="learning rate",
                y_label="KL at the end, nats",
                log_x=True,
                log_y=True,
            ),
            "How much the learning rate matters: mean and standard deviation over seeds after the "
            "last step.",
        )


def _variants(summary: Summary) -> Table:
    return Table(
        "Every method at every learning rate",
        ("method", "task", "scheme", "steps", "rate", "seeds", "metric", "KL", "agreement"),
        tuple(_variant(v, summary) for v in summary.variants),
        left=(1, 2),
    )


def _variant(v: Variant, summary: Summary) -> tuple[str | Cell, ...]:
    metric = summary.metrics.get(v.task, "")
    spread = len(v.seeds) > 1
    kl = "-" if v.kl is None else significant(v.kl)
    lost = f" ({v.failed} failed)" if v.failed else ""
    return (
        v.method,
        v.task,
        v.scheme,
        f"{v.steps:,}",
        "default" if v.learning_rate is None else f"{v.learning_rate:g}",
        Cell(f"{len(v.seeds)}{lost}", strong=bool(v.failed)),
        shown(metric, v.metric) + (f" ± {100 * v.metric_spread:.1f}" if spread else ""),
        kl + (f" ± {significant(v.kl_spread)}" if spread and v.kl is not None else ""),
        "-" if v.agreement is None else percent(v.agreement),
    )


def _done(facts: StudyFacts) -> Iterator[Block]:
    study: Study = facts.study
    teachers = ", ".join(
        f"{task}: {named(metric)} {shown(metric, facts.summary.teachers[task])}"
        for task, metric in facts.summary.metrics.items()
    )
    places = "; ".join(", ".join(f"{k} {v}" for k, v in m.items()) for m in facts.summary.machines)
    table = (
        ("methods", ", ".join(study.methods)),
        ("baseline", study.baseline),
        ("schemes", ", ".join(study.schemes)),
        ("steps", ", ".join(map(str, study.budgets))),
        ("seeds", ", ".join(map(str, study.seeds))),
        ("teachers", teachers),
        ("machines", places),
    )
    yield Table("The study", ("", ""), table, left=(1,))
    plain = yaml.safe_dump(study.model_dump(), sort_keys=False, allow_unicode=True)
    yield Pre("The study as it was asked for", plain)
