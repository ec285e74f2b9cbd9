"""Classes made at run time, for embeddings that have a forward of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["looks_up_rows", "with_forward_of"]


_MADE: dict[tuple[Any, Any], Any] = {}


def _make(plain: Any, base: Any) -> Any:
    made = with_forward_of(plain, base)
    return made.__new__(made)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    plain, base = type(self).__bases__
    return _make, (plain, base), self.__dict__


def with_forward_of(plain: Any, base: Any) -> Any:
    """Returns a class that computes as ``plain`` does, with the lookup of ``base``.

    ``plain`` comes first, and where it calls ``super().forward`` it meets ``base``. Instances can
    be copied and pickled.

    Args:
        plain: A subclass of ``nn.Embedding``, or ``nn.Embedding``: then it is ``base`` alone.
        base: The quantized or packed embedding, a subclass of ``nn.Embedding``.
    """
    if plain is nn.Embedding:
        return base
    if (plain, base) not in _MADE:
        name = f"{base.__name__.removesuffix('Embedding')}{plain.__name__}"
        made = type(name, (plain, base), {"__reduce_ex__": _reduce, "__module__": __name__})
        _MADE[plain, base] = made
    return _MADE[plain, base]


class _Seen(nn.Embedding):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.__dict__["_seen"] = True
        return super().forward(input)


def looks_up_rows(module: nn.Embedding) -> bool:
    """Whether the forward of ``module`` gets its rows from ``nn.Embedding.forward``.

    It is tried with one index; class, weights and hooks stay as they are.

    Args:
        module: An embedding, of a subclass too.
    """
    plain = type(module)
    index = torch.zeros(1, 1, dtype=torch.long, device=module.weight.device)
    module.__class__ = with_forward_of(plain, _Seen)
    try:
        with torch.no_grad():
            module.forward(index)
    except Exception:  # a forward that takes something else is one that cannot be kept
        return False
    finally:
        module.__class__ = plain
        seen = module.__dict__.pop("_seen", False)
    return bool(seen)
