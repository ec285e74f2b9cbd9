"""Learning rates in proportion to the magnitude of quantized weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..nn import QuantWeight

__all__ = ["TYPICAL", "rate_factor", "scale_rates"]

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
