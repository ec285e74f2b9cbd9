"""The hooks of a tap: which block a call belongs to, what is seen, what is cut."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import SiteError
from ._map import Features, Site

if TYPE_CHECKING:
    from ._tap import Tap

__all__ = ["DetachPart", "Probe", "Replay", "Turn", "detach_input"]


class Replay(contextlib.AbstractContextManager[None]):
    """The tap as it stood when a checkpointed block began, for the block's recomputation."""

    def __init__(self, tap: Tap, turns: dict[tuple[str, str], int]) -> None:
        self._tap, self._turns = tap, turns
        self._open: list[Tap] = []

    def __enter__(self) -> None:
        self._open.append(self._tap.replayed(self._turns).__enter__())

    def __exit__(self, *exception: Any) -> None:
        self._open.pop().__exit__(None, None, None)


class Turn:
    """Hooks that know which block a module is called for."""

    def __init__(self, tap: Tap, site: Site, name: str, turns: dict[int, int]) -> None:
        self._tap, self._site, self._name, self._turns = tap, site, name, turns

    def _see(self, tensor: Tensor) -> Tensor:
        turn = self._tap.turn(self._site, self._name)
        index = self._turns.get(turn)
        if index is not None:
            return self._tap.see(self._site, index, tensor)
        if self._site != "embeddings" and turn > max(self._turns):
            raise SiteError(
                f"{self._name!r} ran more often than in the traced pass ({self._site!r}); the "
                "depth of a model must not depend on its input."
            )
        return tensor

    def output(self, module: nn.Module, args: Any, out: Any) -> Any:
        tensor = out[0] if isinstance(out, tuple) else out
        seen = self._see(tensor)
        if seen is tensor:
            return None
        return (seen, *out[1:]) if isinstance(out, tuple) else seen

    def input(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        if args:
            seen = self._see(args[0])
            return None if seen is args[0] else ((seen, *args[1:]), kwargs)
        key = next(iter(kwargs))
        seen = self._see(kwargs[key])
        return None if seen is kwargs[key] else (args, {**kwargs, key: seen})


class Probe:
    """Sees the signals inside the attention function."""

    def __init__(self, tap: Tap, name: str, indices: list[int]) -> None:
        self._tap, self._name, self._indices = tap, name, indices
        self._index = -1

    def inputs(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        turn = self._tap.turn("attention", self._name)
        if turn >= len(self._indices):
            raise SiteError(
                f"{self._name!r} ran more often than in the traced pass ('attention'); the depth "
                "of a model must not depend on its input."
            )
        self._index = self._indices[turn]

    def scores(self, scores: Tensor) -> None:
        self._tap.see("attention_scores", self._index, scores)

    def attention_map(self, attention_map: Tensor) -> Tensor:
        return self._tap.see("attention_map", self._index, attention_map)


def detach_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].detach(), *args[1:])


class DetachPart:
    """Cuts the way from some outputs of a Linear to its input; its weight keeps its gradient."""

    def __init__(self, features: Features) -> None:
        self._features = features

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if not out.requires_grad:
            return out
        cut = module.forward(args[0].detach())
        where = torch.zeros(out.shape[-1], dtype=torch.bool, device=out.device)
        for start, stop in self._features:
            where[start:stop] = True
        return torch.where(where, cut, out)
