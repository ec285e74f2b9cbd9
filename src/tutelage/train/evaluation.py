"""Packed models at work: outputs for a data set, metrics of a folder, labels of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ..errors import ArtefactError, DataError, RecipeError
from ..export import load, weight_bytes
from ._models import encode_for, load_tokenizer, position_limit
from ._sections import DataSection
from .data import Examples, read_examples, read_train_and_eval
from .metrics import evaluate_metrics
from .tasks import EncodedDataset, TextTask

__all__ = ["Evaluation", "Prediction", "evaluate_folder", "predict_logits", "predict_texts"]

_BATCH = 64


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a packed model.

    Attributes:
        source: Where the examples are from.
        examples: How many there are.
        task: Kind of the task.
        metric: Name of the headline metric.
        metrics: Every metric that fits, by name.
        bytes: Size of the weights on disk.
    """

    source: str
    examples: int
    task: str
    metric: str
    metrics: dict[str, float]
    bytes: int


@dataclass(frozen=True)
class Prediction:
    """What a packed model says about one text.

    Attributes:
        label: Name of the likeliest class; ``None`` for a regression.
        probability: Its probability; ``None`` for a regression.
        value: The output of a regression; ``None`` for classes.
    """

    label: str | None
    probability: float | None
    value: float | None


def predict_logits(
    model: nn.Module, data: EncodedDataset, tokenizer: Any, batch_size: int = _BATCH
) -> npt.NDArray[np.float32]:
    """Runs a model over examples in batches of like length.

    Args:
        model: A classifier in eval mode.
        data: The examples.
        tokenizer: Pads each batch to its longest text.
        batch_size: Examples per batch.

    Returns:
        (examples, classes), in the order of the data.
    """
    from transformers import DataCollatorWithPadding

    collate = DataCollatorWithPadding(tokenizer)
    device = next(model.parameters()).device
    order = sorted(range(len(data)), key=lambda row: len(data.columns["input_ids"][row]))
    logits: dict[int, npt.NDArray[np.float32]] = {}
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = collate([data[row] for row in rows])
            batch.pop("labels")
            output = model(**{key: value.to(device) for key, value in batch.items()}).logits
            logits.update(zip(rows, output.float().cpu().numpy(), strict=True))
    return np.stack([logits[row] for row in range(len(data))])


def evaluate_folder(
    folder: str | Path, section: DataSection, data: str | None = None
) -> Evaluation:
    """Evaluates a packed model.

    Args:
        folder: Written by a run or ``tutelage.save``.
        section: Where the examples are and how they are read.
        data: Examples in place of the section's evaluation data, read in the same way.

    Raises:
        TutelageError: The folder is no packed model, or the data do not fit it.
    """
    folder = Path(folder)
    model = load(folder)
    if data is None and section.eval_split is None:
        data = section.eval
    if data is not None:
        examples = read_examples(data, section, split="eval")
    else:
        examples = read_train_and_eval(section)[1]
    task = _task_of(model, section, examples)
    tokenizer = _tokenizer_of(folder)
    encoded = encode_for(model, task, examples, tokenizer, _limit(model, section.max_length))
    logits = predict_logits(model, encoded, tokenizer)
    metrics = evaluate_metrics(task.kind, logits, np.asarray(encoded.labels))
    if task.metric not in metrics:
        raise DataError(
            f"the metric {task.metric!r} does not fit this model; use one of {', '.join(metrics)}."
        )
    return Evaluation(
        source=examples.source,
        examples=len(examples),
        task=task.kind,
        metric=task.metric,
        metrics=metrics,
        bytes=weight_bytes(folder),
    )


def predict_texts(
    folder: str | Path,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    max_length: int | None = None,
) -> list[Prediction]:
    """Says what a packed model makes of texts.

    Args:
        folder: Written by a run or ``tutelage.save``.
        texts: The texts.
        pairs: The second text of each, for a model of pairs.
        max_length: Tokens after which a text is cut; by default as many as the model allows.

    Raises:
        TutelageError: The folder is no packed model, or the texts do not fit.
    """
    if not texts:
        raise DataError("there is no text; give at least one.")
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(
            f"there are {len(texts)} texts and {len(pairs)} second texts; give one for each text."
        )
    folder = Path(folder)
    model, tokenizer = load(folder), _tokenizer_of(folder)
    kind = "classification" if pairs is None else "pair"
    names = _names(model)
    task = TextTask(kind, names, "accuracy")
    labels: Any = [names[0]] * len(texts) if names else [0.0] * len(texts)
    examples = Examples(list(texts), None if pairs is None else list(pairs), labels, "the texts")
    limit = _limit(model, max_length or tokenizer.model_max_length)
    logits = predict_logits(model, encode_for(model, task, examples, tokenizer, limit), tokenizer)
    if not names:
        return [Prediction(None, None, float(row[0])) for row in logits]
    shares = torch.from_numpy(logits).double().softmax(-1).numpy()
    best = shares.argmax(axis=1)
    return [
        Prediction(names[index], float(row[index]), None)
        for row, index in zip(shares, best, strict=True)
    ]


def _names(model: Any) -> tuple[str, ...]:
    """Returns the labels in the order of the outputs, none for a regression."""
    config = model.config
    if config.problem_type == "regression" or config.num_labels == 1:
        return ()
    return tuple(str(config.id2label[index]) for index in range(config.num_labels))


def _task_of(model: nn.Module, section: DataSection, examples: Examples) -> TextTask:
    names = _names(model)
    if section.task.endswith("regression") != (not names):
        kind = f"{len(names)} classes ({', '.join(names[:10])})" if names else "a regression"
        raise DataError(
            f"the model is of {kind}, but the task is {section.task!r}; correct it with --task."
        )
    if not names:
        return TextTask(section.task, (), section.metric or "correlation")
    present = {str(label) for label in examples.labels}
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
    metric = section.metric or "accuracy"
    return TextTask(section.task, names, metric, () if spelling == names else spelling)


def _limit(model: nn.Module, wanted: int) -> int:
    positions = position_limit(model)
    return wanted if positions is None else min(wanted, positions)


def _tokenizer_of(folder: Path) -> Any:
    try:
        return load_tokenizer(str(folder), "the tokenizer of the folder")
    except RecipeError as error:
        raise ArtefactError(
            f"{folder} holds no usable tokenizer; save the model again with processor=tokenizer."
        ) from error
