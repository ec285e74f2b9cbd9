"""Latent weights in float32, whatever precision a model was loaded in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from .errors import UnsupportedModelError

__all__ = ["upcast"]

_HALF = (torch.float16, torch.bfloat16)
_KEPT = "_is_hf_initialized"


def upcast(model: nn.Module) -> None:
    """Makes parameters and buffers in half precision float32, in place.

    Buffers that no file holds, such as rotary frequencies or the scale of an embedding, are
    computed anew: rounded ones would not be those that the saved model has when it is loaded.

    Args:
        model: A model of transformers.

    Raises:
        UnsupportedModelError: Such a buffer belongs to a model whose code is not transformers'.
    """
    if not any(tensor.dtype in _HALF for tensor in (*model.parameters(), *model.buffers())):
        return
    stale = [(module, owner) for module, owner in _owned(model) if _rounded(module)]
    for module, owner in stale:
        if not cast("Any", owner)._init_weights.__module__.startswith("transformers."):
            raise UnsupportedModelError(
                f"the buffer {_rounded(module)[0]!r} of a {type(module).__name__} is in half "
                "precision and is not saved with the model; load the model with "
                "dtype=torch.float32."
            )
    model.float()
    for module, owner in stale:
        with _initialized(module), torch.no_grad():
            cast("Any", owner)._init_weights(module)


def _owned(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Returns every module with the innermost transformers model around it."""
    owners: dict[nn.Module, nn.Module] = {}
    for owner in model.modules():
        if hasattr(owner, "_init_weights"):
            owners.update(dict.fromkeys(owner.modules(), owner))
    return list(owners.items())


def _rounded(module: nn.Module) -> list[str]:
    names = sorted(module._non_persistent_buffers_set)
    return [name for name in names if getattr(module._buffers.get(name), "dtype", None) in _HALF]


@contextlib.contextmanager
def _initialized(module: nn.Module) -> Iterator[None]:
    """Marks all that files hold, so that transformers fills the rest alone."""
    tensors: list[Tensor] = [*module.parameters()]
    tensors += [
        buffer
        for child in module.modules()
        for name, buffer in child._buffers.items()
        if buffer is not None and name not in child._non_persistent_buffers_set
    ]
    before = [getattr(tensor, _KEPT, False) for tensor in tensors]
    loose = [
        b for n in module._non_persistent_buffers_set if (b := module._buffers.get(n)) is not None
    ]
    for tensor in tensors:
        setattr(tensor, _KEPT, True)
    for buffer in loose:
        setattr(buffer, _KEPT, False)
    try:
        yield
    finally:
        for tensor, value in zip(tensors, before, strict=True):
            setattr(tensor, _KEPT, value)
