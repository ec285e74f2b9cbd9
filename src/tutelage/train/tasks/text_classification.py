"""Text tasks: what the labels are, how examples become token ids, what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from ...errors import DataError
from .._processors import position_limit
from .._sections import DataSection
from ..data import Examples, read_examples
from ..metrics import METRICS, evaluate_metrics
from ._dataset import EncodedDataset, predict_rows
from ._labels import (
    class_labels,
    class_settings,
    head_names,
    label_ids,
    spellings_of,
    unlabelled_names,
)
from ._prediction import Prediction, likeliest
from ._task import AGREEMENT, Array, Head, stacked
from ._text import TokenInputs

__all__ = ["TextTask", "build_task", "has_head"]


@dataclass(frozen=True)
class TextTask(TokenInputs):
    """Classes or numbers for texts, or for pairs of texts.

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

    reader = staticmethod(read_examples)
    head: ClassVar[Head] = Head(
        suffixes=("ForSequenceClassification",),
        auto="AutoModelForSequenceClassification",
        name="sequence classification head",
        model="sequence classifier",
        example="a text encoder such as BERT",
        short="classification head",
    )

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

    @property
    def model_settings(self) -> dict[str, Any]:
        """Number, names and problem type of the outputs."""
        settings: dict[str, Any] = {"problem_type": self.problem_type, "num_labels": 1}
        return settings | (class_settings(self.label_names) if self.label_names else {})

    @classmethod
    def build(
        cls, train: Examples, section: DataSection, eval: Examples, model_config: Any = None
    ) -> TextTask:
        """Makes the task of a recipe, see ``build_task``."""
        return build_task(train, section, eval, model_config)

    @classmethod
    def of_model(cls, model: nn.Module, section: DataSection, examples: Examples) -> TextTask:
        """Makes the task of a trained model; data may spell its labels in several ways."""
        names = output_names(model)
        if section.task.endswith("regression") != (not names):
            kind = f"{len(names)} classes ({', '.join(names[:10])})" if names else "a regression"
            raise DataError(
                f"the model is of {kind}, but the task is {section.task!r}; correct it with --task."
            )
        if not names:
            return cls(section.task, (), section.metric or "correlation")
        if examples.labels is None:
            return cls(section.task, names, AGREEMENT)
        spellings = spellings_of({str(label) for label in examples.labels}, names, section)
        return cls(section.task, names, section.metric or "accuracy", spellings)

    def encode(self, examples: Examples, processor: Any, max_length: int) -> EncodedDataset:
        """Tokenizes examples, without padding.

        Args:
            examples: The examples.
            processor: A Hugging Face tokenizer.
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
        labels: list[Any] | None = None
        if examples.labels is not None and self.label_names:
            given = [str(label) for label in examples.labels]
            labels = label_ids(given, self.spellings or self.label_names, examples.source)
        elif examples.labels is not None:
            labels = [float(label) for label in examples.labels]
        limit = min(max_length, getattr(processor, "model_max_length", max_length))
        columns = processor(
            examples.texts, examples.pairs, truncation=True, max_length=limit, padding=False
        )
        return EncodedDataset(dict(columns), labels)

    @classmethod
    def predict(
        cls,
        model: nn.Module,
        processor: Any,
        inputs: Sequence[str],
        pairs: Sequence[str] | None = None,
        max_length: int | None = None,
        section: DataSection | None = None,
    ) -> list[Prediction]:
        """Returns the likeliest class, or the number, of every text."""
        names = output_names(model)
        kind = "classification" if pairs is None else "pair"
        task = cls(kind, names, AGREEMENT)
        second = None if pairs is None else list(pairs)
        examples = Examples(list(inputs), second, None, "the texts")
        limit, positions = max_length or processor.model_max_length, position_limit(model)
        data = task.encode(examples, processor, min(limit, positions or limit))
        logits = stacked(predict_rows(model, data, task.collator(processor)))
        if not names:
            return [Prediction(None, None, float(row[0])) for row in logits]
        return likeliest(logits, names)

    def metrics(self, reduced: Sequence[Array], data: EncodedDataset) -> dict[str, float]:
        """Computes the metrics of classes, or of numbers."""
        return evaluate_metrics(self.kind, stacked(reduced), np.asarray(data.labels))


def has_head(model_config: Any) -> bool:
    """Returns whether a configuration is of a model saved with a sequence classification head.

    Args:
        model_config: A Hugging Face configuration, or None.

    Returns:
        True if its architectures name such a head.
    """
    return TextTask.head.on(model_config)


def output_names(model: Any) -> tuple[str, ...]:
    """Returns the labels of a model in the order of its outputs, none for a regression.

    Args:
        model: A sequence classifier.
    """
    config = model.config
    if config.problem_type == "regression" or config.num_labels == 1:
        return ()
    return tuple(str(config.id2label[index]) for index in range(config.num_labels))


def build_task(
    train: Examples, section: DataSection, eval: Examples, model_config: Any = None
) -> TextTask:
    """Finds the labels and the headline metric of a task, and checks that data and model fit.

    The labels are those of `section.labels`; else those of the model's head, if it has one and
    the data use its names (in any case) or the numbers 0 to k - 1; else those of the training
    data, sorted. With `section.labels` a head may have other names; the order then decides. For
    data without labels they are those of the head.

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
    head = head_names(model_config) if has_head(model_config) else None
    if section.task.endswith("regression"):
        if head is not None and len(head) != 1:
            raise DataError(
                f"the model's head has {len(head)} outputs, but a regression needs 1; give a model "
                "without a head, or set data.task=classification."
            )
        return TextTask(section.task, (), section.metric or "correlation")
    if train.labels is None or eval.labels is None:
        return TextTask(section.task, unlabelled_names(head), AGREEMENT)
    names, spellings = class_labels(
        map(str, train.labels), map(str, eval.labels), section, (train.source, eval.source), head
    )
    return TextTask(section.task, names, class_metric(section, names), spellings)


def class_metric(section: DataSection, names: tuple[str, ...]) -> str:
    """Returns the headline metric of a task of classes.

    Args:
        section: The recipe's data section.
        names: The classes.

    Raises:
        DataError: It is defined for two classes only and there are more.
    """
    metric = section.metric or "accuracy"
    if METRICS[metric].binary_only and len(names) != 2:
        raise DataError(
            f"the metric {metric!r} is for two classes and the data have {len(names)}; set "
            "data.metric=macro_f1."
        )
    return metric
