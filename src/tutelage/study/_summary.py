"""What the runs of a study say together."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..errors import StudyError
from ._grid import Cell
from ._records import Record, Records
from ._sections import Study
from ._statistics import Interval, area_over_rates, paired_bootstrap, steps_to, worst_within

__all__ = ["Comparison", "Summary", "Variant", "summarize"]


@dataclass(frozen=True)
class Variant:
    """A method at one learning rate, over its seeds.

    Attributes:
        task: Name of the task.
        scheme: Name of the scheme.
        steps: Training steps.
        method: Name of the method.
        learning_rate: Peak learning rate, ``None`` for the default.
        seeds: Seeds with figures.
        failed: Number of runs without, since something was not finite.
        metric: Mean of the headline metric.
        metric_spread: Its standard deviation over seeds, 0 for one.
        kl: Mean KL(teacher || student), ``None`` where outputs are not classes.
        kl_spread: Its standard deviation over seeds.
        agreement: Mean agreement with the teacher.
        curve: (step, mean KL) at every evaluation.
    """

    task: str
    scheme: str
    steps: int
    method: str
    learning_rate: float | None
    seeds: tuple[int, ...]
    failed: int
    metric: float | None
    metric_spread: float
    kl: float | None
    kl_spread: float
    agreement: float | None
    curve: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Comparison:
    """A method at its best learning rate beside the baseline at its own.

    Attributes:
        best: The method where its mean KL is lowest, over the seeds that all its rates have.
        at_edge: Whether that is an end of the grid of learning rates: its best may lie beyond.
        change: Relative change of the KL against the baseline, paired over seeds and examples.
        steps_to_target: Steps until the mean KL is that of the baseline at its end; ``None`` where
            that is not reached.
        area: Mean KL over the logarithm of the learning rate, ``None`` for one rate.
        off_by_three: Relative rise of the KL where the rate is up to 3 times off, ``None`` where
            the grid does not reach so far.
    """

    best: Variant
    at_edge: bool
    change: Interval | None
    steps_to_target: float | None
    area: float | None
    off_by_three: float | None


@dataclass(frozen=True)
class Summary:
    """All of a study.

    Attributes:
        baseline: Name of the baseline.
        metrics: Headline metric by task.
        teachers: The teacher's headline metric by task.
        variants: Every method at every learning rate.
        comparisons: Every method at its best.
        machines: Where the runs were made.
    """

    baseline: str
    metrics: dict[str, str]
    teachers: dict[str, float | None]
    variants: tuple[Variant, ...]
    comparisons: tuple[Comparison, ...]
    machines: tuple[dict[str, Any], ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Summary:
        """Reads what ``to_dict`` returned.

        Args:
            values: The plain data.

        Raises:
            KeyError: Something is missing.
            TypeError: Something is of another kind.
        """
        comparisons = [
            Comparison(
                **{
                    **found,
                    "best": _variant_from(found["best"]),
                    "change": None if found["change"] is None else Interval(**found["change"]),
                }
            )
            for found in values["comparisons"]
        ]
        variants = tuple(_variant_from(found) for found in values["variants"])
        plain = {**values, "variants": variants, "comparisons": tuple(comparisons)}
        return cls(**{**plain, "machines": tuple(values["machines"])})


def _variant_from(values: dict[str, Any]) -> Variant:
    curve = tuple((int(step), float(kl)) for step, kl in values["curve"])
    return Variant(**{**values, "seeds": tuple(values["seeds"]), "curve": curve})


def summarize(study: Study, grid: Sequence[Cell], records: Records) -> Summary:
    """Compares the runs of a study that are over.

    Args:
        study: The study.
        grid: Its runs.
        records: Those that are over.

    Raises:
        StudyError: None is, or files are damaged.
    """
    done = [cell for cell in grid if cell.key in records]
    if not done:
        raise StudyError(f"no run of the study in {study.output} is over; run tutelage compare.")
    groups: dict[tuple[Any, ...], list[Cell]] = defaultdict(list)
    for cell in done:
        place = (cell.task, cell.scheme, cell.steps, cell.method, cell.learning_rate)
        groups[place].append(cell)
    variants = {place: _variant(place, found, records) for place, found in groups.items()}
    found = [records[cell.key] for cell in done]
    machines = {repr(record.machine): record.machine for record in found}
    return Summary(
        baseline=study.baseline,
        metrics={record.task: record.metric for record in found},
        teachers={record.task: record.teacher for record in found},
        variants=tuple(variants.values()),
        comparisons=tuple(_comparisons(study, groups, variants, records)),
        machines=tuple(machines.values()),
    )


def _variant(place: tuple[Any, ...], cells: list[Cell], records: Records) -> Variant:
    task, scheme, steps, method, rate = place
    found = [records[cell.key] for cell in cells]
    whole = [record for record in found if record.failed is None]
    metric = _spread(record.points[-1].metric for record in whole)
    kl = _spread(record.points[-1].kl for record in whole)
    agreement = _spread(record.points[-1].agreement for record in whole)
    seeds = tuple(cell.seed for cell, r in zip(cells, found, strict=True) if r.failed is None)
    return Variant(
        task=task,
        scheme=scheme,
        steps=steps,
        method=method,
        learning_rate=rate,
        seeds=seeds,
        failed=len(found) - len(whole),
        metric=metric[0],
        metric_spread=metric[1],
        kl=kl[0],
        kl_spread=kl[1],
        agreement=agreement[0],
        curve=_curve(whole) if kl[0] is not None else (),
    )


def _spread(values: Iterable[float | None]) -> tuple[float | None, float]:
    known = [value for value in values if value is not None]
    if not known:
        return None, 0.0
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def _curve(records: Sequence[Record]) -> tuple[tuple[int, float], ...]:
    steps = [point.step for point in records[0].points]
    figures = [[float(point.kl or 0.0) for point in record.points] for record in records]
    # As in _spread, so that a curve ends at the variant's KL to the last bit.
    means = map(statistics.fmean, zip(*figures, strict=True))
    return tuple(zip(steps, means, strict=True))


def _comparisons(
    study: Study,
    groups: dict[tuple[Any, ...], list[Cell]],
    variants: dict[tuple[Any, ...], Variant],
    records: Records,
) -> Iterable[Comparison]:
    by_method: dict[tuple[Any, ...], dict[float | None, tuple[Any, ...]]] = defaultdict(dict)
    for place in variants:
        by_method[place[:4]][place[4]] = place
    figures = {method: _by_rate(rates, groups, records) for method, rates in by_method.items()}
    best = {
        method: by_method[method][min(found, key=found.__getitem__)]
        for method, found in figures.items()
        if found
    }
    for method, place in best.items():
        other = best.get((*method[:3], study.baseline))
        rate = place[4]
        known = [r for r in by_method[method] if r is not None]
        by_rate = {r: kl for r, kl in figures[method].items() if r is not None}
        complete = len(by_rate) == len(known)
        target = None if other is None else variants[other].kl
        yield Comparison(
            best=variants[place],
            at_edge=len(known) > 1 and rate in (min(known), max(known)),
            change=_change(place, other, groups, records),
            steps_to_target=None if target is None else steps_to(variants[place].curve, target),
            area=area_over_rates(by_rate) if complete else None,
            off_by_three=worst_within(by_rate, rate) if complete and rate in by_rate else None,
        )


def _by_rate(
    rates: dict[float | None, tuple[Any, ...]],
    groups: dict[tuple[Any, ...], list[Cell]],
    records: Records,
) -> dict[float | None, float]:
    """Returns the mean KL at every rate where no run failed, over the seeds that all of them have.

    A rate with more seeds than another must not win or lose by them. Where no seed is common, each
    rate counts with its own.
    """
    found: dict[float | None, dict[int, float]] = {}
    for rate, place in rates.items():
        runs = {cell.seed: records[cell.key] for cell in groups[place]}
        if all(run.failed is None and run.points[-1].kl is not None for run in runs.values()):
            found[rate] = {seed: float(run.points[-1].kl or 0.0) for seed, run in runs.items()}
    shared = set.intersection(*map(set, found.values())) if found else set()
    return {
        rate: statistics.fmean(kl for seed, kl in by_seed.items() if not shared or seed in shared)
        for rate, by_seed in found.items()
    }


def _change(
    best: tuple[Any, ...],
    other: tuple[Any, ...] | None,
    groups: dict[tuple[Any, ...], list[Cell]],
    records: Records,
) -> Interval | None:
    if other is None or best == other:
        return None
    pairs: list[tuple[Any, Any]] = []
    theirs = {cell.seed: cell for cell in groups[other]}
    for cell in groups[best]:
        if cell.seed in theirs:
            own = records.divergences(cell.key)
            reference = records.divergences(theirs[cell.seed].key)
            if own is not None and reference is not None:
                pairs.append((own, reference))
    if not pairs:
        return None
    method, baseline = (np.stack([p[i] for p in pairs]).astype(np.float64) for i in (0, 1))
    return paired_bootstrap(method, baseline)
