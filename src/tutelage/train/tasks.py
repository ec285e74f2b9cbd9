"""Text tasks: what the labels are, how examples become token ids, what is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import Dataset

from ..errors import DataError
from .data import Examples
from .metrics import METRICS
from .recipe import DataSection

__all__ = ["EncodedDataset", "TextTask", "build_task", "has_head"]


class EncodedDataset(Dataset[dict[str, Any]]):
    """Tokenized examples without padding; the collator pads each batch.

    Args:
        columns: What the tokenizer gave: key to one list of integers per example.
        labels: One class index (int) or real number (float) per example.

    Raises:
        DataError: If a column has another length than the labels.
    """

    def __init__(self, columns: dict[str, list[list[int]]], labels: list[int] | list[float]):
        for name, column in columns.items():
            if len(column) != len(labels):
                raise DataError(
                    f"the column {name!r} has {len(column)} rows for {len(labels)} labels; use a "
                    "tokenizer that gives one row per text."
                )
        self.columns = columns
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {name: column[index] for name, column in self.columns.items()}
        item["labels"] = self.labels[index]
        return item


@dataclass(frozen=True)
class TextTask:
    """A text task.

    Attributes:
        kind: ``"classification"``, ``"pair"``, ``"regression"`` or ``"pair_regression"``.
        label_names: The names of the outputs, in their order; empty for a regression.
        metric: The name of the headline metric.
        spellings: The labels as the data write them, in the order of `label_names`, where the
            two differ (data with 0 and 1, outputs named NEGATIVE and POSITIVE); else empty.
    """

    kind: str
    label_names: tuple[str, ...]
    metric: str
    spellings: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        """The number of outputs: 1 for a regression."""
        return len(self.label_names) or 1

    @property
    def problem_type(self) -> Literal["regression", "single_label_classification"]:
        """The problem type of a Hugging Face configuration."""
        return "single_label_classification" if self.label_names else "regression"

    @property
    def id2label(self) -> dict[int, str]:
        """Output index to name, for a Hugging Face configuration; empty for a regression."""
        return dict(enumerate(self.label_names))

    def encode(self, examples: Examples, tokenizer: Any, max_length: int) -> EncodedDataset:
        """Tokenizes examples, without padding.

        Args:
            examples: The examples.
            tokenizer: A Hugging Face tokenizer.
            max_length: Tokens after which a text (or pair) is cut; a smaller limit of the
                tokenizer holds.

        Returns:
            A dataset of the tokenizer's keys and "labels" (int, or float for a regression).

        Raises:
            DataError: If a label is not one of the task, or the second texts do not fit the task.
        """
        paired = self.kind.startswith("pair")
        if paired != (examples.pairs is not None):
            wanted = "a second text per example" if paired else "no second text"
            raise DataError(
                f"the task {self.kind!r} needs {wanted}, unlike {examples.source!r}; "
                "correct data.text_pair."
            )
        labels: list[Any]
        if self.label_names:
            ids = {name: index for index, name in enumerate(self.spellings or self.label_names)}
            unknown = [label for label in examples.labels if label not in ids]
            if unknown:
                raise DataError(
                    f"the label {unknown[0]!r} of {examples.source!r} is not one of the task "
                    f"({_names(tuple(ids))}); correct it or remove its examples."
                )
            labels = [ids[str(label)] for label in examples.labels]
        else:
            labels = [float(label) for label in examples.labels]
        limit = min(max_length, getattr(tokenizer, "model_max_length", max_length))
        columns = tokenizer(
            examples.texts, examples.pairs, truncation=True, max_length=limit, padding=False
        )
        return EncodedDataset(dict(columns), labels)


def has_head(model_config: Any) -> bool:
    """Returns whether a configuration is of a model saved with a sequence classification head.

    Args:
        model_config: A Hugging Face configuration, or None.

    Returns:
        True if its architectures name such a head.
    """
    names = getattr(model_config, "architectures", None) or ()
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def build_task(
    train: Examples, section: DataSection, eval: Examples, model_config: Any = None
) -> TextTask:
    """Finds the labels and the headline metric of a task, and checks that data and model fit.

    The labels are those of `section.labels`; else those of the model's head, if it has one and
    the data use its names (in any case) or the numbers 0 to k - 1; else those of the training
    data, sorted. With `section.labels` a head may have other names; the order then decides.

    Args:
        train: The training examples.
        section: The recipe's data section.
        eval: The evaluation examples.
        model_config: The Hugging Face configuration of the model or teacher, or None. A head
            counts only if the configuration's `architectures` names it, see `has_head`.

    Returns:
        The task.

    Raises:
        DataError: If the training data have one class only, the evaluation data a class that
            training lacks, or the labels do not fit the model's head.
    """
    for examples in (train, eval):
        if not len(examples):
            raise DataError(f"{examples.source!r} holds no examples; give data that do.")
    head = _head_names(model_config) if has_head(model_config) else None
    if section.task.endswith("regression"):
        if head is not None and len(head) != 1:
            raise DataError(
                f"the model's head has {len(head)} outputs, but a regression needs 1; give a model "
                "without a head, or set data.task=classification."
            )
        return TextTask(section.task, (), section.metric or "correlation")
    present = {str(label) for label in train.labels}
    if len(present) < 2:
        raise DataError(
            f"the training data {train.source!r} hold the label {present.pop()!r} only; give "
            "examples of at least two classes."
        )
    lacking = _ordered({str(label) for label in eval.labels} - present)
    if lacking:
        raise DataError(
            f"the evaluation data {eval.source!r} hold {_labels(lacking)}, which the training data "
            f"lack (they hold {_names(_ordered(present))}); add training examples, or remove these."
        )
    if section.labels is not None:
        names = tuple(section.labels)
        unlisted = _ordered(present - set(names))
        if unlisted:
            raise DataError(
                f"{train.source!r} holds {_labels(unlisted)}, which data.labels "
                f"({_names(names)}) lacks; add it there, or remove its examples."
            )
    else:
        names = _ordered(present)
    spellings: tuple[str, ...] = ()
    if head is not None:
        names, spellings = _fit(names, head, given=section.labels is not None)
    metric = section.metric or "accuracy"
    if METRICS[metric].binary_only and len(names) != 2:
        raise DataError(
            f"the metric {metric!r} is for two classes and the data have {len(names)}; set "
            "data.metric=macro_f1."
        )
    return TextTask(section.task, names, metric, spellings)


def _fit(
    names: tuple[str, ...], head: tuple[str, ...], *, given: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns the head's names and, where the data spell them otherwise, the data's."""
    folded = {name.casefold(): index for index, name in enumerate(head)}
    indices = [folded.get(name.casefold()) for name in names]
    if len(folded) == len(head) and None not in indices and len(set(indices)) == len(names):
        if given and len(names) == len(head) and indices != list(range(len(head))):
            raise DataError(
                f"data.labels ({_names(names)}) are in another order than the outputs of the "
                f"model's head ({_names(head)}); write them in that order."
            )
        spelled = {index: name for index, name in zip(indices, names, strict=True)}
        spellings = tuple(spelled.get(index, name) for index, name in enumerate(head))
        return head, () if spellings == head else spellings
    if len(names) != len(head):
        raise DataError(
            f"the data have {len(names)} labels ({_names(names)}), but the model's head has "
            f"{len(head)} ({_names(head)}); give data of these labels, or a model without a head."
        )
    numbers = tuple(str(index) for index in range(len(head)))
    if names == numbers:
        return head, names
    if given and all(index is None for index in indices):
        unnamed = all(name == f"LABEL_{index}" for index, name in enumerate(head))
        return (names, ()) if unnamed else (head, names)
    raise DataError(
        f"the data's labels ({_names(names)}) are not those of the model's head ({_names(head)}); "
        "set data.labels to the data's labels in the order of the outputs, or give a model "
        "without a head."
    )


def _head_names(model_config: Any) -> tuple[str, ...]:
    id2label = {int(index): str(name) for index, name in model_config.id2label.items()}
    return tuple(id2label[index] for index in sorted(id2label))


def _ordered(labels: set[str]) -> tuple[str, ...]:
    """Returns the labels sorted, whole numbers by their value."""
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def _labels(labels: tuple[str, ...]) -> str:
    return f"the label {labels[0]!r}" + (f" (and {len(labels) - 1} more)" if labels[1:] else "")


def _names(labels: tuple[str, ...]) -> str:
    shown = ", ".join(labels[:10])
    return shown + (f", ... {len(labels)} in all" if len(labels) > 10 else "")
