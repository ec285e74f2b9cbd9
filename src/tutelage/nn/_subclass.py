"""Subclasses of embeddings and Linears: which compute as their base, and what is made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["looks_up_rows", "multiplies", "with_forward_of"]


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


def multiplies(module: nn.Linear) -> bool:
    """Whether a subclass of ``nn.Linear`` computes what ``nn.Linear`` does, as Falcon's own does.

    It is tried with three inputs. One that holds further parameters, buffers or modules does not.

    Args:
        module: The module, of a subclass.
    """
    more = {name for name, _ in module.named_parameters()} - {"weight", "bias"}
    more |= {name for name, _ in module.named_buffers()}
    more |= {name for name, _ in module.named_children()}
    if more or not module.weight.is_floating_point():
        return False
    count = 3 * module.in_features
    probe = torch.arange(count, device=module.weight.device, dtype=torch.float32).sin()
    probe = probe.reshape(3, -1).to(module.weight.dtype)
    try:
        with torch.no_grad():
            found: Any = module.forward(probe)
            expected = nn.functional.linear(probe, module.weight, module.bias)
    except Exception:  # a forward that takes something else is one that cannot be kept
        return False
    return isinstance(found, torch.Tensor) and torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
