"""The labels of data and the outputs of a head, brought together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ...errors import DataError
from .._sections import DataSection

__all__ = [
    "class_labels",
    "class_settings",
    "head_names",
    "label_ids",
    "no_teacher",
    "shown",
    "spellings_of",
    "unlabelled_names",
]


def class_labels(
    train: Iterable[str],
    eval: Iterable[str],
    section: DataSection,
    sources: tuple[str, str],
    head: tuple[str, ...] | None,
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Finds the names of the outputs, and how the data spell them.

    The labels are those of `section.labels`; else those of the model's head, if it has one and
    the data use its names (in any case) or the numbers 0 to k - 1; else those of the training
    data, sorted. With `section.labels` a head may have other names; the order then decides.

    Args:
        train: Labels of the training data.
        eval: Labels of the evaluation data.
        section: The recipe's data section.
        sources: Where the training and the evaluation data are from.
        head: The names of the head's outputs in their order; None without a head.

    Returns:
        The names in the order of the outputs; and the data's spellings in that order, empty where
        they are the names.

    Raises:
        DataError: If the training data have one class only, the evaluation data a class that
            training lacks, or the labels do not fit the model's head.
    """
    present = {str(label) for label in train}
    if len(present) < 2:
        raise DataError(
            f"the training data {sources[0]!r} hold the label {present.pop()!r} only; give "
            "examples of at least two classes."
        )
    lacking = _ordered({str(label) for label in eval} - present)
    if lacking:
        raise DataError(
            f"the evaluation data {sources[1]!r} hold {_labels(lacking)}, which the training data "
            f"lack (they hold {shown(_ordered(present))}); add training examples, or remove these."
        )
    if section.labels is not None:
        names = tuple(section.labels)
        unlisted = _ordered(present - set(names))
        if unlisted:
            raise DataError(
                f"{sources[0]!r} holds {_labels(unlisted)}, which data.labels "
                f"({shown(names)}) lacks; add it there, or remove its examples."
            )
    else:
        names = _ordered(present)
    if head is None:
        return names, ()
    return _fit(names, head, given=section.labels is not None)


def _fit(
    names: tuple[str, ...], head: tuple[str, ...], *, given: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the head's names and, where the data spell them otherwise, the data's."""
    folded = {name.casefold(): index for index, name in enumerate(head)}
    indices = [folded.get(name.casefold()) for name in names]
    if len(folded) == len(head) and None not in indices and len(set(indices)) == len(names):
        if given and len(names) == len(head) and indices != list(range(len(head))):
            raise DataError(
                f"data.labels ({shown(names)}) are in another order than the outputs of the "
                f"model's head ({shown(head)}); write them in that order."
            )
        spelled = {index: name for index, name in zip(indices, names, strict=True)}
        spellings = tuple(spelled.get(index, name) for index, name in enumerate(head))
        return head, () if spellings == head else spellings
    if len(names) != len(head):
        raise DataError(
            f"the data have {len(names)} labels ({shown(names)}), but the model's head has "
            f"{len(head)} ({shown(head)}); give data of these labels, or a model without a head."
        )
    numbers = tuple(str(index) for index in range(len(head)))
    if names == numbers:
        return head, names
    if given and all(index is None for index in indices):
        unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(head))
        return (names, ()) if unnamed else (head, names)
    raise DataError(
        f"the data's labels ({shown(names)}) are not those of the model's head ({shown(head)}); "
        "set data.labels to the data's labels in the order of the outputs, or give a model "
        "without a head."
    )


def spellings_of(
    present: set[str], names: tuple[str, ...], section: DataSection
) -> tuple[str, ...]:
    """Returns how data spell the outputs of a trained model; empty where by their names.

    Args:
        present: The labels in the data.
        names: The names of the outputs in their order.
        section: How the data are read.
    """
    known: list[Sequence[str]] = [names]
    if section.labels is not None and len(section.labels) == len(names):
        known.append(section.labels)
    known.append([str(index) for index in range(len(names))])
    folded = {name.casefold(): name for name in names}
    spelled = {folded.get(label.casefold()): label for label in present}
    if None not in spelled and len(spelled) == len(present) and len(folded) == len(names):
        known.append([spelled.get(name, name) for name in names])
    # The first spelling that covers the data; encode() names the label that none of them covers.
    spelling = next((tuple(s) for s in known if present <= set(s)), names)
    return () if spelling == names else spelling


def label_ids(labels: Iterable[str], spellings: tuple[str, ...], source: str) -> list[int]:
    """Returns the output of every label.

    Args:
        labels: The labels as the data write them.
        spellings: How the data write the outputs, in their order.
        source: Where the labels are from.

    Raises:
        DataError: If a label is not one of the outputs.
    """
    ids = {name: index for index, name in enumerate(spellings)}
    found = []
    for label in labels:
        if label not in ids:
            raise DataError(
                f"the label {label!r} of {source!r} is not one of the task "
                f"({shown(spellings)}); correct it or remove its examples."
            )
        found.append(ids[str(label)])
    return found


def class_settings(label_names: tuple[str, ...]) -> dict[str, Any]:
    """Returns the settings of a Hugging Face configuration that name outputs.

    Args:
        label_names: The names in the order of the outputs.
    """
    return {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
    }


def head_names(model_config: Any) -> tuple[str, ...]:
    """Returns the names of a head's outputs in their order.

    Args:
        model_config: A Hugging Face configuration.
    """
    id2label = {int(index): str(name) for index, name in model_config.id2label.items()}
    return tuple(id2label[index] for index in sorted(id2label))


def unlabelled_names(head: tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the outputs of a task without labels: the teacher's.

    Args:
        head: The names of the head's outputs; None without a head.

    Raises:
        DataError: There is no head, or it has one output.
    """
    if head is None:
        raise no_teacher()
    if len(head) < 2:
        raise DataError(
            f"data.label is null, but the teacher's head has the one output {shown(head)!r}; give "
            "a teacher of at least two classes, or labelled data."
        )
    return head


def no_teacher() -> DataError:
    """Returns the error about data without labels and a model without a head."""
    return DataError(
        "data.label is null, so that no teacher can be fine-tuned, and the model has no head for "
        "the task; name a fine-tuned model as model.teacher."
    )


def _ordered(labels: set[str]) -> tuple[str, ...]:
    """Returns the labels sorted, whole numbers by their value."""
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _labels(labels: tuple[str, ...]) -> str:
    return f"the label {labels[0]!r}" + (f" (and {len(labels) - 1} more)" if labels[1:] else "")


def shown(labels: Sequence[str]) -> str:
    """Returns labels in a line, ten at most."""
    text = ", ".join(labels[:10])
    return text + (f", ... {len(labels)} in all" if len(labels) > 10 else "")
