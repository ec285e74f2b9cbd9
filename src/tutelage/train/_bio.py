"""Entities in BIO tags, and in those that mark ends and single words: IOBES, BILOU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

__all__ = ["entities", "entity_scores", "is_bio"]

_FIRST, _INNER, _LAST = frozenset("BSU"), frozenset("IEL"), frozenset("ESLU")


def is_bio(labels: Iterable[str]) -> bool:
    """Returns whether labels are tags of entities: ``O``, and a mark with a type, as ``B-PER``.

    Marks are B and I; E and S, or L and U, for the last word of an entity and a single one.

    Args:
        labels: The labels.
    """
    found = set(labels)
    tags = {
        label for label in found if label[1:2] == "-" and label[0] in _FIRST | _INNER and label[2:]
    }
    return bool(tags) and found <= tags | {"O"}


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Returns the entities of a sentence as (type, first word, word after the last).

    An entity begins at ``B-X``, and at an ``I-X`` that does not follow a ``B-X`` or ``I-X`` of the
    same type, as CoNLL's scorer reads it; it ends before the first other tag. E and L are read as
    an I, S and U as a B, after which it ends.

    Args:
        tags: One tag per word.
    """
    found: set[tuple[str, int, int]] = set()
    kind, start, over = "", 0, False
    for index, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (over or mark not in _INNER or name != kind):
            found.add((kind, start, index))
            kind = ""
        if mark in _FIRST | _INNER and name and not kind:
            kind, start = name, index
        over = mark in _LAST
    return found


def entity_scores(
    predicted: Sequence[Sequence[str]], given: Sequence[Sequence[str]]
) -> tuple[float, float, float]:
    """Returns precision, recall and F1 over the entities of all sentences.

    An entity counts as found where its type and both ends are right. Each score is 0 where it is
    undefined.

    Args:
        predicted: One tag per word and sentence.
        given: The right ones.
    """
    found = wanted = right = 0
    for ours, theirs in zip(predicted, given, strict=True):
        one, other = entities(ours), entities(theirs)
        found, wanted, right = found + len(one), wanted + len(other), right + len(one & other)
    precision = right / found if found else 0.0
    recall = right / wanted if wanted else 0.0
    return precision, recall, 2 * right / (found + wanted) if found + wanted else 0.0
