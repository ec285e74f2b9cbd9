"""Learning rates in proportion to the magnitude of quantized weights, and their largest."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..nn import QuantWeight

__all__ = ["TYPICAL", "cap_rates", "rate_factor", "scale_rates"]

TYPICAL = 0.04
"""Mean magnitude of a weight for which the learning rate holds as it stands."""

_RANGE = (0.1, 10.0)


def rate_factor(weight: Tensor) -> float:
    """Returns what the learning rate of a weight is multiplied by: mean |w| / 0.04, 0.1 to 10.

    Adam moves every weight by about the learning rate, whatever its size. A code changes when the
    latent weight has crossed a threshold that is a share of the mean magnitude, so that codes of
    small weights change in a few steps where those of large ones hardly do. The tensors of one
    model differ tenfold.

    Args:
        weight: Any shape.
    """
    mean = weight.detach().float().abs().mean()
    full = getattr(mean, "full_tensor", None)
    mean = mean if full is None else full()
    low, high = _RANGE
    return min(max(float(mean) / TYPICAL, low), high)


def scale_rates(optimizer: torch.optim.Optimizer, student: nn.Module) -> None:
    """Gives every quantized weight a group of its own, with its own learning rate.

    The first groups are those that were there, with what is left in them.

    Args:
        optimizer: Without state as yet; changed in place.
        student: A prepared model, whose weights are those at the start of its training.
    """
    weights = {id(m.weight) for m in student.modules() if isinstance(m, QuantWeight)}
    made: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        rest: list[Tensor] = []
        for parameter in group["params"]:
            if id(parameter) not in weights:
                rest.append(parameter)
                continue
            rate = group["lr"] * rate_factor(parameter)
            made.append({**group, "params": [parameter], "lr": rate})
        group["params"] = rest
    optimizer.param_groups.extend(made)


def cap_rates(optimizer: torch.optim.Optimizer, rate: float, cap: float) -> None:
    """Lowers the learning rates of all groups alike until none moves a weight too far in a step.

    Adam moves a weight by about its learning rate. Codes follow the latent weights, so that what
    ruins a training is a step that is large against them, whatever the learning rate is as a
    number. With rates in proportion to magnitudes the share is one for all: rate / 0.04.

    Args:
        optimizer: Changed in place; its rates are in proportion to ``rate``.
        rate: The peak learning rate that was asked for.
        cap: Largest part of the mean magnitude of a weight, such as 0.01.
    """
    largest = cap * TYPICAL
    # A rate written in decimals may exceed the product by a rounding.
    if rate <= largest * (1 + 1e-9):
        return
    warnings.warn(
        f"the learning rate {rate:g} is lowered to {largest:g}: it would move quantized weights by "
        f"{rate / TYPICAL:.1%} of their mean magnitude in a step, and rate_cap allows {cap:.1%}; "
        "set another rate_cap to train faster.",
        stacklevel=2,
    )
    for group in optimizer.param_groups:
        group["lr"] *= largest / rate
