"""Stages of Teacher Intervention: which signal of the teacher replaces the student's.

Kim et al., "Teacher Intervention: Improving Convergence of Quantization Aware Training for
Ultra-Low Precision Transformers", EACL 2023 (arXiv 2302.11812).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..errors import RecipeError, nearest
from ..sites import Projection, Site

__all__ = ["NO_INTERVENTION", "Intervention", "Replace", "intervention", "register", "stages"]

NO_INTERVENTION = "none"


@runtime_checkable
class Intervention(Protocol):
    """Replaces one signal of every block during a step.

    Attributes:
        site: The signal that is replaced.
        detach: Projections that receive a detached input, because the replaced signal cuts their
            way to the loss and only local terms may train them.
        local: The loss term that compares the student's own signal with the teacher's.
    """

    @property
    def site(self) -> Site:
        """The signal that is replaced."""
        ...

    @property
    def detach(self) -> tuple[Projection, ...]:
        """Projections that receive a detached input."""
        ...

    @property
    def local(self) -> str:
        """Name of the local loss term."""
        ...

    def __call__(self, own: Tensor, teacher: Tensor, progress: Tensor | None) -> Tensor:
        """Returns what is used in place of ``own``.

        Args:
            own: The student's signal.
            teacher: The teacher's, of the same shape.
            progress: Part of training that is over, 0 to 1, a 0-dim tensor, or ``None``.
        """
        ...


@dataclass(frozen=True)
class Replace:
    """Puts the teacher's signal in place of the student's, whole.

    Attributes:
        site: The signal that is replaced.
        detach: Projections that receive a detached input.
        local: The loss term that compares the student's own signal with the teacher's.
    """

    site: Site
    detach: tuple[Projection, ...]
    local: str

    def __call__(self, own: Tensor, teacher: Tensor, progress: Tensor | None) -> Tensor:
        """Returns the teacher's signal in the student's dtype."""
        return teacher.to(own.dtype)


_STAGES: dict[str, Intervention] = {
    "attention_output": Replace(
        "attention_output", ("query", "key", "value"), "attention_output_local"
    ),
    "context": Replace("context", ("query", "key", "value"), "context_local"),
    "attention_map": Replace("attention_map", ("query", "key"), "attention_scores"),
}


def stages() -> tuple[str, ...]:
    """Returns the names of all stages, ``"none"`` first."""
    return (NO_INTERVENTION, *_STAGES)


def register(name: str, stage: Intervention) -> None:
    """Adds a stage.

    Args:
        name: Its name in ``Distiller.step`` and in schedules.
        stage: What it does.

    Raises:
        ValueError: The name is taken.
    """
    if name in stages():
        raise ValueError(f"the stage {name!r} exists already; choose another name.")
    _STAGES[name] = stage


def intervention(stage: str) -> Intervention | None:
    """Returns what a stage does, ``None`` for ``"none"``.

    Args:
        stage: Name of a stage.

    Raises:
        RecipeError: There is no such stage.
    """
    if stage == NO_INTERVENTION:
        return None
    if stage not in _STAGES:
        known = ", ".join(repr(name) for name in stages())
        raise RecipeError(
            f"there is no stage {stage!r}; use one of {known}.{nearest(stage, stages())}"
        )
    return _STAGES[stage]
