"""Questions whose answers stand in a context."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import DataError
from ._readers import decode, file_type, read_content, refuse_empty
from ._sections import DataSection
from .data import column_of, read_columns

__all__ = ["QuestionExamples", "read_questions"]


@dataclass(frozen=True)
class QuestionExamples:
    """Questions with their contexts.

    Attributes:
        contexts: The text that holds the answer.
        questions: The question.
        labels: Every accepted answer as (text, first character in the context), none for a question
            that its context does not answer; None for data without answers.
        source: Where they come from, for messages.
    """

    contexts: list[str]
    questions: list[str]
    labels: list[list[tuple[str, int]]] | None
    source: str

    def __len__(self) -> int:
        return len(self.contexts)

    def select(self, indices: Sequence[int]) -> QuestionExamples:
        """Returns the examples at the given positions.

        Args:
            indices: Positions, in the order wanted.
        """
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        contexts = [self.contexts[i] for i in indices]
        return QuestionExamples(contexts, [self.questions[i] for i in indices], labels, self.source)


def read_questions(
    source: str, section: DataSection, *, split: Literal["train", "eval"] = "train"
) -> QuestionExamples:
    """Reads questions, contexts and answers.

    Args:
        source: A .json file of SQuAD (``{"data": [{"paragraphs": [...]}]}``), or a table, see
            ``read_columns``, in which an answer is ``{"text": [...], "answer_start": [...]}`` or a
            list of ``{"text": ..., "answer_start": ...}``.
        section: The recipe's data section: ``text`` is the context's column, ``text_pair`` the
            question's, ``label`` the answers'.
        split: Which split is read from a `datasets` name.

    Raises:
        DataError: The source is missing, empty, unreadable or malformed, or a question has no
            answer in its context and the section does not say that this may be.
    """
    columns = _squad(source, section) or read_columns(source, section, split=split)
    contexts = _texts(columns, section.text, "text", source)
    questions = _texts(columns, section.text_pair or "question", "text_pair", source)
    if section.label is None:
        return QuestionExamples(contexts, questions, None, source)
    cells = column_of(columns, section.label, "label", source)
    labels = [
        _answers(cell, context, row, source, section)
        for row, (cell, context) in enumerate(zip(cells, contexts, strict=True), start=1)
    ]
    return QuestionExamples(contexts, questions, labels, source)


def _squad(source: str, section: DataSection) -> dict[Any, Sequence[Any]] | None:
    """Returns the columns of a .json file of SQuAD, ``None`` for another source."""
    path = Path(source).expanduser()
    if not path.is_file() or file_type(path) != ".json":
        return None
    try:
        tree = json.loads(decode(read_content(path, source), source, section))
    except (ValueError, RecursionError):
        return None
    if not isinstance(tree, dict):
        return None
    rows: list[tuple[Any, Any, Any]] = []
    try:
        for article in tree["data"]:
            for paragraph in article["paragraphs"]:
                rows += [
                    (paragraph["context"], asked["question"], asked.get("answers"))
                    for asked in paragraph["qas"]
                ]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{source!r} is not laid out as SQuAD ({type(error).__name__}: {error}); nest data, "
            "paragraphs and qas, or write a list of objects with context, question and answers."
        ) from None
    if not rows:
        refuse_empty(source)
    names = (section.text, section.text_pair or "question", section.label)
    return dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))


def _texts(
    columns: dict[Any, Sequence[Any]], wanted: str | int, key: str, source: str
) -> list[str]:
    cells = column_of(columns, wanted, key, source)
    for row, cell in enumerate(cells, start=1):
        if not isinstance(cell, str) or not cell.strip():
            raise DataError(f"row {row} of {source!r} has no {wanted}; add it or remove the row.")
    return list(cells)


def _answers(
    cell: Any, context: str, row: int, source: str, section: DataSection
) -> list[tuple[str, int]]:
    try:
        if isinstance(cell, dict):
            pairs = list(zip(cell["text"], cell["answer_start"], strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start"]) for answer in cell]
    except (KeyError, TypeError, ValueError):
        raise DataError(
            f"row {row} of {source!r} has answers that are not text with answer_start; write "
            '{"text": [...], "answer_start": [...]}.'
        ) from None
    if not pairs and not section.unanswerable:
        raise DataError(
            f"row {row} of {source!r} has no answer; set data.unanswerable=true (as for SQuAD 2), "
            "or remove the row."
        )
    for text, start in pairs:
        placed = isinstance(text, str) and isinstance(start, int) and start >= 0 and text.strip()
        if not placed or context[start : start + len(text)] != text:
            raise DataError(
                f"row {row} of {source!r} has the answer {text!r}, which does not stand at "
                f"character {start!r} of its context; correct answer_start."
            )
    return pairs
