"""Examples as a model takes them."""

from __future__ import annotations

import copy
import inspect
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator
from operator import attrgetter
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...errors import DataError

__all__ = [
    "EncodedDataset",
    "TaskDataset",
    "batches",
    "for_model",
    "predict_rows",
]


class TaskDataset(Dataset[dict[str, Any]]):
    """Items of one example each: inputs of a model, and ``labels`` where there are any."""

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of items."""

    def length(self, index: int) -> int:
        """Returns the number of tokens of an item; 0 where all items have one shape.

        Args:
            index: Number of the item.
        """
        return 0

    def only(self, names: Collection[str]) -> Self:
        """Returns the same items with these inputs only.

        Args:
            names: What a model takes.
        """
        return self


class EncodedDataset(TaskDataset):
    """Tokenized examples without padding; the collator pads each batch.

    Args:
        columns: What the tokenizer gave: key to one list of integers per example.
        labels: One class index (int), real number (float) or list of them per example; ``None``
            for data without labels.

    Raises:
        DataError: If a column has another length than the labels.
    """

    def __init__(self, columns: dict[str, list[list[int]]], labels: list[Any] | None):
        count = len(next(iter(columns.values()))) if labels is None else len(labels)
        for name, column in columns.items():
            if len(column) != count:
                raise DataError(
                    f"the column {name!r} has {len(column)} rows for {count} labels; use a "
                    "tokenizer that gives one row per text."
                )
        self.columns = columns
        self.labels = labels
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any] = {name: column[index] for name, column in self.columns.items()}
        if self.labels is not None:
            item["labels"] = self.labels[index]
        return item

    def length(self, index: int) -> int:
        """Returns the number of tokens of an item."""
        return len(self.columns["input_ids"][index])

    def only(self, names: Collection[str]) -> Self:
        """Returns the same items with these columns only."""
        new = copy.copy(self)
        new.columns = {name: column for name, column in self.columns.items() if name in names}
        return new


def for_model(data: TaskDataset, model: nn.Module) -> TaskDataset:
    """Returns the same items with the inputs that a model takes.

    Args:
        data: The items.
        model: The model.
    """
    return data.only(inspect.signature(model.forward).parameters)


def batches(
    data: TaskDataset, collate: Callable[[list[dict[str, Any]]], Any], size: int
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Yields batches of like length, so that little is padded.

    Args:
        data: The examples as inputs.
        collate: Makes a batch of items.
        size: Items per batch.

    Yields:
        The numbers of the items, and the batch.
    """
    order = sorted(range(len(data)), key=data.length)
    for start in range(0, len(order), size):
        rows = order[start : start + size]
        yield rows, dict(collate([data[row] for row in rows]))


def predict_rows(
    model: nn.Module,
    data: TaskDataset,
    collate: Callable[[list[dict[str, Any]]], Any],
    size: int = 64,
    of: Callable[[Any], Tensor] = attrgetter("logits"),
) -> list[npt.NDArray[np.float32]]:
    """Runs a model over items in batches of like length.

    Args:
        model: A model in eval mode.
        data: The items; inputs that the model does not take are left out.
        collate: Makes a batch of items.
        size: Items per batch.
        of: Returns the predictions, (batch, ...), of a model's output.

    Returns:
        The predictions of every item in the order of the data; those of tokens are padded to the
        longest item of their batch.
    """
    device = next(model.parameters()).device
    found: dict[int, npt.NDArray[np.float32]] = {}
    with torch.inference_mode():
        for rows, batch in batches(for_model(data, model), collate, size):
            batch.pop("labels", None)
            output = model(**{key: value.to(device) for key, value in batch.items()})
            found.update(zip(rows, of(output).float().cpu().numpy(), strict=True))
    return [found[row] for row in range(len(data))]
