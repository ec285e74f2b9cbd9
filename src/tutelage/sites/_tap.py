"""Recording, replacing and cutting the signals of one forward pass."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from ..errors import SiteError, UnsupportedModelError
from ..nn import probe_of
from ._compiled import heed_hooks
from ._hooks import DetachPart, Probe, Replay, Turn, detach_input
from ._map import Projection, Site, SiteMap

__all__ = ["Signals", "Tap"]

_ROLES: tuple[Projection, ...] = ("query", "key", "value")

Signals = Mapping[Site, tuple[Tensor, ...]]
"""Recorded tensors by site, one for every index of ``SiteMap.at``."""

_REPLACEABLE = (None, "attention_map", "context", "attention_output")


class Tap:
    """Records signals of a model during one forward pass, and may replace one of each block.

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
        replace: Site | Sequence[Site | None] | None = None,
        with_: Callable[[Tensor, int], Tensor] | None = None,
        detach: Collection[Projection] | Sequence[Collection[Projection]] = (),
    ) -> None:
        """Says what to record and what to replace.

        Args:
            model: The model that ``sites`` was made from, or one of the same structure.
            sites: Its sites.
            record: Sites to record.
            replace: Site to replace in every block, or one for each: ``"attention_map"``,
                ``"context"``, ``"attention_output"`` or ``None``.
            with_: Called with the model's own tensor and the block's index; returns what is used
                in its place.
            detach: Projections of every block whose input is detached, or a collection for each.

        Gradient checkpointing works in its non-reentrant form: leave the context before the
        backward pass, and recomputed blocks are replaced and cut like in their first run.

        Raises:
            SiteError: A site cannot be recorded or replaced.
        """
        count = len(sites.blocks)
        self._model, self._sites = model, sites
        self._record = frozenset(record)
        one = replace is None or isinstance(replace, str)
        self._replace: list[Any] = [replace] * count if one else list(replace or ())
        flat = not detach or isinstance(next(iter(detach)), str)
        self._detach: list[Any] = [tuple(detach)] * count if flat else list(detach)
        self._with = with_
        self._found: dict[Site, dict[int, Tensor]] = defaultdict(dict)
        self._turns: dict[tuple[str, str], int] = defaultdict(int)
        self._cut_whole: set[str] = set()
        self._cut_part: dict[str, set[tuple[int, int]]] = defaultdict(set)
        self._stack = contextlib.ExitStack()
        self._check()
        self._plan_cuts()

    def _check(self) -> None:
        for site in self._replace:
            if site not in _REPLACEABLE:
                raise SiteError(
                    f"the site {site!r} cannot be replaced; use 'attention_map', 'context' or "
                    "'attention_output'."
                )
            if site is not None and self._with is None:
                raise SiteError(f"nothing was given to replace {site!r} with.")
        for index, block in enumerate(self._sites.blocks):
            wanted = {self._replace[index], *self._record}
            if "attention_scores" in wanted and not block.has("attention_scores"):
                raise SiteError(
                    f"{block.attention!r} computes its attention by hand, so that its scores are "
                    "out of reach; use the loss term 'attention_map' in place of "
                    "'attention_scores'."
                )
            if "attention_map" in wanted and not block.has("attention_map"):
                raise SiteError(
                    f"{block.attention!r} computes its attention by hand and without a Dropout "
                    "module, so that its attention map is out of reach; use the stages "
                    "'attention_output' and 'context', and the loss term 'context_local'."
                )

    def signals(self) -> Signals:
        """Returns what was recorded.

        Raises:
            SiteError: A site was not reached in every block.
        """
        out: dict[Site, tuple[Tensor, ...]] = {}
        for site in self._record:
            wanted, found = self._sites.at(site), self._found[site]
            if set(found) != set(wanted):
                raise SiteError(
                    f"the forward pass reached {site!r} in {len(found)} of {len(wanted)} blocks of "
                    f"{type(self._model).__name__}; layers must not be skipped in training."
                )
            out[site] = tuple(found[i] for i in wanted)
        return out

    def see(self, site: Site, index: int, tensor: Tensor) -> Tensor:
        """Records a signal of a block and returns what is used in its place.

        Args:
            site: Which signal.
            index: Index of the block.
            tensor: The model's own.
        """
        if site in self._record:
            self._found[site].setdefault(index, tensor)
        if self._with is not None and site == self._replace[index]:
            return self._with(tensor, index)
        return tensor

    def __enter__(self) -> Self:
        """Installs the hooks."""
        heed_hooks()
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

    def _indices(self, site: Site) -> list[int]:
        """Returns the blocks in which a site is recorded or replaced."""
        at = self._sites.at(site)
        return [i for i in at if site in self._record or site == self._replace[i]]

    def _install(self) -> None:
        blocks = self._sites.blocks
        self._hook("attention_output", lambda i: (blocks[i].output, blocks[i].call), output=True)
        self._hook("context", lambda i: (blocks[i].output, blocks[i].call))
        self._hook("block_output", lambda i: (blocks[i].block, blocks[i].block_call), output=True)
        self._hook("embeddings", lambda i: (blocks[i].block, blocks[i].block_call))
        self._hook("ffn_input", lambda i: (blocks[i].ffn[0], self._earlier_ffn(i)))
        self._cut()
        self._probe()
        self._follow_checkpoints()

    def _earlier_ffn(self, index: int) -> int:
        blocks = self._sites.blocks
        name = blocks[index].ffn[0]
        return sum(bool(b.ffn) and b.ffn[0] == name for b in blocks[:index])

    def _keep(self, handle: Any) -> None:
        self._stack.callback(handle.remove)

    def _hook(
        self, site: Site, place: Callable[[int], tuple[str, int]], output: bool = False
    ) -> None:
        calls: dict[str, dict[int, int]] = defaultdict(dict)
        for index in self._indices(site):
            name, call = place(index)
            calls[name][call] = index
        for name, turns in calls.items():
            see = Turn(self, site, name, turns)
            module = self._model.get_submodule(name)
            if output:
                self._keep(module.register_forward_hook(see.output))
            else:
                self._keep(module.register_forward_pre_hook(see.input, with_kwargs=True))

    def turn(self, site: str, name: str) -> int:
        """Counts a call and returns how many calls of a module at a site came before it.

        Args:
            site: Where it is seen.
            name: Name of the module.
        """
        turn = self._turns[site, name]
        self._turns[site, name] = turn + 1
        return turn

    def _plan_cuts(self) -> None:
        for block, roles in zip(self._sites.blocks, self._detach, strict=True):
            others = (role for role in _ROLES if role not in roles)
            kept = {name for role in others for name, _ in block.input_cuts(role)}
            for name, features in (cut for role in roles for cut in block.input_cuts(role)):
                if name not in kept or name in block.positions:
                    self._cut_whole.add(name)
                elif features:
                    self._cut_part[name].update(features)
                else:
                    raise SiteError(
                        f"{name!r} makes {' and '.join(sorted(roles))} together with others, and "
                        "which of its outputs they are could not be told; use the stages "
                        "'attention_output' and 'context'."
                    )

    def _cut(self) -> None:
        """Detaches the input of projections, for a part of their outputs where others share it."""
        for name in sorted(self._cut_whole):
            module = self._model.get_submodule(name)
            self._keep(module.register_forward_pre_hook(detach_input))
        for name, ranges in sorted(self._cut_part.items()):
            module = self._model.get_submodule(name)
            self._keep(module.register_forward_hook(DetachPart(tuple(sorted(ranges)))))

    def _probe(self) -> None:
        wanted = sorted({*self._indices("attention_scores"), *self._indices("attention_map")})
        through: dict[str, list[int]] = defaultdict(list)
        for index in wanted:
            block = self._sites.blocks[index]
            if block.interface:
                through[block.attention].append(index)
            else:
                name = str(block.map_module)
                turns = {block.call: index}
                see = Turn(self, "attention_map", name, turns)
                module = self._model.get_submodule(name)
                self._keep(module.register_forward_pre_hook(see.input, with_kwargs=True))
        for name in through:
            same = [i for i, b in enumerate(self._sites.blocks) if b.attention == name]
            probe = Probe(self, name, same)
            self._stack.enter_context(probe_of(self._model.get_submodule(name), probe))

    def _follow_checkpoints(self) -> None:
        """Lets the recomputation of a checkpointed block see what its first run saw."""
        for name, module in self._model.named_modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is None or not getattr(module, "gradient_checkpointing", False):
                continue
            if getattr(function, "keywords", {}).get("use_reentrant", True):
                raise UnsupportedModelError(
                    f"{name or type(module).__name__!r} recomputes activations with "
                    "use_reentrant=True, which drops the gradient of inner signals; enable "
                    "gradient checkpointing with {'use_reentrant': False}."
                )
            module.__dict__["_gradient_checkpointing_func"] = functools.partial(
                function, context_fn=self._checkpoint_contexts
            )
            self._stack.callback(
                module.__dict__.__setitem__, "_gradient_checkpointing_func", function
            )

    def _checkpoint_contexts(self) -> tuple[Any, Any]:
        return contextlib.nullcontext(), Replay(self, dict(self._turns))

    def replayed(self, turns: dict[tuple[str, str], int]) -> Tap:
        """Returns a tap that replaces and cuts like this one, and records nothing.

        Args:
            turns: Calls that came before, see ``turn``.
        """
        again = copy.copy(self)
        again._record = frozenset()
        again._found = defaultdict(dict)
        again._turns = defaultdict(int, turns)
        again._stack = contextlib.ExitStack()
        return again
