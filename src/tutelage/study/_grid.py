"""The runs of a study, each with a recipe and a key that says what it is."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..scheme import Scheme
from ..train._plan import make_scheme
from ..train.recipe import Recipe, recipe_from_dict
from ._sections import Study, merged

__all__ = ["Cell", "cells", "evaluation_steps"]


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        task: Name of the task.
        scheme: Name of the scheme.
        method: Name of the method.
        steps: Training steps, 0 where the student is quantized only.
        learning_rate: Peak learning rate; ``None`` for the library's default.
        seed: Seed of the run.
        recipe: All that decides it.
        points: Number of evaluations.
        key: Fingerprint of recipe, data and evaluation; equal runs have equal keys.
    """

    task: str
    scheme: str
    method: str
    steps: int
    learning_rate: float | None
    seed: int
    recipe: Recipe
    points: int
    key: str


def evaluation_steps(steps: int, points: int) -> tuple[int, ...]:
    """Returns after how many steps a run is evaluated: evenly spaced, the last step included.

    Args:
        steps: Length of the run.
        points: Number of evaluations.
    """
    return tuple(sorted({max(1, round(steps * i / points)) for i in range(1, points + 1)}))


def cells(study: Study) -> list[Cell]:
    """Returns the runs of a study, those of a task together.

    Args:
        study: The study.

    Raises:
        RecipeError: A method or a task is no valid part of a recipe.
        SchemeError: A scheme does not exist.
    """
    prints: dict[str, str] = {}
    found: dict[tuple[Any, ...], Cell] = {}
    for scheme in study.schemes:
        Scheme.preset(scheme)
    for cell in _product(study, prints):
        place = (cell.task, cell.scheme, cell.method, cell.steps, cell.learning_rate, cell.seed)
        found.setdefault(place, cell)
    return list(found.values())


def _product(study: Study, prints: dict[str, str]) -> Iterator[Cell]:
    grid = (study.tasks, study.schemes, study.budgets, study.methods)
    rest = (study.learning_rates, study.seeds)
    for task, scheme, budget, method in itertools.product(*grid):
        parts = study.method(method)
        trained = parts.pop("train", True)
        for rate, seed in itertools.product(*rest) if trained else [(None, study.seeds[0])]:
            student = {"scheme": scheme, "max_steps": budget, "learning_rate": rate}
            tree = merged(merged(study.tasks[task], parts), {"student": student})
            tree |= {"output": "-", "seed": seed, "threads": study.threads}
            source = f"the method {method!r} on the task {task!r}"
            recipe = recipe_from_dict(tree, source=source)
            contents = _contents(recipe, prints)
            work = Path(study.output) / "work" / f"{task}-{_teacher_key(recipe, contents)}"
            recipe = recipe.model_copy(update={"output": str(work)})
            steps = budget if trained else 0
            key = _key(recipe, steps, study.points if trained else 0, contents)
            yield Cell(task, scheme, method, steps, rate, seed, recipe, study.points, key)


def _contents(recipe: Recipe, prints: dict[str, str]) -> list[str]:
    """Returns fingerprints of data and models; each is read once."""
    sources = [recipe.data.train, recipe.data.eval, recipe.model.name_or_path, recipe.model.teacher]
    for source in filter(None, sources):
        if source not in prints:
            prints[source] = _fingerprint(Path(source))
    return [prints[source] for source in filter(None, sources)]


def _teacher_key(recipe: Recipe, contents: list[str]) -> str:
    plain = recipe.model_dump(include={"model", "data", "teacher"})
    return _digest([plain, contents])[:8]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _key(recipe: Recipe, steps: int, points: int, contents: list[str]) -> str:
    plain = recipe.model_dump(exclude={"output", "threads"})
    if not steps:
        plain["student"] = make_scheme(recipe.student).model_dump(mode="json")
        plain["schedule"], plain["seed"] = None, None
    return _digest([plain, steps, points, contents])[:20]


def _fingerprint(path: Path) -> str:
    """Returns what a source holds, as far as it is a file or a folder here."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return _digest([(str(file.relative_to(path)), file.stat().st_size) for file in files])
    return ""
