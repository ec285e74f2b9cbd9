"""Optimizers whose update can be replayed: nothing in it may be a number of the host."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import RecipeError

__all__ = ["hold_rates", "make_capturable"]


def make_capturable(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Turns the learning rates of an optimizer into tensors, and its update into one for graphs.

    Schedulers of torch write into such a tensor in place.

    Args:
        optimizer: ``Adam``, ``AdamW``, or one whose class says ``capturable = True``; changed in
            place.

    Returns:
        The learning rate of every group.

    Raises:
        RecipeError: Its update cannot be captured.
    """
    adam = isinstance(optimizer, torch.optim.Adam)
    if not adam and not getattr(type(optimizer), "capturable", False):
        raise RecipeError(
            f"the update of {type(optimizer).__name__} cannot be captured in a CUDA graph; use "
            "torch.optim.AdamW, or train without graphs."
        )
    rates = []
    # torch asks for the same settings of every group, also of one that holds nothing.
    everything = [p for group in optimizer.param_groups for p in group["params"]]
    common = everything[0].device if everything else torch.device("cpu")
    for group in optimizer.param_groups:
        device = group["params"][0].device if group["params"] else common
        if not isinstance(group["lr"], Tensor):
            group["lr"] = torch.full((), float(group["lr"]), device=device)
        elif group["lr"].device != device:
            group["lr"] = group["lr"].to(device)
        if adam and device.type == "cuda":
            group["capturable"] = True
            for parameter in group["params"]:
                step = optimizer.state.get(parameter, {}).get("step")
                if step is not None and step.device != device:
                    optimizer.state[parameter]["step"] = step.to(device)
        rates.append(group["lr"])
    return rates


def hold_rates(optimizer: torch.optim.Optimizer, rates: list[Tensor]) -> None:
    """Writes rates that were set as numbers into the tensors that graphs read.

    Args:
        optimizer: The optimizer.
        rates: What ``make_capturable`` returned.
    """
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if group["lr"] is rate:
            continue
        if isinstance(group["lr"], Tensor):
            rate.copy_(group["lr"])
        else:
            rate.fill_(float(group["lr"]))
        group["lr"] = rate
