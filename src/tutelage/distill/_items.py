"""What there is to count in a batch, before the student has seen it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import DataError, UnsupportedModelError
from ._context import BatchItems
from ._teacher import TeacherSource

__all__ = ["ItemReader", "refuse_other_items", "token_mask"]

_TEXT = ("attention_mask", "input_ids", "inputs_embeds")


class _Layout(NamedTuple):
    """What a forward pass tells about batches of one kind.

    Attributes:
        per_token: Whether there is one prediction per token.
        tokens: Positions of a sample where the batch itself does not say.
    """

    per_token: bool
    tokens: int | None


class ItemReader:
    """Says what a batch holds from its shapes and masks.

    Whether a model predicts per sample or per token is asked of the teacher once, with the first
    batch; so is the number of positions of samples that are no text, such as images.
    """

    def __init__(self, teacher: TeacherSource) -> None:
        """Keeps the teacher.

        Args:
            teacher: Predicts in the student's shape.
        """
        self._teacher = teacher
        self._layouts: dict[tuple[Any, ...], _Layout] = {}

    def __call__(
        self, inputs: Mapping[str, Any], keys: Tensor | None, labels: Tensor | None
    ) -> BatchItems:
        """Returns what a batch holds.

        Args:
            inputs: Model inputs.
            keys: Sample ids where the batch carries them.
            labels: Labels where a loss term asked for them.

        Raises:
            DataError: The batch holds no tensor.
            UnsupportedModelError: The predictions are neither per sample nor per token.
        """
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
        if not tensors:
            raise DataError("a batch holds no tensor; pass the model's inputs as tensors.")
        text = next((tensors[name] for name in _TEXT if name in tensors), None)
        first = next(iter(tensors.values())) if text is None else text
        kind: tuple[Any, ...] = tuple(sorted(tensors))
        if text is None:
            kind += tuple(tuple(tensors[name].shape[1:]) for name in sorted(tensors))
        if kind not in self._layouts:
            self._layouts[kind] = self._ask(inputs, keys, first.shape[0])
        layout = self._layouts[kind]
        rows, tokens = first.shape[0], layout.tokens if text is None else text.shape[1]
        positions = (rows, tokens) if layout.per_token else (rows,)
        return BatchItems(rows, tokens, positions, token_mask(inputs), labels)  # type: ignore[arg-type]

    def _ask(self, inputs: Mapping[str, Any], keys: Tensor | None, rows: int) -> _Layout:
        values, signals = self._teacher.get(inputs, keys, {"block_output"})
        tokens = signals["block_output"][0].shape[1]
        positions = tuple(values.shape[:-1])
        if positions not in ((rows,), (rows, tokens)):
            raise UnsupportedModelError(
                f"the predictions of a batch of {rows} samples of {tokens} tokens have shape "
                f"{tuple(values.shape)}, neither per sample nor per token; train it in one process "
                "and without gradient accumulation."
            )
        return _Layout(len(positions) == 2, tokens)


def token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Returns the real tokens of a batch, (batch, tokens), ``None`` where all are real.

    Args:
        inputs: Model inputs.
    """
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def refuse_other_items(expected: BatchItems, found: BatchItems) -> None:
    """Refuses a forward pass over other items than were counted before it.

    Args:
        expected: What ``ItemReader`` said.
        found: What the forward pass made.

    Raises:
        DataError: They differ.
    """
    # Shapes only: the masks are the batch's own in both.
    if (expected.rows, expected.positions) != (found.rows, found.positions) or (
        found.tokens is not None and expected.tokens != found.tokens
    ):
        raise DataError(
            f"the model made {found.positions} predictions over {found.tokens} positions of a "
            f"batch that was counted as {expected.positions} over {expected.tokens}; train it in "
            "one process and without gradient accumulation."
        )
