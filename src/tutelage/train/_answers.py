"""How near answers to questions are to the accepted ones."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

__all__ = ["exact_match", "overlap_f1"]


def exact_match(predicted: Sequence[str], given: Sequence[Sequence[str]]) -> float:
    """Returns the share of answers that equal one of the accepted ones.

    Both are compared in lower case, without punctuation and without the articles a, an, the.

    Args:
        predicted: One answer per question.
        given: The accepted answers of each.
    """
    right = [
        any(_words(answer) == _words(other) for other in accepted)
        for answer, accepted in zip(predicted, given, strict=True)
    ]
    return sum(right) / len(right)


def overlap_f1(predicted: Sequence[str], given: Sequence[Sequence[str]]) -> float:
    """Returns the mean F1 of the words that an answer shares with the best accepted one.

    Args:
        predicted: One answer per question.
        given: The accepted answers of each.
    """
    scores = [
        max(_overlap(_words(answer), _words(other)) for other in accepted)
        for answer, accepted in zip(predicted, given, strict=True)
    ]
    return sum(scores) / len(scores)


def _words(answer: str) -> list[str]:
    bare = "".join(sign for sign in answer.lower() if sign not in string.punctuation)
    return [word for word in re.split(r"\s+", bare) if word not in ("", "a", "an", "the")]


def _overlap(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))
