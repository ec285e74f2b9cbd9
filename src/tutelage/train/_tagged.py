"""Sentences as lists of words with a label each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import DataError
from ._sections import DataSection
from .data import column_of, read_columns

__all__ = ["TaggedExamples", "read_tagged"]


@dataclass(frozen=True)
class TaggedExamples:
    """Sentences with one label per word.

    Attributes:
        words: The words of every sentence.
        labels: One label per word of every sentence; None for data without labels.
        source: Where they come from, for messages.
    """

    words: list[list[str]]
    labels: list[list[str]] | None
    source: str

    def __len__(self) -> int:
        return len(self.words)

    def select(self, indices: Sequence[int]) -> TaggedExamples:
        """Returns the examples at the given positions.

        Args:
            indices: Positions, in the order wanted.
        """
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return TaggedExamples([self.words[i] for i in indices], labels, self.source)


def read_tagged(
    source: str, section: DataSection, *, split: Literal["train", "eval"] = "train"
) -> TaggedExamples:
    """Reads sentences with one label per word.

    Args:
        source: A table, see ``read_columns``: lists in JSONL, JSON, Parquet and `datasets`; in TSV
            and CSV words and labels between blanks.
        section: The recipe's data section: columns, encoding and split names.
        split: Which split is read from a `datasets` name.

    Raises:
        DataError: The source is missing, empty, unreadable or malformed.
    """
    columns = read_columns(source, section, split=split)
    cells = column_of(columns, section.text, "text", source)
    words = [_items(cell, row, "text", source) for row, cell in enumerate(cells, start=1)]
    if section.label is None:
        return TaggedExamples(words, None, source)
    cells = column_of(columns, section.label, "label", source)
    labels = [_items(cell, row, "label", source) for row, cell in enumerate(cells, start=1)]
    for row, (ours, theirs) in enumerate(zip(words, labels, strict=True), start=1):
        if len(ours) != len(theirs):
            raise DataError(
                f"row {row} of {source!r} has {len(ours)} words and {len(theirs)} labels; give one "
                "label for each word."
            )
    return TaggedExamples(words, labels, source)


def _items(cell: Any, row: int, key: str, source: str) -> list[str]:
    items = cell.split() if isinstance(cell, str) else cell
    if not isinstance(items, list) or not all(isinstance(item, str | int) for item in items):
        raise DataError(
            f"row {row} of {source!r} holds a {type(cell).__name__} as {key}; set data.{key} to a "
            "column of lists, or of words between blanks."
        )
    if not items or not all(str(item).strip() for item in items):
        raise DataError(
            f"row {row} of {source!r} has no {key}, or an empty one; add it or remove the row."
        )
    return [str(item) for item in items]
