"""Quantized products under autocast: computed in float32, returned in autocast's dtype."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["in_float32", "without_autocast"]

_Result = TypeVar("_Result")


def _autocast_device(args: tuple[Any, ...]) -> str | None:
    kind = next((arg.device.type for arg in args if isinstance(arg, Tensor)), None)
    return kind if kind is not None and torch.is_autocast_enabled(kind) else None


def without_autocast(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Switches autocast off inside ``function``, which would round its products.

    Args:
        function: Takes at least one tensor by position.
    """

    @functools.wraps(function)
    def run(*args: Any) -> _Result:
        device = _autocast_device(args)
        if device is None:
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def in_float32(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Switches autocast off inside ``function`` and returns its result in autocast's dtype.

    Args:
        function: Takes at least one tensor by position and computes in float32.
    """
    inner = without_autocast(function)

    @functools.wraps(function)
    def run(*args: Any) -> Tensor:
        device = _autocast_device(args)
        result = inner(*args)
        return result if device is None else result.to(torch.get_autocast_dtype(device))

    return run
