"""Warnings about the size and the speed of a student."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from ._facts import Facts
from ._format import mib, percent
from ._page import Finding

__all__ = ["COST_RULES"]


def heavy_rest(facts: Facts) -> Iterator[Finding]:
    """More than half of the bytes are not quantized."""
    quantized = ("Linear codes", "embedding codes", "scales")
    rest = [part for part in facts.size.parts if part.kind not in quantized]
    total = sum(part.bytes for part in rest)
    if total > 0.5 * facts.size.weight_bytes:
        top = max(rest, key=lambda part: part.bytes)
        yield Finding(
            "heavy_rest",
            f"{percent(total / facts.size.weight_bytes, 0)} of the weight file is not quantized, "
            f"most of it {top.kind} ({mib(top.bytes)}).",
            "Store the rest in bfloat16 (tutelage export --format packed --option rest=bfloat16), "
            "or quantize more with a Rule."
            if facts.size.rest == "float32"
            else "Quantize more with a Rule.",
        )


def no_bench(facts: Facts) -> Iterator[Finding]:
    """Speed was not measured beside int8 engines, or for other files."""
    if facts.bench is None:
        yield Finding(
            "no_bench",
            "The student was not timed beside int8 engines, only beside its teacher in torch."
            if facts.quick is not None
            else "The student's speed was not measured.",
            "Run tutelage bench DIR on the machine that is to run it.",
        )
        return
    row = next((e for e in facts.bench.engines if e.name == "student"), None)
    if row is not None and row.disk_bytes not in (None, facts.size.weight_bytes):
        yield Finding(
            "old_bench",
            f"bench.json is of a student of {row.disk_bytes:,} bytes, and this one has "
            f"{facts.size.weight_bytes:,}.",
            "Run tutelage bench DIR again.",
            serious=True,
        )


def slow(facts: Facts) -> Iterator[Finding]:
    """The student is slower than its teacher in every form."""
    if facts.quick is None:
        return
    for case in facts.quick.cases:
        best = max(r.median for name, r in case.ratios.items() if name != "teacher")
        if best < 1:
            yield Finding(
                "slow",
                f"At {case.label} the student takes {1 / best:.1f} times as long as its teacher.",
                "tutelage doctor says which kernels are active here; try tutelage export.",
            )


COST_RULES: tuple[Callable[[Facts], Iterable[Finding]], ...] = (heavy_rest, no_bench, slow)
