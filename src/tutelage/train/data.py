"""Labelled text from files, class folders and the `datasets` library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError, nearest
from ._readers import (
    READERS,
    decode,
    file_type,
    read_content,
    read_datasets,
    refuse_empty,
)
from ._sections import DataSection
from ._split import split_examples as split_examples

__all__ = [
    "Examples",
    "column_of",
    "read_columns",
    "read_examples",
    "split_examples",
]


@dataclass(frozen=True)
class Examples:
    """Labelled texts.

    Attributes:
        texts: One text per example.
        pairs: The second text of each example, or None.
        labels: One label per example: text for classes, real numbers for a regression; None for
            data without labels.
        source: Where they come from, for messages.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[str] | list[float] | None
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> Examples:
        """Returns the examples at the given positions.

        Args:
            indices: Positions, in the order wanted.

        Returns:
            New examples of the same source.
        """
        labels: Any = None if self.labels is None else [self.labels[i] for i in indices]
        pairs = None if self.pairs is None else [self.pairs[i] for i in indices]
        return Examples([self.texts[i] for i in indices], pairs, labels, self.source)


def read_examples(
    source: str, section: DataSection, *, split: Literal["train", "eval"] = "train"
) -> Examples:
    """Reads labelled texts.

    Args:
        source: A TSV, CSV, JSONL, JSON or Parquet file (each also with .gz); a folder that holds
            one folder of text files per class; or a name or path for `datasets`, optionally
            ``name:config``. TSV is read without quoting, CSV with the usual quoting.
        section: The recipe's data section: task, columns, encoding and split names.
        split: Which split is read from a `datasets` name.

    Returns:
        The examples, in the order of the source.

    Raises:
        DataError: If the source is missing, empty, unreadable or malformed.
    """
    if not source:
        raise DataError("a path or name of data is empty; set data.train and data.eval.")
    path = Path(source).expanduser()
    if path.is_dir() and _class_folders(path):
        return _read_folder(path, source, section)
    return _examples(read_columns(source, section, split=split), source, section)


def read_columns(
    source: str, section: DataSection, *, split: Literal["train", "eval"] = "train"
) -> dict[Any, Sequence[Any]]:
    """Reads a table.

    Args:
        source: A TSV, CSV, JSONL, JSON or Parquet file (each also with .gz); or a name or path for
            `datasets`, optionally ``name:config``.
        section: The recipe's data section: encoding, header and split names.
        split: Which split is read from a `datasets` name.

    Returns:
        The columns by name, or by position where the file has no header.

    Raises:
        DataError: If the source is missing, empty, unreadable or malformed.
    """
    if not source:
        raise DataError("a path or name of data is empty; set data.train and data.eval.")
    path = Path(source).expanduser()
    suffix = file_type(path)
    if path.is_file():
        if suffix not in READERS:
            raise DataError(
                f"the type of {source!r} is not known; name it {', '.join(sorted(READERS))} "
                "(each also with .gz)."
            )
        columns = READERS[suffix](read_content(path, source), source, section)
    elif not path.exists() and (suffix in READERS or source[0] in "./~" or "\\" in source):
        raise DataError(f"there is no file or folder {source!r}; check the path.")
    else:
        name = section.train_split if split == "train" else section.eval_split_name
        columns = read_datasets(source, name)
    if not columns or not len(next(iter(columns.values()))):
        refuse_empty(source)
    return columns


def _examples(columns: dict[Any, Sequence[Any]], source: str, section: DataSection) -> Examples:
    paired = section.text_pair is not None
    texts = [str(cell) for cell in _cells(columns, section.text, "text", source, blank=paired)]
    pairs = None
    if section.text_pair is not None:
        cells = _cells(columns, section.text_pair, "text_pair", source, blank=True)
        pairs = [str(cell) for cell in cells]
        _refuse_blank_pairs(texts, pairs, source)
    if section.label is None:
        return Examples(texts, pairs, None, source)
    given = _cells(columns, section.label, "label", source)
    labels: list[str] | list[float]
    if section.task.endswith("regression"):
        labels = [_number(cell, row, source) for row, cell in enumerate(given, start=1)]
    else:
        labels = [_class(cell) for cell in given]
    return Examples(texts, pairs, labels, source)


def column_of(
    columns: dict[Any, Sequence[Any]], wanted: str | int, key: str, source: str
) -> Sequence[Any]:
    """Returns a column of a table by the recipe's key.

    Args:
        columns: The table.
        wanted: Name or position of the column.
        key: The recipe's key in ``data``, for messages.
        source: Where the table is from.

    Raises:
        DataError: There is no such column.
    """
    names = list(columns)
    if isinstance(wanted, int) and wanted < len(names):
        return columns[names[wanted]]
    if wanted in columns and not isinstance(wanted, int):
        return columns[wanted]
    if isinstance(names[0], int):
        raise DataError(
            f"{source!r} has no column {wanted!r}: it is read without header and has {len(names)} "
            f"columns; set data.{key} to a position from 0 to {len(names) - 1}."
        )
    hint = nearest(str(wanted), names)
    raise DataError(
        f"{source!r} has no column {wanted!r}.{hint} Set data.{key} to one of: "
        f"{', '.join(names)}; or data.header=false if the first line is an example."
    )


def _refuse_blank_pairs(texts: list[str], pairs: list[str], source: str) -> None:
    # One of two may be blank, as in a few rows of QQP.
    for row, (first, second) in enumerate(zip(texts, pairs, strict=True), start=1):
        if not first.strip() and not second.strip():
            raise DataError(
                f"row {row} of {source!r} has neither text nor text_pair; add them or remove the "
                "row."
            )


def _cells(
    columns: dict[Any, Sequence[Any]],
    wanted: str | int,
    key: str,
    source: str,
    *,
    blank: bool = False,
) -> list[str | int | float]:
    cells: list[str | int | float] = []
    for row, value in enumerate(column_of(columns, wanted, key, source), start=1):
        if _missing(value) and not (blank and isinstance(value, str)):
            raise DataError(f"row {row} of {source!r} has no {key}; add it or remove the row.")
        if not isinstance(value, str | int | float):
            raise DataError(
                f"row {row} of {source!r} holds a {type(value).__name__} as {key}; "
                f"set data.{key} to a column of text or numbers."
            )
        cells.append(value)
    return cells


def _missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _class(value: str | int | float) -> str:
    # A column of integers with a gap is read as floating point: 1.0 is the label "1".
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).strip()


def _number(value: str | int | float, row: int, source: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"row {row} of {source!r} has the label {value!r}, which is not a finite number; "
            "correct it, or set data.task=classification."
        )
    return number


def _class_folders(path: Path) -> list[Path]:
    """Returns the class folders, none if data files lie beside them."""
    folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] not in "._")
    tables = (p for folder in (path, *folders) for p in folder.iterdir())
    if any(file_type(p) in (*READERS, ".arrow") for p in tables):
        return []
    return folders


def _read_folder(path: Path, source: str, section: DataSection) -> Examples:
    if section.task != "classification":
        raise DataError(
            f"the folder {source!r} holds class folders, which do not fit the task "
            f"{section.task!r}; give a file with columns, or set data.task=classification."
        )
    texts, labels = [], []
    for folder in _class_folders(path):
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        if not files:
            raise DataError(
                f"the class folder {str(folder)!r} holds no text files; fill or remove it."
            )
        for file in files:
            texts.append(decode(read_content(file, str(file)), str(file), section))
            labels.append(folder.name)
    return Examples(texts, None, None if section.label is None else labels, source)
