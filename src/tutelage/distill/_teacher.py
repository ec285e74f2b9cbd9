"""Where the teacher's signals come from."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..errors import IncompatibleTeacherError, UnsupportedModelError
from ..nn import use_attention
from ..sites import Signals, Site, SiteMap, Tap, discover
from ._fit import refuse_compiled

__all__ = ["LiveTeacher", "Prediction", "TeacherSource", "prediction"]


@runtime_checkable
class TeacherSource(Protocol):
    """Gives the teacher's logits and signals for a batch."""

    @property
    def sites(self) -> SiteMap:
        """The teacher's sites."""
        ...

    def get(
        self, batch: Mapping[str, Any], keys: Tensor | None, want: Collection[Site]
    ) -> tuple[Tensor, Signals]:
        """Returns logits and the signals at ``want``.

        Args:
            batch: Model inputs.
            keys: Sample ids where the batch carries them.
            want: Sites that the losses and the stage of this step need.
        """
        ...


class Prediction(NamedTuple):
    """What a model predicts.

    Attributes:
        values: Logits (*positions, classes); start and end logits of an answer, (batch, 2, tokens);
            or the last hidden state (batch, tokens, width).
        has_logits: Whether they are logits.
    """

    values: Tensor
    has_logits: bool


def prediction(output: Any) -> Prediction:
    """Returns the logits of a model output, or its last hidden state where there are none.

    Start and end logits of an answer, each over the tokens, are stacked.

    Args:
        output: What a transformers model returned.

    Raises:
        UnsupportedModelError: It has neither.
    """
    spans = getattr(output, "start_logits", None), getattr(output, "end_logits", None)
    if isinstance(spans[0], Tensor) and isinstance(spans[1], Tensor):
        return Prediction(torch.stack((spans[0], spans[1]), dim=1), True)
    for name in ("logits", "last_hidden_state"):
        value = getattr(output, name, None)
        if isinstance(value, Tensor):
            return Prediction(value, name == "logits")
    raise UnsupportedModelError(
        f"the model returned {type(output).__name__}, which has neither logits nor "
        "last_hidden_state; wrap the model so that it returns one of them."
    )


_INSIDE_ATTENTION = ("attention_scores", "attention_map")


class LiveTeacher:
    """Runs the full-precision model on every batch, in eval mode and without gradient.

    Where neither a loss nor the stage asks for attention scores or maps, attention is one fused
    operation.

    Attributes:
        model: The model.
        dtype: What its products are computed in.
        captured: A CUDA graph of the step holds the teacher's forward pass.
    """

    captured = True

    def __init__(self, model: nn.Module, *, dtype: torch.dtype = torch.float32) -> None:
        """Freezes the model and finds its sites.

        Args:
            model: A full-precision transformers model; set to eval mode, gradients switched off.
            dtype: ``torch.bfloat16`` runs it under autocast, which is faster where the hardware
                multiplies bfloat16, and rounds what the student is taught (docs/training.md has
                what that changes). Softmax, normalisation and the residual stream stay float32.

        Raises:
            IncompatibleTeacherError: The model is quantized.
            UnsupportedModelError: ``dtype`` is neither float32 nor bfloat16, or the model is what
                ``torch.compile`` returned.
        """
        from .._prepare import prepared

        refuse_compiled(model, "pass the model itself; model.compile() is fine")
        if prepared(model) is not None:
            raise IncompatibleTeacherError(
                "the teacher is a prepared student; pass the full-precision model."
            )
        if dtype not in (torch.float32, torch.bfloat16):
            raise UnsupportedModelError(
                f"a teacher cannot run in {dtype}; use torch.float32 or torch.bfloat16."
            )
        self.dtype = dtype
        self.model = model.eval().requires_grad_(False)
        self._sites = discover(model)

    @property
    def sites(self) -> SiteMap:
        """The teacher's sites."""
        return self._sites

    def get(
        self, batch: Mapping[str, Any], keys: Tensor | None, want: Collection[Site]
    ) -> tuple[Tensor, Signals]:
        """Runs the teacher once and returns logits and signals.

        Args:
            batch: Model inputs.
            keys: Not used.
            want: Sites to record.
        """
        self.model.eval()
        device = next(self.model.parameters()).device.type
        half = self.dtype == torch.bfloat16
        with (
            torch.no_grad(),
            torch.autocast(device, self.dtype) if half else contextlib.nullcontext(),
            use_attention(self.model, fused=not set(want).intersection(_INSIDE_ATTENTION)),
            Tap(self.model, self._sites, want) as tap,
        ):
            output = self.model(**batch)
        return prediction(output).values, tap.signals()
