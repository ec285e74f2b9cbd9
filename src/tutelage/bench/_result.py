"""The figures of a measurement."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._files import write_text

__all__ = ["BenchResult", "EngineFigures", "Speed"]

SCHEMA = 1


@dataclass(frozen=True)
class Speed:
    """Speed of an engine at one size of batch.

    Attributes:
        ms: Median over rounds, milliseconds a batch.
        examples_per_s: Examples a second.
        ratio: Times faster than the fastest int8 engine, median of the ratios of each round;
            ``None`` if no int8 engine was measured.
        ratio_low: Lower quartile.
        ratio_high: Upper quartile.
        rounds_ms: Every round.
    """

    ms: float
    examples_per_s: float
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None
    rounds_ms: list[float]


@dataclass(frozen=True)
class EngineFigures:
    """A row of the table.

    Attributes:
        name: Of the engine.
        title: What is run.
        source: ``"student"`` or ``"teacher"``.
        reason: Why there are no figures, ``None`` if there are.
        compression: How the Linear layers are computed, as checked.
        error: Relative error of the outputs against plain torch, on a sample of random inputs.
        agreement: Share of equal labels there.
        disk_bytes: Size of the files.
        weight_bytes: Weights kept in memory.
        rss_bytes: Growth of a fresh process by loading and running once.
        load_s: Seconds to load there.
        speeds: By size of batch.
        tokens_per_s: Of greedy generation at batch 1; ``None`` where it is not measured.
    """

    name: str
    title: str
    source: str
    reason: str | None = None
    compression: str | None = None
    error: float | None = None
    agreement: float | None = None
    disk_bytes: int | None = None
    weight_bytes: int | None = None
    rss_bytes: int | None = None
    load_s: float | None = None
    speeds: dict[str, Speed] = field(default_factory=dict)
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class BenchResult:
    """A measurement.

    Attributes:
        folder: The student's.
        model: Its class.
        teacher: Folder of the teacher, ``None`` if a full-precision twin of the student stood in.
        threads: Of every engine.
        rounds: Of the latency measurement.
        new_tokens: Tokens generated, ``None`` if the model is no decoder.
        cases: Sizes of batch.
        best_int8: The fastest int8 engine, by size of batch.
        engines: The rows.
        versions: Of the libraries.
        machine: Processor and cores.
    """

    folder: str
    model: str
    teacher: str | None
    threads: int
    rounds: int
    new_tokens: int | None
    cases: list[str]
    best_int8: dict[str, str]
    engines: list[EngineFigures]
    versions: dict[str, str]
    machine: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns what JSON holds."""
        return {"schema": SCHEMA, **asdict(self)}

    def write(self, path: Path) -> None:
        """Writes JSON, whole or not at all.

        Args:
            path: The file.

        Raises:
            ArtefactError: Writing failed.
        """
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")
