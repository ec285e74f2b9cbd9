"""The temporary folder that the processes of a measurement share."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ._cases import Case, Inputs

__all__ = ["Plan", "Workspace"]


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        student: Folder of the packed model.
        teacher: Folder of the full-precision model, ``None`` if a twin is to be made.
        engines: Names.
        threads: Threads of every engine.
        rounds: Rounds of the latency measurement.
        cases: Sizes as in ``--cases``, ``None`` for the default ones.
        new_tokens: Tokens that decoders generate.
        pause: Seconds of silence before an engine's turn.
    """

    student: str
    teacher: str | None
    engines: tuple[str, ...]
    threads: int
    rounds: int
    cases: str | None = None
    new_tokens: int = 32
    pause: float = 0.02


class Workspace:
    """Names of files.

    Args:
        root: The temporary folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def start(cls, root: Path, plan: Plan) -> Workspace:
        """Stores what is measured.

        Args:
            root: An empty folder.
            plan: What is measured.
        """
        (root / "plan.json").write_text(json.dumps(asdict(plan)), encoding="utf-8")
        return cls(root)

    @property
    def plan(self) -> Plan:
        """What is measured."""
        read = json.loads((self.root / "plan.json").read_text(encoding="utf-8"))
        return Plan(**{**read, "engines": tuple(read["engines"])})

    @property
    def student(self) -> Path:
        """Folder of the student."""
        return Path(self.plan.student)

    @property
    def teacher(self) -> Path:
        """Folder of the full-precision model."""
        given = self.plan.teacher
        return self.root / "twin" if given is None else Path(given)

    def folder(self, engine: str) -> Path:
        """Returns the folder of an engine's files, made if need be.

        Args:
            engine: Its name.
        """
        made = self.root / "engines" / engine
        made.mkdir(parents=True, exist_ok=True)
        return made

    def note(self, engine: str, **values: Any) -> None:
        """Stores small facts for ``noted``.

        Args:
            engine: Its name.
            **values: What JSON can hold.
        """
        (self.folder(engine) / "note.json").write_text(json.dumps(values), encoding="utf-8")

    def noted(self, engine: str) -> dict[str, Any]:
        """Returns what ``note`` stored.

        Args:
            engine: Its name.
        """
        found = json.loads((self.folder(engine) / "note.json").read_text(encoding="utf-8"))
        return dict(found)

    def store_inputs(self, name: str, inputs: Inputs) -> None:
        """Stores arrays.

        Args:
            name: Of a case, or ``"sample"``.
            inputs: Arrays by name.
        """
        np.savez(self.root / f"inputs-{name}.npz", **inputs)  # type: ignore[arg-type]

    def inputs(self, name: str) -> Inputs:
        """Returns arrays.

        Args:
            name: As stored.
        """
        with np.load(self.root / f"inputs-{name}.npz") as found:
            return {key: found[key] for key in found.files}

    def put(self, name: str, value: Any) -> None:
        """Stores a result of a process.

        Args:
            name: Of the result.
            value: What JSON can hold.
        """
        (self.root / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")

    def get(self, name: str) -> Any:
        """Returns a result, ``None`` if the process left none.

        Args:
            name: Of the result.
        """
        file = self.root / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None

    @property
    def cases(self) -> tuple[Case, ...]:
        """The sizes, once the first process has prepared them."""
        return tuple(Case(**case) for case in self.get("model")["cases"])
