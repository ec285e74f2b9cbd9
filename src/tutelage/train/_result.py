"""What a run gives: figures of teacher and student, stored as ``result.json``."""

from __future__ import annotations

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, computed_field

from ..artefacts import write_text
from ..errors import ArtefactError

__all__ = [
    "RESULT_FILE",
    "Figures",
    "FurtherFigures",
    "RunResult",
    "read_result",
    "versions",
    "write_result",
]

RESULT_FILE = "result.json"
"""Written last: a folder that holds it holds a finished run."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Figures(_Record):
    """Figures of one model.

    Attributes:
        metrics: Every metric that fits the task, by name, as fractions; perplexity and loss as
            they are. Empty for data without labels.
        bytes: Size of the weights; of a teacher 4 bytes times its parameters, of a student the
            size of its files.
        parameters: Number of parameters.
    """

    metrics: dict[str, float]
    bytes: int
    parameters: int


class FurtherFigures(_Record):
    """Figures of a run over further evaluation data, ``data.eval_also``.

    Attributes:
        examples: Number of examples, counted as ``RunResult.eval_examples`` is.
        teacher: Metrics of the teacher, by name; empty for data without labels.
        student: Metrics of the student.
        agreement: As in ``RunResult``.
        kl: As in ``RunResult``.
    """

    examples: int
    teacher: dict[str, float]
    student: dict[str, float]
    agreement: float | None
    kl: float | None


class RunResult(_Record):
    """The result of a run.

    Attributes:
        folder: Where the student is.
        task: Kind of the task.
        metric: Name of the headline metric; ``"agreement"`` for data without labels.
        scheme: Name of the student's scheme.
        train_examples: Number of the student's training examples, augmented ones included;
            windows of contexts, or blocks of text, are counted singly.
        eval_examples: Number of evaluation examples, likewise.
        teacher: Figures of the teacher in float32.
        student: Figures of the student as it was loaded from its files.
        teacher_fine_tuned: Whether the run fine-tuned the teacher.
        agreement: Share of the compared predictions (of examples, or of the tokens in them) with
            the same class; ``None`` for a regression.
        kl: Mean KL(teacher || student) over them in nats; ``None`` for a regression.
        also: Figures over further evaluation data, by the name that the recipe gives them.
        seconds: Seconds of every phase in the process that finished the run.
        seed: Seed of the run.
        threads: CPU threads of torch.
        versions: Versions of Python and of the libraries that decide figures.
        machine: Processor, cores, GPU; empty in results of earlier versions.
    """

    folder: str
    task: str
    metric: str
    scheme: str
    train_examples: int
    eval_examples: int
    teacher: Figures
    student: Figures
    teacher_fine_tuned: bool
    agreement: float | None
    kl: float | None
    also: dict[str, FurtherFigures] = {}
    seconds: dict[str, float]
    seed: int
    threads: int
    versions: dict[str, str]
    machine: dict[str, Any] = {}

    @computed_field  # type: ignore[prop-decorator]
    @property
    def ratio(self) -> float:
        """How many times smaller the student's weights are."""
        return self.teacher.bytes / self.student.bytes


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that decide figures."""
    from .. import __version__

    found = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return {"python": platform.python_version(), "tutelage": __version__, **found}


def write_result(result: RunResult, folder: Path) -> None:
    """Writes ``result.json`` whole or not at all.

    Args:
        result: The result.
        folder: Where to.

    Raises:
        ArtefactError: Writing failed.
    """
    write_text(folder / RESULT_FILE, result.model_dump_json(indent=2) + "\n")


def read_result(folder: Path) -> RunResult | None:
    """Reads the result of a finished run.

    Args:
        folder: The folder of the run.

    Returns:
        The result, its folder set to where it was found; ``None`` if the run did not finish.

    Raises:
        ArtefactError: The file is damaged.
    """
    file = folder / RESULT_FILE
    if not file.is_file():
        return None
    try:
        result = RunResult.model_validate_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        raise ArtefactError(
            f"{file} is damaged ({str(error).splitlines()[0]}); remove it and train with --resume."
        ) from None
    return result.model_copy(update={"folder": str(folder)})
