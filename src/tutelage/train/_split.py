"""Training and evaluation examples from one source or two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from ..errors import DataError
from ._sections import DataSection

__all__ = ["read_splits", "same_source", "split_examples"]

STRATIFIED = ("classification", "pair", "image_classification")
"""Tasks with one class for every example: a part drawn from them keeps the classes' shares."""


class _Labelled(Protocol):
    """Examples of any kind."""

    @property
    def labels(self) -> Any: ...

    @property
    def source(self) -> str: ...

    def __len__(self) -> int: ...

    def select(self, indices: Sequence[int]) -> Any: ...


_Kind = TypeVar("_Kind", bound=_Labelled)


def read_splits(section: DataSection, read: Callable[..., _Kind]) -> tuple[_Kind, _Kind]:
    """Reads the training and the evaluation examples of a recipe with a reader of one source.

    Where the recipe names no evaluation data, or the same file or folder twice, a part of the
    training examples is kept for evaluation, as ``eval_split`` says.

    Args:
        section: The recipe's data section.
        read: Called with the source, the section and ``split="train"`` or ``"eval"``.

    Returns:
        The training and the evaluation examples.

    Raises:
        DataError: If data are missing, empty, unreadable or malformed.
    """
    train = read(section.train, section, split="train")
    if section.eval is not None and not same_source(section.train, section.eval):
        return train, read(section.eval, section, split="eval")
    if section.eval_split is None:
        raise DataError(
            f"'data.train' and 'data.eval' are both {section.train!r}; set data.eval_split, such "
            "as 0.1, to keep a part of it for evaluation."
        )
    stratify = section.task in STRATIFIED and train.labels is not None
    return split_examples(train, section.eval_split, section.seed, stratify)


def split_examples(
    examples: _Kind, amount: float, seed: int, stratify: bool
) -> tuple[_Kind, _Kind]:
    """Draws a part of the examples for evaluation.

    Args:
        examples: What is split.
        amount: A number of examples (int), or a share between 0 and 1 (float).
        seed: Seed of the draw.
        stratify: Whether the part keeps the shares of the labels; every label then keeps at
            least one training example.

    Returns:
        The rest (for training) and the part drawn, both in their original order.

    Raises:
        DataError: If the part would be empty, or leave too little for training.
    """
    total = len(examples)
    count = amount if isinstance(amount, int) else round(amount * total)
    groups: dict[str, list[int]] = {}
    for index in range(total):
        label = str(examples.labels[index]) if stratify and examples.labels is not None else ""
        groups.setdefault(label, []).append(index)
    if not 1 <= count <= total - len(groups):
        raise DataError(
            f"eval_split {amount} would draw {count} of the {total} examples of "
            f"{examples.source!r}; it must be between 1 and {max(0, total - len(groups))}, so "
            "that something is left to train on: change it, or give more data."
        )
    shares = {label: len(group) * count / total for label, group in groups.items()}
    quota = {label: min(int(shares[label]), len(group) - 1) for label, group in groups.items()}
    while sum(quota.values()) < count:
        room = [label for label, group in groups.items() if quota[label] < len(group) - 1]
        quota[max(room, key=lambda label: shares[label] - quota[label])] += 1
    random = np.random.default_rng(seed)
    drawn: set[int] = set()
    for label, group in groups.items():
        drawn.update(random.permutation(group)[: quota[label]].tolist())
    rest = [index for index in range(total) if index not in drawn]
    return examples.select(rest), examples.select(sorted(drawn))


def same_source(first: str, second: str) -> bool:
    """Returns whether two names are of one file or folder."""
    one, other = Path(first).expanduser(), Path(second).expanduser()
    return one.exists() and other.exists() and one.samefile(other)
