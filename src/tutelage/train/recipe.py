"""Recipes: one YAML file that says what is trained, on what, and how."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..artefacts import write_text
from ..errors import ArtefactError, RecipeError, nearest
from ._sections import (
    SECTIONS,
    AugmentSection,
    DataSection,
    ModelSection,
    Recipe,
    ScheduleSection,
    StudentSection,
    TeacherSection,
)

__all__ = [
    "AugmentSection",
    "DataSection",
    "ModelSection",
    "Recipe",
    "ScheduleSection",
    "StudentSection",
    "TeacherSection",
    "apply_override",
    "load_recipe",
    "read_yaml",
    "recipe_from_dict",
    "save_recipe",
    "yaml_text",
]


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from a YAML file.

    Args:
        path: The YAML file. Paths inside it are relative to the current directory.
        overrides: ``"section.key=value"`` texts that win over the file; values are YAML.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: If the file is missing or not YAML, or a key or a value is wrong.
    """
    return recipe_from_dict(read_yaml(path, "recipe"), overrides, source=str(path))


def read_yaml(path: str | os.PathLike[str], what: str) -> Any:
    """Reads a YAML file.

    Args:
        path: The file.
        what: What error messages call it.

    Raises:
        RecipeError: It is missing or not YAML.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no {what} {str(path)!r}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the {what} {str(path)!r} cannot be read ({_line(error)}); give a UTF-8 YAML file."
        ) from None
    return _parse(text, str(path))


def recipe_from_dict(
    values: Mapping[str, Any] | None, overrides: Sequence[str] = (), *, source: str = "the recipe"
) -> Recipe:
    """Makes a recipe from nested dictionaries.

    Args:
        values: Section names to sections, as in the YAML file.
        overrides: ``"section.key=value"`` texts that win over the values.
        source: What error messages call the recipe.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: If a key or a value is wrong.

    Examples:
        >>> recipe = recipe_from_dict(
        ...     {"model": {"name_or_path": "my-bert"}, "output": "runs/mine"},
        ...     ["data.train=my.csv", "data.eval_split=0.1"],
        ... )
        >>> recipe.student.scheme, recipe.schedule_steps
        ('ternary-a8', 60)
    """
    if values is not None and not isinstance(values, Mapping):
        raise RecipeError(
            f"{source} holds a {type(values).__name__} where sections are expected; "
            "begin with 'model:', 'data:' and 'output:'."
        )
    tree = deepcopy(dict(values or {}))
    for name in SECTIONS:
        if "." not in name and tree.get(name) is None:
            tree[name] = {}
    for override in overrides:
        apply_override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, source)) from None


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Writes a recipe, its defaults filled in, as YAML; the file appears whole or not at all.

    Args:
        recipe: The recipe.
        path: The file to write; its folder is made if missing.

    Raises:
        ArtefactError: If the file cannot be written.
    """
    target = Path(path)
    text = yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtefactError(
            f"the recipe could not be written to {str(target)!r} ({error.strerror or error}); "
            "choose another folder."
        ) from None
    write_text(target, text)


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1} of {source}" if mark else source
        problem = getattr(error, "problem", None) or _line(error)
        raise RecipeError(f"{place} is not valid YAML: {problem}; correct it.") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Sets a key of nested dictionaries.

    Args:
        tree: The dictionaries, changed in place.
        override: ``"section.key=value"``; the value is YAML.

    Raises:
        RecipeError: It is malformed.
    """
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"the override {override!r} is not key=value; write for instance student.max_steps=200."
        )
    for part in parts[:-1]:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[parts[-1]] = _parse(value, f"the override {override!r}")


def yaml_text(value: object) -> str:
    """Returns the text that an override reads as a value, in quotes where YAML needs them.

    Args:
        value: Text, or a number.

    Examples:
        >>> yaml_text("body"), yaml_text("null"), yaml_text(3)
        ('body', '"null"', '3')
    """
    text = str(value)
    try:
        same = _parse(text, "") == value
    except RecipeError:
        same = False
    return text if same else json.dumps(text, ensure_ascii=False)


def _explain(error: ValidationError, source: str) -> str:
    """Returns one line: the first error, unknown keys before others, and how many more."""
    unknown = ("extra_forbidden", "invalid_key")
    found: dict[str, list[Any]] = {}
    for item in sorted(error.errors(), key=lambda item: item["type"] not in unknown):
        found.setdefault(_dotted(item["loc"]), []).append(item)
    key, items = next(iter(found.items()))
    first = items[0]
    section, _, name = key.rpartition(".")
    if first["type"] in unknown:
        valid = list((SECTIONS[section] if section else Recipe).model_fields)
        hint = nearest(name, valid) or _elsewhere(name)
        within = f" of {section!r}" if section else ""
        text = f"{source}: unknown key {key!r}.{hint} Valid keys{within}: {', '.join(valid)}."
    elif first["type"] == "missing":
        model = SECTIONS[section] if section else Recipe
        what = model.model_fields[name].description
        text = f"{source}: the key {key!r} is missing ({what}); add it, or give {key}=VALUE."
    elif not key or key in SECTIONS:
        where = f" in {key!r}," if key else ""
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("model_type", "dict_type"):
            message = f"expected keys and values, found {_short(first['input'])}"
        text = f"{source}:{where} {message}."
    else:
        expected = " or ".join(dict.fromkeys(_expectation(item) for item in items))
        hint = ""
        if first["type"] == "literal_error":
            hint = nearest(first["input"], re.findall(r"'([^']+)'", first["ctx"]["expected"]))
        expected = expected.replace("a whole number or a number", "a number")
        end = "" if expected.endswith("?") else "."
        text = f"{source}: {key!r} is {_short(first['input'])}, but should be {expected}{end}{hint}"
    more = len(found) - 1
    return " ".join(text.split()) + (f" (and {more} more)" if more else "")


def _dotted(location: tuple[int | str, ...]) -> str:
    """Returns the key as the user writes it, without pydantic's tags of union members."""
    parts = [str(part) for part in location[:1]]
    while ".".join(parts) in SECTIONS and len(location) > len(parts):
        parts.append(str(location[len(parts)]))
    positions = (f"[{part}]" for part in location[len(parts) :] if isinstance(part, int))
    return ".".join(parts) + "".join(positions)


def _elsewhere(name: str) -> str:
    """Returns a hint if the key exists in a section."""
    homes = [f"{section}.{name}" for section, m in SECTIONS.items() if name in m.model_fields]
    return f" Did you mean {' or '.join(map(repr, homes))}?" if homes else ""


def _expectation(item: Any) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message.removeprefix("Input should be ").removeprefix("should be ")
    return message.replace("a valid integer", "a whole number").replace("a valid ", "a ")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())
