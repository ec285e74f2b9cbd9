"""What a model says about one input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ._task import Array

__all__ = ["Answer", "Continuation", "Prediction", "WordLabels", "likeliest"]


@dataclass(frozen=True)
class Prediction:
    """What a packed model says about one text or image.

    Attributes:
        label: Name of the likeliest class; ``None`` for a regression.
        probability: Its probability; ``None`` for a regression.
        value: The output of a regression; ``None`` for classes.
    """

    label: str | None
    probability: float | None
    value: float | None

    def line(self, given: str) -> str:
        """Returns the prediction and its input, between tabs.

        Args:
            given: The input.
        """
        if self.label is None:
            return f"{self.value:.4f}\t{given}"
        return f"{self.label}\t{self.probability:.4f}\t{given}"


@dataclass(frozen=True)
class WordLabels:
    """What a packed model says about the words of a text.

    Attributes:
        words: The words.
        labels: The likeliest label of each; ``None`` for words that were cut off.
    """

    words: list[str]
    labels: list[str | None]

    def line(self, given: str) -> str:
        """Returns every word with a slash and its label.

        Args:
            given: The input.
        """
        pairs = zip(self.words, self.labels, strict=True)
        return " ".join(f"{word}/{label or '?'}" for word, label in pairs)


@dataclass(frozen=True)
class Answer:
    """What a packed model answers to a question.

    Attributes:
        answer: The answer, a part of the context.
        start: Its first character in the context.
        end: The character after its last.
        score: Sum of its start and end logits.
    """

    answer: str
    start: int
    end: int
    score: float

    def line(self, given: str) -> str:
        """Returns the answer and its score, between tabs.

        Args:
            given: The context.
        """
        return f"{self.answer}\t{self.score:.4f}"


@dataclass(frozen=True)
class Continuation:
    """How a packed language model goes on.

    Attributes:
        continuation: The text it adds.
    """

    continuation: str

    def line(self, given: str) -> str:
        """Returns the input with what follows.

        Args:
            given: The input.
        """
        return given + self.continuation


def likeliest(logits: Array, names: Sequence[str]) -> list[Prediction]:
    """Returns the likeliest class of every row.

    Args:
        logits: (rows, classes).
        names: The classes.
    """
    shares = torch.from_numpy(logits).double().softmax(-1).numpy()
    best = shares.argmax(axis=1)
    return [
        Prediction(names[index], float(row[index]), None)
        for row, index in zip(shares, best, strict=True)
    ]
