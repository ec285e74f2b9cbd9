"""A recipe from nothing but a data file: columns found by name, everything else by default."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError, RecipeError
from ._readers import READERS, file_type
from .data import read_columns
from .recipe import Recipe, apply_override, recipe_from_dict, yaml_text

__all__ = ["LABEL_NAMES", "TEXT_NAMES", "FoundRecipe", "is_data_file", "recipe_for_data"]

TEXT_NAMES = (
    "text",
    "sentence",
    "content",
    "body",
    "review",
    "question",
    "message",
    "comment",
    "document",
    "tweet",
    "utterance",
)
"""Names of columns that hold texts; the first one wins over the others."""

LABEL_NAMES = ("label", "labels", "class", "category", "target", "sentiment", "intent", "topic")
"""Names of columns that hold labels; the first one wins over the others."""

EVAL_SPLIT = 0.1
"""Share of the rows that is kept for evaluation."""

_DETECTED = ("classification", "regression")
_FEW = 20
_HEADER = " (and data.header=false if the first line is an example)"


@dataclass(frozen=True)
class FoundRecipe:
    """A recipe and what was chosen for it.

    Attributes:
        recipe: The recipe.
        line: The choices, in one line for the user.
    """

    recipe: Recipe
    line: str


def is_data_file(path: str | os.PathLike[str]) -> bool:
    """Whether a path names data by its suffix; a .json file that begins with ``{`` is a recipe.

    Args:
        path: A path, of a file that need not exist.
    """
    file = Path(path)
    if file_type(file) not in READERS:
        return False
    if file.suffix.lower() == ".json" and file.is_file():
        with file.open("rb") as opened:
            return not opened.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    return True


def recipe_for_data(
    path: str | os.PathLike[str], model: str, overrides: Sequence[str] = ()
) -> FoundRecipe:
    """Makes the recipe of a text classifier (or a regression) from a table of texts and labels.

    The columns are those that are called as in ``TEXT_NAMES`` and ``LABEL_NAMES``; of two columns
    one name is enough. A tenth of the rows is kept for evaluation unless ``data.eval`` names other
    data. The output is ``runs/`` and the file's name.

    Args:
        path: A TSV, CSV, JSONL, JSON or Parquet file, each also with .gz.
        model: Name or folder of the model, unless an override of ``model.name_or_path`` names one.
        overrides: ``"section.key=value"`` texts that win.

    Returns:
        The recipe, and what was chosen.

    Raises:
        DataError: The file cannot be read, or which columns are meant is not clear; the sentence
            holds the command that says so.
        RecipeError: An override is wrong.
    """
    source = str(path)
    tree: dict[str, Any] = {}
    for override in overrides:
        apply_override(tree, override)
    for section in ("model", "data"):
        if not isinstance(tree.setdefault(section, {}), dict):
            raise RecipeError(
                f"{section!r} is {tree[section]!r} and should be keys and values; write for "
                "instance data.text=body."
            )
    data = tree["data"]
    if "train" in data:
        raise RecipeError(
            f"the training data are named twice, {source!r} and data.train; leave out the one or "
            "write a recipe."
        )
    data["train"] = source
    hint = "" if "name_or_path" in tree["model"] else " (--model NAME takes another)"
    tree["model"].setdefault("name_or_path", model)
    if "eval" not in data:
        data.setdefault("eval_split", EVAL_SPLIT)
    tree.setdefault("output", f"runs/{_stem(Path(path))}")
    found = ""
    if data.get("task", "classification") in _DETECTED:
        found = _detect(source, tree, overrides)
    recipe = recipe_from_dict(tree, source=f"the options for {source}")
    kept = recipe.data.eval or f"{recipe.data.eval_split:g} of the rows"
    if isinstance(recipe.data.eval_split, int) and recipe.data.eval is None:
        kept = f"{recipe.data.eval_split} rows"
    line = f"{found}evaluation on {kept}; model {recipe.model.name_or_path}{hint}"
    return FoundRecipe(recipe, f"{source}: {line}; output {recipe.output}")


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".GZ").rsplit(".", 1)[0] or "data"


def _detect(source: str, tree: dict[str, Any], overrides: Sequence[str]) -> str:
    """Fills in the columns of text and label and returns a remark; refuses what is not clear."""
    # A recipe of the same settings, columns aside, says how the file is read.
    settings = {key: value for key, value in tree["data"].items() if key not in ("text", "label")}
    probe = recipe_from_dict(tree | {"data": settings}, source=f"the options for {source}")
    columns = read_columns(source, probe.data)
    names = list(columns)
    data = tree["data"]
    text = data["text"] if "text" in data else _named(names, TEXT_NAMES)
    label = data["label"] if "label" in data else _named(names, LABEL_NAMES)
    if len(names) == 2 and "label" not in data and label is None and text in names:
        label = names[1 - names.index(text)]
    elif len(names) == 2 and "text" not in data and text is None and label in names:
        text = names[1 - names.index(label)]
    missing = {
        "text": text is None and "text" not in data,
        "label": label is None and "label" not in data,
    }
    if any(missing.values()):
        known = label if text is None else text
        raise DataError(_unclear(source, columns, missing, known, overrides))
    data["text"], data["label"] = text, label
    remark = f"texts are in {text!r}, "
    if label is None:
        return remark + "without labels, "
    remark += f"labels in {label!r}"
    if data.get("task", "classification") != "classification" or label not in columns:
        return remark + "; "
    return f"{remark} ({_classes(source, columns, label, overrides)} classes); "


def _named(names: Sequence[Any], known: Sequence[str]) -> Any:
    """Returns the one name that is known: the first of ``known`` before others, else ``None``."""
    matching = [name for name in names if str(name).lower() in known]
    first = [name for name in matching if str(name).lower() == known[0]]
    for found in (first, matching):
        if len(found) == 1:
            return found[0]
    return None


def _unclear(
    source: str,
    columns: dict[Any, Sequence[Any]],
    missing: dict[str, bool],
    known: Any,
    overrides: Sequence[str],
) -> str:
    """Returns the sentence about unclear columns; ``known`` is the one that is clear, if any."""
    first = "columns by position, from" if isinstance(next(iter(columns)), int) else "the columns"
    keys = [key for key in ("text", "label") if missing[key]]
    free = [name for name in columns if name != known] or list(columns)
    guess: dict[str, Any] = {}
    if missing["text"]:
        guess["text"] = max(free, key=lambda name: sum(len(str(cell)) for cell in columns[name]))
        free = [name for name in free if name != guess["text"]] or free
    if missing["label"]:
        counts = {name: len(set(map(str, columns[name]))) for name in free[::-1]}
        guess["label"] = min(counts, key=lambda name: (counts[name] < 2, counts[name]))
    header = "" if isinstance(next(iter(columns)), int) else _HEADER
    return (
        f"{source!r} has {first} {', '.join(map(str, columns))}, and which of them holds "
        f"{' and '.join(f'the {key}' for key in keys)} is not clear; add "
        f"{' and '.join(f'data.{key}=COLUMN' for key in keys)}{header}, for instance: "
        f"{_command(source, overrides, guess)}."
    )


def _command(source: str, overrides: Sequence[str], add: dict[str, Any]) -> str:
    pairs = [f"data.{key}={yaml_text(value)}" for key, value in add.items()]
    return f"`{shlex.join(['tutelage', 'train', source, *overrides, *pairs])}`"


def _classes(
    source: str, columns: dict[Any, Sequence[Any]], label: Any, overrides: Sequence[str]
) -> int:
    cells = [str(cell).strip() for cell in columns[label]]
    count = len(set(cells))
    if count > max(_FEW, len(cells) // 2):
        command = _command(source, [*overrides, "data.task=regression"], {"label": label})
        raise DataError(
            f"the column {label!r} of {source!r} holds {count} different values in {len(cells)} "
            "rows, which are hardly classes; name another column with data.label=COLUMN, or, if "
            f"they are numbers to predict: {command}."
        )
    return count
