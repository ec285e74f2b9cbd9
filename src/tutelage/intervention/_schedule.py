"""Schedules: which stage is on at which step. Pure functions of the global step."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..errors import RecipeError
from ._stages import NO_INTERVENTION, intervention

__all__ = ["Schedule"]

_ORDER = ("attention_output", "context", "attention_map")


@dataclass(frozen=True)
class Schedule:
    """Says which stage is on at a global step; ``"none"`` from ``steps`` on.

    Make one with ``gradual``, ``inverted``, ``stochastic``, ``constant`` or ``none``.

    Attributes:
        kind: Name of the rule.
        steps: Length of the intervention in optimizer steps.
        parts: (stage, end) pairs; a stage is on for steps below its end.
        seed: Seed of the stochastic rule.
    """

    kind: str
    steps: int
    parts: tuple[tuple[str, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the length and the stages."""
        if self.steps < 0:
            raise RecipeError(f"a schedule of {self.steps} steps; use 0 or more.")
        for stage, _ in self.parts:
            intervention(stage)

    def __call__(self, global_step: int) -> str:
        """Returns the stage of a step.

        Args:
            global_step: Optimizer steps done before, from 0.
        """
        if not 0 <= global_step < self.steps:
            return NO_INTERVENTION
        if self.kind == "stochastic":
            return random.Random(f"{self.seed}/{global_step}").choice(_ORDER)
        return next((stage for stage, end in self.parts if global_step < end), NO_INTERVENTION)

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that may come, ``"none"`` left out."""
        if not self.steps:
            return ()
        return _ORDER if self.kind == "stochastic" else tuple(stage for stage, _ in self.parts)

    @classmethod
    def gradual(cls, steps: int) -> Schedule:
        """TI-G: attention output for a sixth, context for a sixth, attention map for the rest.

        Args:
            steps: Length s; the boundaries are the real numbers s / 6 and s / 3.

        Examples:
            >>> schedule = Schedule.gradual(60)
            >>> schedule(0), schedule(10), schedule(20), schedule(60)
            ('attention_output', 'context', 'attention_map', 'none')
        """
        return cls("gradual", steps, tuple(zip(_ORDER, (steps / 6, steps / 3, steps), strict=True)))

    @classmethod
    def inverted(cls, steps: int) -> Schedule:
        """The reverse order in thirds: attention map, context, attention output.

        Args:
            steps: Length s; the boundaries are s / 3 and 2 s / 3.
        """
        ends = (steps / 3, 2 * steps / 3, steps)
        return cls("inverted", steps, tuple(zip(reversed(_ORDER), ends, strict=True)))

    @classmethod
    def stochastic(cls, steps: int, seed: int = 0) -> Schedule:
        """One of the three stages at random at each step, drawn from (seed, step).

        Args:
            steps: Length of the intervention.
            seed: Seed of the draws.
        """
        return cls("stochastic", steps, seed=seed)

    @classmethod
    def constant(cls, stage: str, steps: int) -> Schedule:
        """One stage throughout: TI-O, TI-C or TI-M.

        Args:
            stage: Name of the stage.
            steps: Length of the intervention.
        """
        return cls("constant", steps, ((stage, steps),))

    @classmethod
    def none(cls) -> Schedule:
        """No intervention: plain quantization-aware distillation."""
        return cls("none", 0)
