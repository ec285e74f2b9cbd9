"""Warnings about a study."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ..study import Study, Summary, Variant
from ._format import count, percent
from ._page import Finding

__all__ = ["STUDY_RULES", "StudyFacts", "study_findings"]

_MANY = 4


@dataclass(frozen=True)
class StudyFacts:
    """A study.

    Attributes:
        name: Of its folder.
        study: What was asked for.
        summary: What came of it.
        plots: Further images in ``plots/``, by name.
    """

    name: str
    study: Study
    summary: Summary
    plots: dict[str, bytes]


def study_findings(facts: StudyFacts) -> tuple[Finding, ...]:
    """Returns the warnings about a study, the serious ones first.

    Args:
        facts: The study.
    """
    found = [finding for rule in STUDY_RULES for finding in rule(facts)]
    return tuple(sorted(found, key=lambda finding: not finding.serious))


def failed(facts: StudyFacts) -> Iterator[Finding]:
    """Runs had a loss that was not finite."""
    lost = [v for v in facts.summary.variants if v.failed]
    if lost:
        where = ", ".join(
            f"{v.method} at {_rate(v.learning_rate)} ({v.task}, {v.scheme})" for v in lost[:4]
        )
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        yield Finding(
            "failed",
            f"{count(sum(v.failed for v in lost), 'run')} had a loss or an output that was not "
            f"finite: {where}{more}; such rates are not taken for the best of a method.",
            "Leave out these learning rates, or look at the reasons in runs.jsonl.",
            serious=True,
        )


def no_figures(facts: StudyFacts) -> Iterator[Finding]:
    """A method has no rate at which it can be compared."""
    compared = {(c.best.task, c.best.scheme, c.best.steps, c.best.method)
                for c in facts.summary.comparisons}  # fmt: skip
    lacking = dict.fromkeys(
        f"{v.method} ({v.task}, {v.scheme}, {count(v.steps, 'step')})"
        for v in facts.summary.variants
        if (v.task, v.scheme, v.steps, v.method) not in compared
    )
    if lacking:
        yield Finding(
            "no_figures",
            f"No learning rate gave figures of {', '.join(lacking)}.",
            "Add lower learning rates to the study.",
            serious=True,
        )


def at_edge(facts: StudyFacts) -> Iterator[Finding]:
    """The best rate is an end of those that a method was run at."""
    found = [c.best for c in facts.summary.comparisons if c.at_edge]
    if found:
        further, missing = set[float](), dict[str, None]()
        for best in found:
            listed, beyond = _beyond(facts, best)
            if listed:
                rates = ", ".join(_rate(r) for r in listed)
                missing[f"{best.method} ({best.task}, {best.scheme}) at {rates}"] = None
            else:
                further.add(beyond)
        remedies = []
        if missing:
            remedies.append(
                "Run tutelage compare again, which goes on with what is missing: "
                f"{', '.join(missing)}."
            )
        if further:
            remedies.append(
                f"Add {' and '.join(_rate(e) for e in sorted(further))} to learning_rates; runs "
                "that are known are not repeated."
            )
        names = ", ".join(dict.fromkeys(f"{b.method} ({_rate(b.learning_rate)})" for b in found))
        yield Finding(
            "at_edge",
            f"The best learning rate is an end of those that were run for {names}: the best may "
            "lie beyond, and the comparison may be unfair to these methods.",
            " ".join(remedies),
            serious=True,
        )


def _beyond(facts: StudyFacts, best: Variant) -> tuple[list[float], float]:
    """Returns the rates of the study beyond the best one of a method, and one further out."""
    place = (best.task, best.scheme, best.steps, best.method)
    own = [
        v.learning_rate
        for v in facts.summary.variants
        if (v.task, v.scheme, v.steps, v.method) == place and v.learning_rate is not None
    ]
    asked = sorted(r for r in facts.study.learning_rates if r is not None)
    low, high = min(own), max(own)
    if best.learning_rate == low:
        return [r for r in asked if r < low], low / 3
    return [r for r in asked if r > high], high * 3


def one_rate(facts: StudyFacts) -> Iterator[Finding]:
    """There is one learning rate."""
    if len(facts.study.learning_rates) == 1 and len(facts.study.methods) > 1:
        yield Finding(
            "one_rate",
            "Every method was run at one learning rate: one may look worse for its rate alone.",
            "Give three or more learning_rates, about three times apart.",
        )


def one_seed(facts: StudyFacts) -> Iterator[Finding]:
    """There is one seed."""
    seeds = {seed for v in facts.summary.variants for seed in v.seeds}
    if len(seeds) == 1:
        yield Finding(
            "one_seed",
            "All runs have one seed: the intervals hold for its order of the data, and the spread "
            "over seeds is not known.",
            "Add seeds (seeds: [0, 1, 2]); runs that are known are not repeated.",
            serious=True,
        )


def incomplete(facts: StudyFacts) -> Iterator[Finding]:
    """Runs of the study are missing."""
    wanted = len(facts.study.seeds)
    groups = [v for v in facts.summary.variants if v.steps]
    lacking = sum(max(0, wanted - len(v.seeds) - v.failed) for v in groups)
    if lacking:
        yield Finding(
            "incomplete",
            f"{count(lacking, 'run')} of the variants shown {'is' if lacking == 1 else 'are'} "
            "missing.",
            "Run tutelage compare again; it goes on with what is missing.",
            serious=True,
        )


def undecided(facts: StudyFacts) -> Iterator[Finding]:
    """No interval is clear of zero."""
    changes = [c.change for c in facts.summary.comparisons if c.change is not None]
    if changes and not any(change.excludes_zero for change in changes):
        yield Finding(
            "undecided",
            f"No method is told apart from {facts.summary.baseline!r}: every interval of the KL "
            "holds 0.",
            "Add seeds or evaluation examples, or take the simplest method.",
        )


def flattered(facts: StudyFacts) -> Iterator[Finding]:
    """The best was chosen from many."""
    methods = len(facts.study.methods)
    if methods > _MANY:
        yield Finding(
            "flattered",
            f"The best of {methods} methods on one set of data is flattered by the choice.",
            "Repeat the winner beside the baseline with fresh seeds, and measure it on data that "
            "the study did not see.",
        )


def sensitive(facts: StudyFacts) -> Iterator[Finding]:
    """The best method of a task suffers when its rate is off."""
    by_task = defaultdict(list)
    for found in facts.summary.comparisons:
        if found.best.kl is not None:
            by_task[found.best.task, found.best.scheme, found.best.steps].append(found)
    for (task, scheme, steps), group in by_task.items():
        best = min(group, key=lambda c: float(c.best.kl or 0.0))
        if best.off_by_three is not None and best.off_by_three > 0.5:
            yield Finding(
                "sensitive",
                f"On {task} ({scheme}, {count(steps, 'step')}) the KL of {best.best.method!r} "
                f"rises by {percent(best.off_by_three, 0)} where the learning rate is three times "
                "off.",
                "Keep its learning rate when you use it, or take a method that bears more.",
            )


def machines(facts: StudyFacts) -> Iterator[Finding]:
    """The runs were made on several machines or versions."""
    if len(facts.summary.machines) > 1:
        yield Finding(
            "machines",
            f"The runs come from {len(facts.summary.machines)} machines or versions, between which "
            "equal seeds may give unequal weights.",
            "Compare methods of one machine, or read differences below their spread as none.",
        )


def _rate(rate: float | None) -> str:
    return "the default rate" if rate is None else f"{rate:g}"


STUDY_RULES: tuple[Callable[[StudyFacts], Iterable[Finding]], ...] = (
    failed,
    no_figures,
    at_edge,
    one_seed,
    incomplete,
    one_rate,
    undecided,
    sensitive,
    flattered,
    machines,
)
"""Every rule; add yours here."""
