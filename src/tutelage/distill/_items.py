"""What there is to count in a batch, before the student has seen it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast

from torch import Tensor, nn

from ..errors import DataError, UnsupportedModelError
from ..sites import SiteMap
from ._context import BatchItems, is_per_sample
from ._teacher import TeacherSource

__all__ = ["ItemReader", "ModelInputs", "read_inputs", "refuse_other_items", "token_mask"]

_Positions = Literal["samples", "tokens", "answers"]
_TEXT = ("attention_mask", "input_ids", "inputs_embeds")


class ModelInputs(NamedTuple):
    """A batch as a model takes it, and what belongs to it.

    Attributes:
        inputs: Keyword arguments of the model.
        labels: The batch's labels.
        token_mask: Real tokens of the input, (batch, tokens); ``None`` where all are real.
        decoder_mask: The same of a decoder beside an encoder.
        token_ids: Tokens that predictions per token follow; ``None`` where there are none.
    """

    inputs: dict[str, Any]
    labels: Tensor | None
    token_mask: Tensor | None
    decoder_mask: Tensor | None
    token_ids: Tensor | None


def read_inputs(batch: Mapping[str, Any], model: nn.Module) -> ModelInputs:
    """Takes a batch apart.

    An encoder-decoder model that is given labels per token and no ``decoder_input_ids`` gets those
    that the labels say: without the labels themselves it could not make them.

    Args:
        batch: What a data loader gave, without sample ids.
        model: The student.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels", None)
    decoder_mask = _mask(inputs.get("decoder_attention_mask"))
    if _takes_use_cache(cast("Any", type(model))):
        # Keys and values for later tokens take memory, and making room for them copies from the
        # host, which no CUDA graph can hold.
        inputs.setdefault("use_cache", False)
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        make = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if isinstance(labels, Tensor) and labels.dim() == 2 and callable(make):
            inputs["decoder_input_ids"] = make(labels=labels)
            if decoder_mask is None:
                decoder_mask = labels != -100
    ids = inputs.get("decoder_input_ids", inputs.get("input_ids"))
    return ModelInputs(inputs, labels, token_mask(inputs), decoder_mask, ids)


@functools.cache
def _takes_use_cache(kind: type[nn.Module]) -> bool:
    return "use_cache" in inspect.signature(kind.forward).parameters


class ItemReader:
    """Says what a batch holds from its shapes and masks.

    Whether a model predicts per sample, per token, or start and end of an answer is asked of the
    teacher once, with the first batch of a kind.
    """

    def __init__(self, teacher: TeacherSource, sites: SiteMap) -> None:
        """Keeps the teacher.

        Args:
            teacher: Predicts in the student's shape.
            sites: The student's sites.
        """
        self._teacher, self._sites = teacher, sites
        self._kinds: dict[tuple[str, ...], _Positions] = {}

    def __call__(
        self, given: ModelInputs, keys: Tensor | None, labels: Tensor | None
    ) -> BatchItems:
        """Returns what a batch holds.

        Args:
            given: The batch.
            keys: Sample ids where the batch carries them.
            labels: Labels where a loss term asked for them.

        Raises:
            DataError: The batch holds no tensor.
            UnsupportedModelError: The predictions are neither per sample nor per token.
        """
        tensors = {name: v for name, v in given.inputs.items() if isinstance(v, Tensor)}
        if not tensors:
            raise DataError("a batch holds no tensor; pass the model's inputs as tensors.")
        first = next((tensors[n] for n in _TEXT if n in tensors), next(iter(tensors.values())))
        tokens = tensors.get("decoder_input_ids", first)
        rows = first.shape[0]
        kind = tuple(sorted(tensors))
        if kind not in self._kinds:
            expected = (rows, tokens.shape[1]) if tokens.dim() > 1 else (rows,)
            self._kinds[kind] = self._ask(given.inputs, keys, expected)
        found = self._kinds[kind]
        positions = {"samples": (rows,), "answers": (rows, 2)}
        return BatchItems(
            rows=rows,
            positions=(rows, tokens.shape[1]) if found == "tokens" else positions[found],
            token_mask=given.token_mask,
            prediction_mask=given.token_mask if given.decoder_mask is None else given.decoder_mask,
            labels=labels,
            per_sample=is_per_sample(self._sites, given.token_mask),
            causal=self._sites.causal,
        )

    def _ask(
        self, inputs: Mapping[str, Any], keys: Tensor | None, expected: tuple[int, ...]
    ) -> _Positions:
        values, _ = self._teacher.get(inputs, keys, ())
        positions = tuple(values.shape[:-1])
        if tuple(values.shape) == (expected[0], 2, *expected[1:]) and len(expected) == 2:
            return "answers"
        if positions not in (expected[:1], expected):
            raise UnsupportedModelError(
                f"the predictions of a batch of {expected[0]} samples have shape "
                f"{tuple(values.shape)}, neither per sample nor per token; train it in one process "
                "and without gradient accumulation."
            )
        return "tokens" if len(positions) == 2 else "samples"


def token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    """Returns the real tokens of a batch, (batch, tokens), ``None`` where all are real.

    Args:
        inputs: Model inputs.
    """
    return _mask(inputs.get("attention_mask"))


def _mask(mask: Any) -> Tensor | None:
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
    if (expected.rows, expected.positions) != (found.rows, found.positions):
        raise DataError(
            f"the model made {found.positions} predictions of a batch that was counted as "
            f"{expected.positions}; train it in one process and without gradient accumulation."
        )
