"""The tables that commands print."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ._doctor import Finding
    from ._size import SizeReport
    from .bench import BenchResult, Speed
    from .study import BlockError, Summary
    from .train.evaluation import Evaluation
    from .train.run import RunResult

__all__ = [
    "bench_table",
    "blocks_table",
    "evaluation_table",
    "findings_table",
    "result_table",
    "size_table",
    "study_table",
]


def result_table(result: RunResult) -> Table:
    """Returns the table of a run: teacher and student, metric, bytes and ratio.

    Args:
        result: The figures.
    """
    ours, theirs = result.student, result.teacher
    table = Table(title=f"{result.task}, {result.eval_examples:,} evaluation examples")
    table.add_column("")
    table.add_column("teacher\nfloat32", justify="right")
    table.add_column(f"student\n{result.scheme}", justify="right")
    for name in sorted(ours.metrics, key=lambda name: name != result.metric):
        values = (_shown(name, figures.metrics[name]) for figures in (theirs, ours))
        table.add_row(name.replace("_", " "), *values)
    if result.agreement is not None and result.kl is not None:
        table.add_row("agreement", "", f"{100 * result.agreement:.2f} %")
        table.add_row("KL(teacher || student)", "", f"{result.kl:.4f}")
    for label, found in result.also.items():
        for name in sorted(found.student, key=lambda name: name != result.metric):
            values = (_shown(name, metrics[name]) for metrics in (found.teacher, found.student))
            table.add_row(f"{name.replace('_', ' ')} ({label})", *values)
        if found.agreement is not None:
            table.add_row(f"agreement ({label})", "", f"{100 * found.agreement:.2f} %")
    table.add_row("bytes on disk", f"{theirs.bytes:,}", f"{ours.bytes:,}")
    table.add_row("times smaller", "1.0", f"{result.ratio:.1f}")
    table.caption = (
        f"teacher: 4 bytes x {theirs.parameters:,} parameters; student: its weight files"
    )
    return table


def evaluation_table(found: Evaluation) -> Table:
    """Returns the table of an evaluation.

    Args:
        found: The metrics.
    """
    table = Table(title=f"{found.task}, {found.examples:,} examples")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name in sorted(found.metrics, key=lambda name: name != found.metric):
        table.add_row(name.replace("_", " "), _shown(name, found.metrics[name]))
    table.add_row("bytes on disk", f"{found.bytes:,}")
    table.caption = f"of {found.source}"
    return table


def findings_table(found: list[Finding]) -> Table:
    """Returns the table of what is active.

    Args:
        found: One finding a row.
    """
    table = Table(title="tutelage doctor")
    for name in ("", "found", "why"):
        table.add_column(name, overflow="fold")
    for finding in found:
        table.add_row(finding.subject, finding.state, finding.reason)
    return table


def size_table(report: SizeReport) -> Table:
    """Returns the table of a model's bytes by kind.

    Args:
        report: The figures.
    """
    title = report.model if report.stored else f"{report.model} under {report.scheme}"
    table = Table(title=title)
    table.add_column("kind")
    for name in ("tensors", "values", "bytes", "share"):
        table.add_column(name, justify="right")
    total = report.weight_bytes
    for part in report.parts:
        counts = (f"{n:,}" if n else "" for n in (part.tensors, part.values))
        table.add_row(part.kind, *counts, f"{part.bytes:,}", f"{100 * part.bytes / total:.1f} %")
    table.add_section()
    table.add_row("weight files", "", "", f"{total:,}", f"{total / 2**20:.2f} MiB")
    for name, size in report.files.items():
        table.add_row(name, "", "", f"{size:,}", "")
    table.caption = (
        f"{report.scheme}, codes as {report.encoding}, the rest in {report.rest}; float32 "
        f"{report.float_bytes / 2**20:.2f} MiB, {report.float_bytes / total:.1f} times as large"
    )
    return table


def _shown(name: str, value: float) -> str:
    from .train.metrics import METRICS

    fraction = name not in METRICS or METRICS[name].fraction
    return f"{100 * value:.2f} %" if fraction else f"{value:,.4g}"


def bench_table(found: BenchResult) -> Group:
    """Returns the table of a measurement, with reasons and versions below it.

    Args:
        found: The figures.
    """
    table = Table(
        title=f"{found.model}, {found.threads} thread{'s' if found.threads > 1 else ''}, "
        f"median of {found.rounds} rounds",
        box=SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("engine", no_wrap=True)
    for label in found.cases:
        table.add_column(f"{label}: ms, /s\nvs. best int8", justify="right", no_wrap=True)
    if found.new_tokens:
        table.add_column("tokens/s", justify="right")
    table.add_column("weights\nRSS, MiB", justify="right")
    table.add_column("disk MiB\nload s", justify="right")
    notes = []
    for row in found.engines:
        if row.reason is not None:
            notes.append(f"{row.name}: {row.reason}")
            table.add_row(row.name, "see below", style="dim")
            continue
        generated = "" if row.tokens_per_s is None else f"{row.tokens_per_s:,.1f}"
        table.add_row(
            row.name,
            *(_speed(row.speeds[label]) for label in found.cases),
            *([generated] if found.new_tokens else []),
            f"{_mebibytes(row.weight_bytes)}\n{_mebibytes(row.rss_bytes)}",
            f"{_mebibytes(row.disk_bytes)}\n{row.load_s:.2f}",
        )
        notes.append(f"{row.name}: {row.title}; {row.compression}")
    teacher = found.teacher or "a full-precision twin of the student (there is no teacher)"
    versions = ", ".join(f"{name} {number}" for name, number in found.versions.items())
    notes += [
        f"others run {teacher}",
        "vs. best int8: times faster than the fastest of torch-int8, onnx-int8 and openvino-int8 "
        "(quartiles over rounds)",
        versions,
        f"{found.machine['processor']}, {found.machine['cores']} cores",
    ]
    return Group(table, Text("\n".join(notes)))


def _speed(speed: Speed) -> str:
    line = f"{speed.ms:,.2f}  {speed.examples_per_s:,.0f}/s"
    if speed.ratio is None:
        return line
    return f"{line}\n{speed.ratio:.2f} ({speed.ratio_low:.2f}-{speed.ratio_high:.2f})"


def _mebibytes(number: int | None) -> str:
    return "" if number is None else f"{number / 2**20:,.1f}"


def blocks_table(found: list[BlockError]) -> Table:
    """Returns the table of an analysis: squared error relative to the teacher's squared norm.

    Args:
        found: The errors of every block.
    """
    from .study._analysis import COLUMNS, table

    made = Table(box=SIMPLE_HEAD, caption="squared error / squared norm of the teacher's signal")
    for name in COLUMNS:
        made.add_column(name)
    for row in table(found):
        made.add_row(*(Text(cell) for cell in row))
    return made


def study_table(found: Summary) -> Group:
    """Returns a table a task, scheme and budget: every method at its best learning rate.

    Args:
        found: The comparison.
    """
    from .study import COLUMNS, rows

    tables: dict[tuple[str, ...], Table] = {}
    for row in rows(found):
        place = row[:3]
        if place not in tables:
            tables[place] = Table(
                title=f"{place[0]}, {place[1]}, {place[2]} steps", box=SIMPLE_HEAD
            )
            for name in COLUMNS[3:]:
                tables[place].add_column(name)
        tables[place].add_row(*(Text(cell) for cell in row[3:]))
    return Group(*tables.values())
