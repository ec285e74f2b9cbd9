"""What is fed to the engines: batches of one length, and a sample their outputs are compared on."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BenchError
from ..sites._inputs import synthesize_inputs

__all__ = ["Case", "Inputs", "default_cases", "make_inputs", "parse_cases", "sample"]

Inputs = dict[str, np.ndarray]
"""Arrays by the name of a model's argument."""

_LENGTHS = (32, 128)
_BATCHES = (1, 32)
_FIRST_WORD = 3
"""Token ids below it are often padding and other special ones."""


@dataclass(frozen=True)
class Case:
    """A size of batch.

    Attributes:
        batch: Examples.
        tokens: Tokens of each, ``None`` for models of images or speech.
    """

    batch: int
    tokens: int | None = None

    @property
    def label(self) -> str:
        """As written in ``--cases``: ``"32x128"``, or ``"32"``."""
        return str(self.batch) if self.tokens is None else f"{self.batch}x{self.tokens}"


def _takes_text(model: nn.Module) -> bool:
    return getattr(model, "main_input_name", "input_ids") == "input_ids"


def _longest(model: nn.Module) -> int | None:
    from ..train._processors import position_limit

    return position_limit(model) if _takes_text(model) else None


def default_cases(model: nn.Module) -> tuple[Case, ...]:
    """Returns batch 1 of 32 tokens and 32 of 128, or what the model has positions for.

    Args:
        model: A transformers model.
    """
    if not _takes_text(model):
        return tuple(Case(batch) for batch in _BATCHES)
    longest = _longest(model) or max(_LENGTHS)
    return tuple(
        Case(batch, min(length, longest)) for batch, length in zip(_BATCHES, _LENGTHS, strict=True)
    )


def parse_cases(text: str, model: nn.Module) -> tuple[Case, ...]:
    """Reads sizes such as ``"1x32,32x128"``, or ``"1,32"`` for images.

    Args:
        text: Sizes, separated by commas.
        model: The model they are for.

    Raises:
        BenchError: They are malformed, or do not fit the model.
    """
    textual, longest = _takes_text(model), _longest(model)
    form, example = (r"(\d+)x(\d+)", "1x32,32x128") if textual else (r"(\d+)()", "1,32")
    cases = []
    for part in text.split(","):
        match = re.fullmatch(form, part.strip())
        numbers = [int(n) for n in match.groups() if n] if match else [0]
        if not all(numbers):
            raise BenchError(f"{part.strip()!r} is no size of a batch; write --cases {example}.")
        case = Case(*numbers)
        if longest is not None and case.tokens is not None and case.tokens > longest:
            raise BenchError(
                f"{case.label}: {type(model).__name__} has positions for {longest} tokens; give "
                "fewer in --cases."
            )
        cases.append(case)
    return tuple(dict.fromkeys(cases))


def make_inputs(model: nn.Module, case: Case, *, seed: int = 0) -> Inputs:
    """Makes a batch without padding; the global random state stays as it is.

    Args:
        model: A transformers model.
        case: How large.
        seed: Other numbers give other inputs.

    Raises:
        UnsupportedModelError: The model takes something else than text, images or speech.
    """
    made = torch.Generator().manual_seed(seed)
    vocabulary = cast("Any", model).config.get_text_config().vocab_size if _takes_text(model) else 0
    inputs: Inputs = {}
    for name, one in synthesize_inputs(model).items():
        if one.is_floating_point():
            tensor: Tensor = torch.randn((case.batch, *one.shape[1:]), generator=made)
        elif name == "input_ids":
            low = min(_FIRST_WORD, vocabulary - 1)
            shape = (case.batch, case.tokens or one.shape[1])
            tensor = torch.randint(low, vocabulary, shape, generator=made)
        elif name == "attention_mask":
            tensor = torch.ones(case.batch, case.tokens or one.shape[1], dtype=torch.long)
        else:
            tensor = one.expand(case.batch, *one.shape[1:]).contiguous()
        if name != "attention_mask" or name in inspect.signature(model.forward).parameters:
            inputs[name] = tensor.numpy()
    return inputs


def sample(model: nn.Module, cases: tuple[Case, ...]) -> Inputs:
    """Makes four examples, the second one padded at its end, to compare engines on.

    Args:
        model: A transformers model.
        cases: What is measured; the sample is no longer than the longest of them.
    """
    longest = max(case.tokens or 0 for case in cases)
    inputs = make_inputs(model, Case(4, min(longest, 16) or None), seed=1)
    if "attention_mask" in inputs and longest > 1:
        inputs["attention_mask"][1, (inputs["attention_mask"].shape[1] + 1) // 2 :] = 0
    return inputs
