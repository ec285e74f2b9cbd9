"""One traced forward pass: which modules ran, and which tensor came from which.

Provenance is read from the autograd graph: names and the order of calls decide nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SiteError, TutelageError, UnsupportedModelError, not_of_transformers
from ..nn import kind_of, probe_of, use_attention
from ._inputs import synthesize_inputs

__all__ = ["Attention", "BlockCall", "LinearCall", "Trace", "trace"]


@dataclass(eq=False)
class LinearCall:
    """A call of a Linear or Conv1D; ``at`` is its place in the order of all calls."""

    name: str
    at: int
    input: Tensor
    output: Tensor

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.input.shape[-1]

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.output.shape[-1]


@dataclass(eq=False)
class BlockCall:
    """A call of a member of a ModuleList, from ``start`` to ``stop``; ``width`` of its output."""

    name: str
    number: int
    start: int
    stop: int = -1
    width: int = 0


@dataclass(eq=False)
class Attention:
    """An attention call, known by the node of its softmax (or of its fused product).

    Without transformers' interface ``query``, ``key`` and ``value`` are unknown.
    """

    node: Any
    name: str | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    causal: bool = False
    dropout: str | None = None
    shape: tuple[int, ...] = ()

    @property
    def interface(self) -> bool:
        """Whether it ran through ``AttentionInterface``."""
        return self.query is not None

    @property
    def fused(self) -> bool:
        """Whether it is one fused product, whose attention map does not exist."""
        return "ScaledDotProduct" in self.node.name()


@dataclass
class Trace:
    """What happened in one forward pass on ``inputs``."""

    inputs: frozenset[str] = frozenset()
    linears: list[LinearCall] = field(default_factory=list)
    blocks: list[BlockCall] = field(default_factory=list)
    attentions: dict[Any, Attention] = field(default_factory=dict)
    clock: int = 0

    def tick(self) -> int:
        """Returns the next place in the order of calls."""
        self.clock += 1
        return self.clock

    def sources(self, tensor: Tensor) -> list[LinearCall | Attention]:
        """Returns the Linears and attention calls that a tensor comes from, none between.

        Args:
            tensor: Any tensor of the forward pass.
        """
        return self._sources([tensor.grad_fn])

    def sources_of(self, node: Any) -> list[LinearCall | Attention]:
        """Returns the sources of what goes into a node of the graph.

        Args:
            node: The node.
        """
        return self._sources([following for following, _ in node.next_functions])

    def _sources(self, pending: list[Any]) -> list[LinearCall | Attention]:
        ends: dict[Any, LinearCall | Attention] = {c.output.grad_fn: c for c in self.linears}
        ends.update(self.attentions)
        found: dict[int, LinearCall | Attention] = {}
        seen = set[Any]()
        while pending:
            node = pending.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in ends or _is_attention(node):
                end = ends.get(node) or self.attentions.setdefault(node, _by_hand(node))
                found[id(end)] = end
            else:
                pending.extend(following for following, _ in node.next_functions)
        return sorted(found.values(), key=lambda end: end.at if isinstance(end, LinearCall) else 0)


def _is_attention(node: Any) -> bool:
    name = node.name()
    if "ScaledDotProduct" in name:
        return True
    # torch's own attention is made of a "safe" softmax where no fused kernel fits.
    softmax = name.startswith(("SoftmaxBackward", "SafeSoftmaxBackward"))
    return softmax and node._saved_result.dim() in (3, 4)


def _by_hand(node: Any) -> Attention:
    fused = "ScaledDotProduct" in node.name()
    if fused:
        queries, keys = node._saved_query.shape, node._saved_key.shape
        return Attention(node, shape=(*queries[:3], keys[2]))
    result = node._saved_result
    return Attention(node, shape=tuple(result.shape), causal=_is_causal(result.log(), result.shape))


class _Recorder:
    """Logs the attention calls of one module that go through the interface."""

    def __init__(self, name: str, into: Trace) -> None:
        self._name, self._into = name, into
        self._last: Attention | None = None

    def inputs(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        shape = (*query.shape[:3], key.shape[2])
        self._last = Attention(
            None, self._name, query, key, value, causal=_is_causal(mask, shape), shape=shape
        )

    def scores(self, scores: Tensor) -> None:
        pass

    def attention_map(self, attention_map: Tensor) -> Tensor:
        assert self._last is not None
        if attention_map.grad_fn is None:
            raise SiteError(
                f"the attention of {self._name!r} runs without gradient, even in training; take "
                "torch.no_grad out of the model."
            )
        self._last.node = attention_map.grad_fn
        self._into.attentions[self._last.node] = self._last
        return attention_map


def _is_causal(mask: Tensor | None, shape: tuple[int, ...]) -> bool:
    queries, keys = shape[-2:]
    if mask is None or queries != keys or queries < 2:
        return False
    later = torch.ones(queries, keys, dtype=torch.bool, device=mask.device).triu(1)
    return bool((mask[..., later] < -1e4).all())


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _require_gradient(module: nn.Module, args: Any, out: Any) -> None:
    # Weights may be frozen; what comes from an embedding shall leave a track all the same.
    for tensor in out if isinstance(out, tuple) else (out,):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.requires_grad:
            tensor.requires_grad_()


def _watch(module: nn.Module, name: str, into: Trace) -> Iterator[Any]:
    """Yields the handles of the hooks that log one module."""
    kind = kind_of(module)
    if kind in ("linear", "conv1d"):

        def on_linear(_: nn.Module, args: Any, out: Any) -> None:
            # A subclass may return more than its product, as routers of experts do.
            if isinstance(out, Tensor):
                into.linears.append(LinearCall(name, into.tick(), args[0], out))

        yield module.register_forward_hook(on_linear)
    if kind == "embedding":
        yield module.register_forward_hook(_require_gradient)
    if isinstance(module, nn.Dropout):

        def on_dropout(_: nn.Module, args: Any, out: Tensor) -> None:
            node = args[0].grad_fn
            if node is not None and _is_attention(node):
                into.attentions.setdefault(node, _by_hand(node)).dropout = name

        yield module.register_forward_hook(on_dropout)


def _watch_block(module: nn.Module, name: str, into: Trace) -> Iterator[Any]:
    open_calls: list[BlockCall] = []

    def enter(_: nn.Module, args: Any) -> None:
        number = sum(call.name == name for call in into.blocks)
        open_calls.append(BlockCall(name, number, into.tick()))
        into.blocks.append(open_calls[-1])

    def leave(_: nn.Module, args: Any, out: Any) -> None:
        call = open_calls.pop()
        call.stop = into.tick()
        first = out[0] if isinstance(out, tuple) else out
        call.width = first.shape[-1] if isinstance(first, Tensor) else 0

    yield module.register_forward_pre_hook(enter)
    yield module.register_forward_hook(leave)


def _members(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            for key, member in module.named_children():
                yield f"{name}.{key}" if name else key, member


def trace(model: nn.Module) -> Trace:
    """Runs one small forward pass in eval mode and logs it.

    Weights, gradients, random state and training flags are left as they were.

    Args:
        model: A transformers model.

    Raises:
        UnsupportedModelError: It is no transformers model, or does not run on a synthesized input.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise not_of_transformers(model)
    inputs = synthesize_inputs(model)
    found = Trace(frozenset(inputs))
    for tensor in inputs.values():
        if tensor.is_floating_point():
            tensor.requires_grad_()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_evaluating(model))
        stack.enter_context(use_attention(model))
        for name, module in model.named_modules():
            stack.enter_context(probe_of(module, _Recorder(name, found)))
            for handle in _watch(module, name, found):
                stack.callback(handle.remove)
        for name, module in _members(model):
            for handle in _watch_block(module, name, found):
                stack.callback(handle.remove)
        try:
            model(**inputs)
        except TutelageError:
            raise
        except Exception as error:  # whatever a model's code raises on inputs that do not suit it
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run on a synthesized input "
                f"({', '.join(inputs)}): {error}"
            ) from error
    return found
