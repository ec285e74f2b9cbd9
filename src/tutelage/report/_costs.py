"""Size and speed of a student beside its teacher."""

from __future__ import annotations

from collections.abc import Iterator

from ..bench import BenchResult, EngineFigures
from ..bench._timing import ratio
from ._facts import Facts
from ._format import count, mib, percent, significant
from ._page import Bar, Block, Cell, Part, Table, Text
from ._speed import QuickSpeed

__all__ = ["SPEED_NAMES", "size_blocks", "speed_blocks", "speed_headline"]

SPEED_NAMES = {
    "teacher": "the teacher, torch float32",
    "student": "the student, tutelage.load",
    "student-fused": "the student, tutelage.fuse",
}


def size_blocks(facts: Facts) -> Iterator[Block]:
    """Yields the bytes of the student by part.

    Args:
        facts: The run.
    """
    size, teacher = facts.size, facts.result.teacher.bytes
    widest = max(teacher, size.weight_bytes)
    parts = sorted(size.parts, key=lambda part: -part.bytes)
    yield Bar(
        "teacher", (Part("float32", teacher / widest, 6),), f"{mib(teacher)}, 4 bytes a parameter"
    )
    yield Bar(
        "student",
        tuple(Part(part.kind, part.bytes / widest, i) for i, part in enumerate(parts)),
        f"{mib(size.weight_bytes)}, {teacher / size.weight_bytes:.1f} times smaller",
    )
    yield Bar(
        "student, 1:1",
        tuple(Part(part.kind, part.bytes / size.weight_bytes, i) for i, part in enumerate(parts)),
        "its parts as in the table",
    )
    rows: list[tuple[str | Cell, ...]] = [
        (
            Cell(part.kind, swatch=index),
            f"{part.tensors:,}" if part.tensors else "",
            f"{part.values:,}" if part.values else "",
            f"{part.bytes:,}",
            percent(part.bytes / size.weight_bytes),
        )
        for index, part in enumerate(parts)
    ]
    rows.append((Cell("weight files", strong=True), "", "", f"{size.weight_bytes:,}", "100.0 %"))
    yield Table(
        f"Weights of the student by part: {size.scheme}, codes as {size.encoding}, the rest in "
        f"{size.rest}",
        ("part", "tensors", "numbers", "bytes", "share"),
        tuple(rows),
    )
    others = {n: b for n, b in size.files.items() if n not in ("report.html", "bench.json")}
    if others:
        yield Table(
            "Other files of the folder",
            ("file", "bytes"),
            tuple((name, f"{found:,}") for name, found in others.items()),
            closed=True,
        )


def speed_headline(facts: Facts) -> tuple[str, str] | None:
    """Returns the speed of the student in a figure, and what it is compared with.

    Args:
        facts: The run.

    Returns:
        For instance ``("2.1x", "the fastest int8 engine, ...")``; ``None`` where it is not known.
    """
    if facts.bench is not None:
        return _of_bench(facts.bench)
    if facts.quick is None:
        return None
    case = facts.quick.cases[-1]
    best = max(r.median for name, r in case.ratios.items() if name != "teacher")
    return f"{best:.2f}x", f"the teacher in torch float32, {case.label}, one thread"


def _of_bench(bench: BenchResult) -> tuple[str, str] | None:
    label = bench.cases[-1]
    ours = [e for e in bench.engines if e.source == "student" and label in e.speeds]
    rated = [(r, e) for e in ours if (r := e.speeds[label].ratio) is not None]
    if not rated:
        return None
    best, engine = max(rated, key=lambda found: found[0])
    many = count(bench.threads, "thread")
    return f"{best:.2f}x", f"the fastest int8 engine, {label}, {many} ({engine.title})"


def speed_blocks(facts: Facts) -> Iterator[Block]:
    """Yields what is known of the student's speed.

    Args:
        facts: The run.
    """
    if facts.bench is not None:
        yield from _bench(facts.bench)
    elif facts.quick is not None:
        yield from _quick(facts.quick)
    else:
        yield Text(facts.missing["speed"], missing=True)


def _quick(quick: QuickSpeed) -> Iterator[Block]:
    yield Text(
        f"A quick look, on {quick.machine}: both models in torch on "
        f"{count(quick.threads, 'thread')}, in {quick.rounds} rounds in which each has its turn, "
        "batch x tokens as named, without padding. It says nothing of other engines; for that, run "
        "tutelage bench."
    )
    names = list(quick.cases[0].milliseconds)
    rows = []
    for name in names:
        cells: list[str | Cell] = [SPEED_NAMES[name]]
        for case in quick.cases:
            found = case.ratios[name]
            cells.append(f"{significant(case.milliseconds[name])} ms")
            cells.append(
                "1"
                if name == "teacher"
                else f"{found.median:.2f} ({found.low:.2f}-{found.high:.2f})"
            )
        rows.append(tuple(cells))
    columns = ["model"]
    for case in quick.cases:
        columns += [f"{case.label}, median", "times faster (quartiles)"]
    yield Table("Time of a batch", tuple(columns), tuple(rows))


def _bench(bench: BenchResult) -> Iterator[Block]:
    where = ", ".join(f"{key} {value}" for key, value in bench.machine.items())
    teacher = "a full-precision twin of the student" if bench.teacher is None else "the teacher"
    yield Text(
        f"Measured by tutelage bench: {count(bench.threads, 'thread')}, "
        f"{count(bench.rounds, 'round')} in which every engine has its turn; {where}. Engines of "
        f"the full-precision model run {teacher}. Ratios are to the fastest int8 engine of the "
        "same round, with quartiles."
    )
    rows = [_engine(engine, bench) for engine in bench.engines if engine.reason is None]
    columns = ["engine"]
    for label in bench.cases:
        columns += [f"{label}, median", "times the best int8", "times the teacher"]
    columns += ["weights in memory", "process memory"]
    if bench.new_tokens is not None:
        columns.append("tokens/s")
    yield Table("Speed and memory side by side", tuple(columns), tuple(rows))
    lost = tuple((e.title, e.reason) for e in bench.engines if e.reason is not None)
    if lost:
        yield Table("Engines without figures, and why", ("engine", "reason"), lost, left=(1,))


def _engine(engine: EngineFigures, bench: BenchResult) -> tuple[str | Cell, ...]:
    plain = next((e for e in bench.engines if e.name == "fp32" and e.reason is None), None)
    cells: list[str | Cell] = [Cell(engine.title, strong=engine.source == "student")]
    for label in bench.cases:
        found = engine.speeds[label]
        cells.append(f"{significant(found.ms)} ms")
        if found.ratio is None or found.ratio_low is None or found.ratio_high is None:
            cells.append("-")
        elif bench.best_int8.get(label) == engine.name:
            cells.append("1, the fastest")
        else:
            cells.append(f"{found.ratio:.2f} ({found.ratio_low:.2f}-{found.ratio_high:.2f})")
        if plain is None:
            cells.append("-")
        else:
            faster = ratio(plain.speeds[label].rounds_ms, found.rounds_ms)
            cells.append(f"{faster.median:.2f}")
    cells.append("-" if engine.weight_bytes is None else mib(engine.weight_bytes))
    cells.append("-" if engine.rss_bytes is None else mib(engine.rss_bytes))
    if bench.new_tokens is not None:
        cells.append("-" if engine.tokens_per_s is None else significant(engine.tokens_per_s))
    return tuple(cells)
