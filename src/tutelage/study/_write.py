"""Tables and files of a study."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..artefacts import write_text
from ._plots import plots_missing, write_plots
from ._statistics import Interval
from ._summary import Comparison, Summary, Variant

__all__ = ["COLUMNS", "rows", "write_summary"]

COLUMNS = (
    "task",
    "scheme",
    "steps",
    "method",
    "lr",
    "metric",
    "KL",
    "agreement",
    "KL against baseline",
    "steps to target",
    "KL over lr",
    "lr 3x off",
)


def rows(summary: Summary) -> list[tuple[str, ...]]:
    """Returns the cells of the table: every method at its best learning rate.

    Args:
        summary: The comparison.
    """
    return [_row(found, summary) for found in summary.comparisons]


def _row(found: Comparison, summary: Summary) -> tuple[str, ...]:
    best = found.best
    rate = "default" if best.learning_rate is None else f"{best.learning_rate:g}"
    target = "-" if best.steps == 0 else "not reached"
    if found.steps_to_target is not None and best.steps:
        target = f"{found.steps_to_target:.0f}"
    return (
        best.task,
        best.scheme,
        str(best.steps),
        best.method,
        "-" if best.steps == 0 else rate + (" (edge)" if found.at_edge else ""),
        _pair(best.metric, best.metric_spread, best),
        _pair(best.kl, best.kl_spread, best),
        "-" if best.agreement is None else f"{100 * best.agreement:.1f} %",
        "baseline" if best.method == summary.baseline else _change(found.change),
        target,
        "-" if found.area is None else f"{found.area:.4f}",
        "-" if found.off_by_three is None else f"{100 * found.off_by_three:+.0f} %",
    )


def _pair(value: float | None, spread: float, variant: Variant) -> str:
    if value is None:
        return "-"
    return f"{value:.4f} +- {spread:.4f}" if len(variant.seeds) > 1 else f"{value:.4f}"


def _change(change: Interval | None) -> str:
    if change is None:
        return "-"
    value, low, high = (f"{100 * v:+.1f}" for v in (change.value, change.low, change.high))
    return f"{value} % [{low}, {high}]"


def _markdown(columns: tuple[str, ...], found: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(row) + " |" for row in found]
    return "\n".join(lines)


def _variant_row(found: Variant) -> tuple[str, ...]:
    return (
        found.task,
        found.scheme,
        str(found.steps),
        found.method,
        "default" if found.learning_rate is None else f"{found.learning_rate:g}",
        str(len(found.seeds)) + (f" ({found.failed} failed)" if found.failed else ""),
        _pair(found.metric, found.metric_spread, found),
        _pair(found.kl, found.kl_spread, found),
        "-" if found.agreement is None else f"{100 * found.agreement:.1f} %",
    )


def write_summary(summary: Summary, folder: Path, report: Callable[[str], None]) -> None:
    """Writes ``table.md``, ``summary.json`` and, where matplotlib is there, ``plots/``.

    Args:
        summary: The comparison.
        folder: The study's folder.
        report: Told where plots could not be drawn.
    """
    teachers = ", ".join(
        f"{task} {name}"
        + (f" {value:.4f}" if (value := summary.teachers[task]) is not None else "")
        for task, name in summary.metrics.items()
    )
    machines = "; ".join(", ".join(f"{k} {v}" for k, v in m.items()) for m in summary.machines)
    columns = ("task", "scheme", "steps", "method", "lr", "seeds", "metric", "KL", "agreement")
    text = f"""# Comparison

Teachers: {teachers}. KL is KL(teacher || student) at temperature 1 on the evaluation data, in nats,
with no intervention; +- is the standard deviation over seeds. Every method is shown at the learning
rate where its KL is lowest ("edge": the best may lie beyond the grid). "KL against baseline" is
the relative change against `{summary.baseline}` at its own best rate, with a paired 95 % bootstrap
interval over seeds and examples; "steps to target" the steps until the KL is that of the baseline
at its end; "KL over lr" the mean KL over the logarithm of the rate; "lr 3x off" the rise of the KL
where the rate is up to three times off.

{_markdown(COLUMNS, rows(summary))}

## All rates

{_markdown(columns, [_variant_row(found) for found in summary.variants])}

Machines: {machines}.
"""
    write_text(folder / "table.md", text)
    plain: dict[str, Any] = summary.to_dict()
    write_text(folder / "summary.json", json.dumps(plain, indent=1, allow_nan=False) + "\n")
    if missing := plots_missing():
        report(missing)
    else:
        write_plots(summary, folder / "plots")
