"""What a study says."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from ..errors import nearest
from ..train._fields import Natural, Positive, Rate, Section
from ._methods import METHODS

__all__ = ["Study"]

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9 ._+-]*$")]


class Study(Section):
    """A grid of runs: tasks x schemes x methods x budgets x learning rates x seeds.

    Attributes:
        tasks: Sections ``model``, ``data`` and ``teacher`` of a recipe by the task's name; a
            section ``student`` there holds for all methods.
        schemes: Names of quantization schemes.
        methods: Sections of a recipe that a method sets, by name; ``base`` names a method to start
            from, ``train: false`` only quantizes.
        budgets: Training steps.
        learning_rates: Peak learning rates; ``None`` is the library's default.
        seeds: Seeds of the order of the data; the teacher is the same for all.
        baseline: The method that others are compared with.
        points: Evaluations in a run, evenly spaced; the last one after the last step.
        threads: CPU threads of a run.
        output: Folder of the results.
    """

    tasks: dict[_Name, dict[str, Any]] = Field(min_length=1)
    schemes: list[str] = Field(default=["ternary-a8"], min_length=1)
    methods: dict[_Name, dict[str, Any]] = Field(min_length=1)
    budgets: list[Positive] = Field(default=[100, 400], min_length=1)
    learning_rates: list[Rate | None] = Field(default=[None], min_length=1)
    seeds: list[Natural] = Field(default=[0, 1, 2], min_length=1)
    baseline: str
    points: Positive = 8
    threads: Positive = 1
    output: str

    @field_validator("methods", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, list):
            return {name: {"base": name} for name in value}
        if isinstance(value, dict):
            return {
                name: {"base": name} if found is None and name in METHODS else found or {}
                for name, found in value.items()
            }
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        for name, task in self.tasks.items():
            other = sorted(set(task) - {"model", "data", "teacher", "student"})
            if other:
                raise ValueError(
                    f"the task {name!r} has {other[0]!r}; it takes model, data, teacher, student"
                )
        for name, method in self.methods.items():
            allowed = {"base", "train", "schedule", "student"}
            other = sorted(set(method) - allowed)
            if other:
                raise ValueError(
                    f"the method {name!r} has {other[0]!r}; it takes {', '.join(sorted(allowed))}"
                )
            base = method.get("base", "default")
            if base not in METHODS:
                hint = nearest(str(base), METHODS)
                raise ValueError(f"there is no method {base!r}; use {', '.join(METHODS)}.{hint}")
        if self.baseline not in self.methods:
            known = ", ".join(self.methods)
            raise ValueError(f"'baseline' is {self.baseline!r}; name one of the methods: {known}")
        for key in ("schemes", "budgets", "learning_rates", "seeds"):
            values = getattr(self, key)
            if len(set(values)) < len(values):
                raise ValueError(f"{key!r} lists a value twice")
        return self

    def method(self, name: str) -> dict[str, Any]:
        """Returns what a method sets, its base included.

        Args:
            name: Name of the method.
        """
        own = dict(self.methods[name])
        return merged(METHODS[own.pop("base", "default")], own)


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Returns nested dictionaries with those of ``above`` laid over those of ``below``.

    Args:
        below: What holds where ``above`` says nothing.
        above: What wins. A set of losses replaces the other whole.
    """
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict) and key != "losses"
        out[key] = merged(out[key], value) if both else value
    return out
