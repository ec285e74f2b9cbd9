"""Reading and writing studies."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..artefacts import write_text
from ..errors import StudyError, nearest
from ..train.recipe import apply_override, read_yaml
from ._methods import METHODS
from ._sections import Study

__all__ = ["load_study", "save_study", "study_from_dict"]


def load_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Study:
    """Reads a study from a YAML file.

    Args:
        path: The YAML file. Paths inside it are relative to the current directory.
        overrides: ``"key=value"`` texts that win over the file; values are YAML. A list of names
            takes those of the file's tasks or methods.

    Raises:
        RecipeError: The file is missing or not YAML.
        StudyError: A key or a value is wrong.
    """
    return study_from_dict(read_yaml(path, "study"), overrides, source=str(path))


def study_from_dict(
    values: Mapping[str, Any] | None, overrides: Sequence[str] = (), *, source: str = "the study"
) -> Study:
    """Makes a study from nested dictionaries.

    Args:
        values: As in the YAML file.
        overrides: ``"key=value"`` texts that win over the values, as in ``load_study``.
        source: What error messages call the study.

    Raises:
        StudyError: A key or a value is wrong.
    """
    if values is not None and not isinstance(values, Mapping):
        raise StudyError(
            f"{source} holds a {type(values).__name__} where keys are expected; begin with "
            "'tasks:', 'methods:', 'baseline:' and 'output:'."
        )
    tree = dict(values or {})
    written = {key: tree.get(key) for key in ("tasks", "methods")}
    for override in overrides:
        apply_override(tree, override)
    for key, entries in written.items():
        if isinstance(entries, Mapping) and isinstance(tree[key], list):
            tree[key] = _part(tree[key], entries, key, source)
    try:
        return Study.model_validate(tree)
    except ValidationError as error:
        found = error.errors()
        first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
        where = ".".join(str(part) for part in first["loc"])
        message = str(first["msg"]).removeprefix("Value error, ").rstrip(".")
        more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
        place = f"{where!r}: " if where else ""
        raise StudyError(f"{source}: {place}{message}{more}; correct it.") from None


def _part(names: list[Any], entries: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
    """Returns the named entries; a method of the library need not be among them."""
    chosen: dict[str, Any] = {}
    known = {**dict.fromkeys(METHODS if key == "methods" else ()), **entries}
    for name in map(str, names):
        if name not in known:
            hint = nearest(name, known)
            raise StudyError(
                f"{source}: {key!r} has no {name!r}; use some of {', '.join(known)}.{hint}"
            )
        chosen[name] = known[name]
    return chosen


def save_study(study: Study, path: Path) -> None:
    """Writes a study as YAML; the file appears whole or not at all.

    Args:
        study: The study.
        path: The file to write.
    """
    write_text(path, yaml.safe_dump(study.model_dump(), sort_keys=False, allow_unicode=True))
