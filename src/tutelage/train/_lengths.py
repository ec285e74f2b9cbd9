"""Batches of examples of about equal length, which pad little."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

__all__ = ["LengthSampler", "lengths_of"]

_BATCHES = 16


def lengths_of(dataset: object) -> list[int] | None:
    """Returns the number of tokens of every example; ``None`` where examples have no tokens.

    Args:
        dataset: Examples by position, mappings with ``input_ids``.
    """
    count = len(dataset)  # type: ignore[arg-type]
    examples = (dataset[i] for i in range(count))  # type: ignore[index]
    found = []
    for example in examples:
        if "input_ids" not in example:
            return None
        found.append(len(example["input_ids"]))
    return found


class LengthSampler(Sampler[int]):
    """Draws examples in random order, sorted by length within every sixteen batches.

    The batches of sixteen then come in random order. The order follows from (seed, epoch) alone,
    so that a resumed training goes on with the batches it would have seen.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        """Keeps the lengths.

        Args:
            lengths: Of every example, in tokens.
            batch_size: Examples of an optimizer step.
            seed: Seed of the order.
        """
        self._lengths, self._batch, self._seed = list(lengths), batch_size, seed
        self._epoch = 0

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch.

        Args:
            epoch: Its number, from 0.
        """
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Yields positions; a last batch that is not full comes last."""
        generator = torch.Generator().manual_seed(self._seed + 1_000_003 * self._epoch)
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        full = len(order) - len(order) % self._batch
        whole = self._batch * _BATCHES
        for start in range(0, full, whole):
            part = sorted(order[start : min(start + whole, full)], key=self._lengths.__getitem__)
            batches = [part[i : i + self._batch] for i in range(0, len(part), self._batch)]
            for index in torch.randperm(len(batches), generator=generator).tolist():
                yield from batches[index]
        yield from order[full:]
