"""How often the codes of a student's weights change in training, and change back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn
from transformers import TrainerCallback

from ..errors import StudyError
from ..nn import QuantWeight

__all__ = ["LayerFlips", "OscillationWatcher", "watched_layers"]

_FREQUENT = 0.005


@dataclass(frozen=True)
class LayerFlips:
    """Changes of the codes of one layer.

    Attributes:
        layer: Name of the module.
        weights: Number of its weights.
        flipped: For every step, the share of the weights whose code changed in it.
        oscillated: For every step, the share whose code changed against the direction of its last
            change.
        ever: Share of the weights whose code changed at least once.
        moved: Share whose last code is not their first.
        frequency: Mean over the weights of the moving average f of their oscillations.
        frequent: Share of the weights with f above 0.005.
    """

    layer: str
    weights: int
    flipped: tuple[float, ...]
    oscillated: tuple[float, ...]
    ever: float
    moved: float
    frequency: float
    frequent: float

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


@dataclass
class _State:
    first: Int8[Tensor, "rows width"]
    codes: Int8[Tensor, "rows width"]
    direction: Int8[Tensor, "rows width"]
    frequency: Float[Tensor, "rows width"]
    ever: Tensor
    flipped: list[float] = field(default_factory=list)
    oscillated: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, codes: Tensor) -> _State:
        return cls(
            first=codes,
            codes=codes,
            direction=torch.zeros_like(codes),
            frequency=torch.zeros(codes.shape, device=codes.device),
            ever=torch.zeros(codes.shape, dtype=torch.bool, device=codes.device),
        )

    def see(self, codes: Tensor, momentum: float) -> None:
        change = (codes - self.codes).sign()
        changed = change != 0
        back = changed & (self.direction == -change)
        self.frequency.mul_(1.0 - momentum).add_(back, alpha=momentum)
        self.direction = torch.where(changed, change, self.direction)
        self.codes = codes
        self.ever |= changed
        self.flipped.append(float(changed.float().mean()))
        self.oscillated.append(float(back.float().mean()))


def watched_layers(student: nn.Module) -> dict[str, QuantWeight]:
    """Returns the layers whose codes are counted: all that are quantized, but for tables.

    Of the rows of an embedding table only those of a batch's tokens can change.

    Args:
        student: A prepared model.
    """
    return {
        name: module
        for name, module in student.named_modules()
        if isinstance(module, QuantWeight) and not isinstance(module, nn.Embedding)
    }


class OscillationWatcher(TrainerCallback):
    """Counts the changes of codes after every step of a training.

    A weight oscillates in step t, o_t = 1, if its integer code changes in the direction opposite
    to that of its last change; the frequency is ``f_t = m o_t + (1 - m) f_(t-1)`` from f = 0 (Nagel
    et al., arXiv 2203.11086, section 4.1). With m = 0.01 one oscillation keeps f above 0.005 for
    69 steps.

    Attributes:
        momentum: The m of the moving average.
    """

    def __init__(self, momentum: float = 0.01) -> None:
        """Keeps the momentum.

        Args:
            momentum: Above 0, at most 1.

        Raises:
            StudyError: It is out of range.
        """
        if not 0 < momentum <= 1:
            raise StudyError(f"the momentum is {momentum:g}; use a number above 0, at most 1.")
        self.momentum = momentum
        self._states: dict[str, _State] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keeps the first codes."""
        layers = watched_layers(kwargs["model"])
        self._states = {name: _State.of(_codes(layer)) for name, layer in layers.items()}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compares the codes with those of the step before."""
        for name, layer in watched_layers(kwargs["model"]).items():
            self._states[name].see(_codes(layer), self.momentum)

    def layers(self) -> list[LayerFlips]:
        """Returns what was counted, in the order of the layers.

        Raises:
            StudyError: No step was made.
        """
        if not any(found.flipped for found in self._states.values()):
            raise StudyError("no step was watched; pass the watcher to a training first.")
        return [
            LayerFlips(
                layer=name,
                weights=found.codes.numel(),
                flipped=tuple(found.flipped),
                oscillated=tuple(found.oscillated),
                ever=float(found.ever.float().mean()),
                moved=float((found.codes != found.first).float().mean()),
                frequency=float(found.frequency.mean(dtype=torch.float64)),
                frequent=float((found.frequency > _FREQUENT).float().mean()),
            )
            for name, found in self._states.items()
        ]


def _codes(layer: QuantWeight) -> Int8[Tensor, "rows width"]:
    with torch.no_grad():
        return layer.quantized_weight().codes.to(torch.int8)
