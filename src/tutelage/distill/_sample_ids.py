"""Ids of samples, by which a stored teacher knows them."""

from __future__ import annotations

from typing import Any

from torch.utils.data import Dataset

from ..errors import DataError

__all__ = ["SAMPLE_IDS", "with_sample_ids"]

SAMPLE_IDS = "tutelage_sample_ids"
"""Reserved key of a batch: ids of its samples, int64 (batch,), for a cached teacher."""


class _WithIds(Dataset[dict[str, Any]]):
    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = dict(self._dataset[index])
        if SAMPLE_IDS in item:
            raise DataError(
                f"sample {index} has an id ({SAMPLE_IDS!r}) already; pass the data bare."
            )
        item[SAMPLE_IDS] = index % len(self)
        return item


def with_sample_ids(dataset: Any) -> Dataset[dict[str, Any]]:
    """Returns a data set whose samples carry their index as id.

    The collator must keep the field: transformers' default and padding collators do.

    Args:
        dataset: A map-style data set of dictionaries.

    Raises:
        DataError: It cannot be indexed.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            f"{type(dataset).__name__} has no length or cannot be indexed, so that its samples "
            "have no ids; use a map-style data set, or the live teacher."
        )
    return _WithIds(dataset)
