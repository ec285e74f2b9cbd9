"""What the runs of a study left: one JSON line each, and the divergence of every example."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import StudyError

__all__ = ["Point", "Record", "Records"]

_RUNS, _EXAMPLES = "runs.jsonl", "examples"


@dataclass(frozen=True)
class Point:
    """An evaluation, with no intervention.

    Attributes:
        step: Optimizer steps done.
        metric: The task's headline metric.
        kl: Mean KL(teacher || student) over the evaluation examples, temperature 1, in nats.
        agreement: Share of examples with the same likeliest class.
    """

    step: int
    metric: float | None
    kl: float | None
    agreement: float | None


@dataclass(frozen=True)
class Record:
    """A run that is over.

    Attributes:
        key: See ``Cell``.
        task: Name of the task.
        scheme: Name of the scheme.
        method: Name of the method.
        steps: Training steps.
        learning_rate: Peak learning rate, ``None`` for the default.
        seed: Seed.
        metric: Name of the headline metric.
        teacher: The teacher's headline metric.
        points: Evaluations in order of their steps; empty for a run that failed.
        seconds: Wall time of the run.
        failed: Why it has no figures: its loss or its outputs were not finite.
        machine: Processor, threads and versions.
    """

    key: str
    task: str
    scheme: str
    method: str
    steps: int
    learning_rate: float | None
    seed: int
    metric: str
    teacher: float | None
    points: tuple[Point, ...]
    seconds: float
    failed: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Record:
        """Reads what ``to_dict`` returned."""
        return cls(**{**values, "points": tuple(Point(**point) for point in values["points"])})

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


class Records:
    """The runs of a study in its folder; a run is added whole or not at all."""

    def __init__(self, folder: Path) -> None:
        """Reads what is there; half a line, as a kill leaves it, is cut off.

        Args:
            folder: The study's folder.

        Raises:
            StudyError: A line is damaged.
        """
        self._folder = folder
        self._file = folder / _RUNS
        self._found: dict[str, Record] = {}
        if not self._file.is_file():
            return
        content = self._file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self._file, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = Record.from_dict(json.loads(line))
            except (ValueError, TypeError, KeyError):
                raise StudyError(
                    f"line {number} of {self._file} is damaged; remove that line, and its run is "
                    "repeated."
                ) from None
            self._found[record.key] = record

    def __contains__(self, key: object) -> bool:
        """Whether a run is over."""
        return key in self._found

    def __getitem__(self, key: str) -> Record:
        """Returns a run."""
        return self._found[key]

    def add(self, record: Record, divergences: npt.NDArray[np.float32] | None) -> None:
        """Keeps a run.

        Args:
            record: The run.
            divergences: KL(teacher || student) of every evaluation example after the last step.
        """
        if divergences is not None:
            target = self._examples(record.key)
            target.parent.mkdir(parents=True, exist_ok=True)
            stage = target.with_suffix(".partial")
            with stage.open("wb") as file:
                np.save(file, divergences.astype(np.float32), allow_pickle=False)
            os.replace(stage, target)
        line = json.dumps(record.to_dict(), allow_nan=False) + "\n"
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._found[record.key] = record

    def divergences(self, key: str) -> npt.NDArray[np.float32] | None:
        """Returns the divergence of every evaluation example of a run, where it has them.

        Args:
            key: The run.

        Raises:
            StudyError: The file is missing or damaged.
        """
        if not self._found[key].points or self._found[key].points[-1].kl is None:
            return None
        file = self._examples(key)
        try:
            found: npt.NDArray[np.float32] = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            raise StudyError(
                f"{file} is missing or damaged; remove the line of {_RUNS} that has its name, and "
                "the run is repeated."
            ) from None
        kl = self._found[key].points[-1].kl
        if kl is None or not math.isclose(float(found.mean()), kl, rel_tol=1e-3, abs_tol=1e-6):
            raise StudyError(f"{file} is of another run; remove it and its line in {_RUNS}.")
        return found

    def _examples(self, key: str) -> Path:
        return self._folder / _EXAMPLES / f"{key}.npy"
