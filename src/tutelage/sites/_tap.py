"""Recording, replacing and cutting the signals of one forward pass."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any, Literal, Self

from torch import Tensor, nn

from ..errors import SiteError
from ..nn import probe_of
from ._map import Site, SiteMap

__all__ = ["Projection", "Signals", "Tap"]

Projection = Literal["query", "key", "value"]

Signals = Mapping[Site, tuple[Tensor, ...]]
"""Recorded tensors by site, one per block in call order (``embeddings`` holds one)."""


class Tap:
    """Records signals of a model during one forward pass, and may replace one of them.

    Use it as a context manager around the forward pass. Hooks exist only inside the context;
    whatever happens there, the model is left as it was.

    A replaced signal is recorded before it is replaced: losses see the model's own value.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: SiteMap,
        record: Collection[Site],
        *,
        replace: Site | None = None,
        with_: Callable[[Tensor, int], Tensor] | None = None,
        detach: Collection[Projection] = (),
    ) -> None:
        """Says what to record and what to replace.

        Args:
            model: The model that ``sites`` was made from, or one of the same structure.
            sites: Its sites.
            record: Sites to record.
            replace: Site to replace in every block: ``"attention_map"``, ``"context"`` or
                ``"attention_output"``.
            with_: Called with the model's own tensor and the block's index; returns what is used
                in its place.
            detach: Projections of every block whose input is detached.

        Raises:
            SiteError: A site cannot be replaced, or a projection cannot be detached alone.
        """
        self._model, self._sites = model, sites
        self._record = frozenset(record)
        self._replace, self._with = replace, with_
        self._detach = frozenset(detach)
        self._found: dict[Site, dict[int, Tensor]] = defaultdict(dict)
        self._stack = contextlib.ExitStack()
        if replace not in (None, "attention_map", "context", "attention_output"):
            raise SiteError(
                f"the site {replace!r} cannot be replaced; use 'attention_map', 'context' or "
                "'attention_output'."
            )
        if replace is not None and with_ is None:
            raise SiteError(f"nothing was given to replace {replace!r} with.")
        self._check_fused()

    def _check_fused(self) -> None:
        for block in self._sites.blocks:
            fused = {block.query, block.key, block.value}
            if len(fused) < 3 and 0 < len(self._detach) < 3:
                raise SiteError(
                    f"{block.attention!r} computes query, key and value in one Linear, whose input "
                    f"cannot be detached for {' and '.join(sorted(self._detach))} alone; use the "
                    "stages 'attention_output' and 'context'."
                )

    def signals(self) -> Signals:
        """Returns what was recorded.

        Raises:
            SiteError: A site was not reached in every block.
        """
        out: dict[Site, tuple[Tensor, ...]] = {}
        for site in self._record:
            expected = 1 if site == "embeddings" else len(self._sites.blocks)
            found = self._found[site]
            if len(found) != expected:
                raise SiteError(
                    f"the forward pass reached {site!r} in {len(found)} of {expected} blocks of "
                    f"{type(self._model).__name__}; layers must not be skipped in training."
                )
            out[site] = tuple(found[i] for i in range(expected))
        return out

    def _see(self, site: Site, index: int | None, tensor: Tensor) -> Tensor:
        if index is None:
            if site == "embeddings":
                return tensor
            raise SiteError(
                f"a block of {type(self._model).__name__} ran more often than in the traced pass "
                f"({site!r}); its depth must not depend on the input."
            )
        if site in self._record:
            self._found[site].setdefault(index, tensor)
        if site == self._replace and self._with is not None:
            return self._with(tensor, index)
        return tensor

    def _wants(self, site: Site) -> bool:
        return site in self._record or site == self._replace

    def __enter__(self) -> Self:
        """Installs the hooks."""
        try:
            self._install()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Removes the hooks."""
        self._stack.close()

    def _install(self) -> None:
        blocks = self._sites.blocks
        self._on_output("attention_output", [b.output for b in blocks])
        self._on_output("block_output", [b.block for b in blocks])
        self._on_input("context", [b.output for b in blocks])
        self._on_input("ffn_input", [b.ffn[0] for b in blocks])
        self._on_input("embeddings", [blocks[0].block])
        detached = {getattr(b, role) for b in blocks for role in self._detach}
        for name in sorted(detached):
            module = self._model.get_submodule(name)
            self._keep(module.register_forward_pre_hook(_detach_input))
        if self._wants("attention_scores") or self._wants("attention_map"):
            for name, indices in _by_module([b.attention for b in blocks]).items():
                probe = _Probe(self._see, indices)
                self._stack.enter_context(probe_of(self._model.get_submodule(name), probe))

    def _keep(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _on_output(self, site: Site, names: list[str]) -> None:
        if not self._wants(site):
            return
        for name, indices in _by_module(names).items():
            turn = iter(indices)

            def hook(
                module: nn.Module, args: Any, out: Any, turn: Any = turn, site: Site = site
            ) -> Any:
                tensor = out[0] if isinstance(out, tuple) else out
                seen = self._see(site, next(turn, None), tensor)
                if seen is tensor:
                    return None
                return (seen, *out[1:]) if isinstance(out, tuple) else seen

            self._keep(self._model.get_submodule(name).register_forward_hook(hook))

    def _on_input(self, site: Site, names: list[str]) -> None:
        if not self._wants(site):
            return
        for name, indices in _by_module(names).items():
            turn = iter(indices)

            def hook(
                module: nn.Module,
                args: Any,
                kwargs: dict[str, Any],
                turn: Any = turn,
                site: Site = site,
            ) -> Any:
                if args:
                    seen = self._see(site, next(turn, None), args[0])
                    return None if seen is args[0] else ((seen, *args[1:]), kwargs)
                key = next(iter(kwargs))
                seen = self._see(site, next(turn, None), kwargs[key])
                return None if seen is kwargs[key] else (args, {**kwargs, key: seen})

            module = self._model.get_submodule(name)
            self._keep(module.register_forward_pre_hook(hook, with_kwargs=True))


class _Probe:
    def __init__(
        self, see: Callable[[Site, int | None, Tensor], Tensor], indices: list[int]
    ) -> None:
        self._see = see
        self._scores, self._maps = iter(indices), iter(indices)

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        pass

    def scores(self, scores: Tensor) -> None:
        self._see("attention_scores", next(self._scores, None), scores)

    def attention_map(self, attention_map: Tensor) -> Tensor:
        return self._see("attention_map", next(self._maps, None), attention_map)


def _detach_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0].detach(), *args[1:])


def _by_module(names: list[str]) -> dict[str, list[int]]:
    """Groups block indices by module: a shared module serves several blocks in turn."""
    grouped: dict[str, list[int]] = defaultdict(list)
    for index, name in enumerate(names):
        grouped[name].append(index)
    return grouped
