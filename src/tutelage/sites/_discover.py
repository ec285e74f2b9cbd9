"""From one traced forward pass to the sites of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import SiteError
from ._inputs import DECODER_TOKENS, TOKENS
from ._map import Axis, BlockSites, Features, SiteMap
from ._trace import Attention, BlockCall, LinearCall, Trace, trace

__all__ = ["discover"]


class _Roles:
    """The Linears around one attention call."""

    def __init__(self, found: Trace, attention: Attention, outputs: list[LinearCall]) -> None:
        self.attention = attention
        self.label = attention.name or attention.dropout or "an attention written by hand"
        self.output = self._output(found, outputs)
        self.positions: tuple[LinearCall, ...] = ()
        if attention.interface:
            tensors = {"query": attention.query, "key": attention.key, "value": attention.value}
            made = [self._one(found, role, tensor) for role, tensor in tensors.items()]
        else:
            made = self._by_hand(found)
        self.query, self.key, self.value = made

    @property
    def calls(self) -> tuple[LinearCall, ...]:
        return (self.query, self.key, self.value, *self.positions, self.output)

    def _output(self, found: Trace, outputs: list[LinearCall]) -> LinearCall:
        if len(outputs) == 1:
            return outputs[0]
        if not outputs:
            raise SiteError(
                f"the output projection of {self.label!r} was not found: no Linear takes its "
                "context as input."
            )
        names = ", ".join(call.name for call in outputs[:4])
        raise SiteError(
            f"the context of {self.label!r} goes into {len(outputs)} Linears ({names}); one output "
            "projection must take it alone."
        )

    def _one(self, found: Trace, role: str, tensor: Tensor | None) -> LinearCall:
        assert tensor is not None
        sources = found.sources(tensor)
        if len(sources) == 1 and isinstance(sources[0], LinearCall):
            return sources[0]
        names = ", ".join(s.name or "attention" for s in sources) or "no Linear"
        raise SiteError(
            f"the {role} projection of {self.label!r} was not found: its input comes from {names}, "
            "not from one Linear."
        )

    def _by_hand(self, found: Trace) -> list[LinearCall]:
        # A node of softmax has the scores as its only input; a fused product has all three.
        node = self.attention.node
        scores = [s for s in found.sources_of(node) if isinstance(s, LinearCall)]
        outside = found.sources(self.output.input)
        values: list[LinearCall | Attention] = [s for s in outside if s is not self.attention]
        if self.attention.fused:
            scores, values = scores[:2], list(scores[2:] or scores[:1])
        fused = len(scores) == 1 and values == scores
        if not fused and (len(scores) < 2 or len(values) != 1):
            raise SiteError(
                f"the projections of {self.label!r} could not be told: {len(scores)} Linears lead "
                f"to its scores and {len(values)} to its values; a model must use transformers' "
                "AttentionInterface, or one Linear each."
            )
        value = values[0]
        if not isinstance(value, LinearCall):
            raise SiteError(f"the values of {self.label!r} come from no Linear.")
        if fused:
            return [value, value, value]
        self.positions = tuple(scores[2:])
        return [scores[0], scores[1], value]


def _block_of(found: Trace, roles: _Roles, taken: set[int]) -> BlockCall:
    """Returns the innermost running member of a ModuleList that has a feed-forward part."""
    output = roles.output
    running = [b for b in found.blocks if b.start < output.at < b.stop]
    if not running:
        raise SiteError(
            f"the attention {roles.label!r} stands in no ModuleList of blocks; its block cannot "
            "be told."
        )
    for block in sorted(running, key=lambda b: -b.start):
        if any(output.at < c.at < block.stop and id(c) not in taken for c in found.linears):
            return block
    raise SiteError(f"no feed-forward Linear was found after attention in {running[-1].name!r}.")


def _common_parent(calls: tuple[LinearCall, ...]) -> str:
    parts = [call.name.split(".")[:-1] for call in calls]
    same = 0
    while all(len(p) > same and p[same] == parts[0][same] for p in parts):
        same += 1
    return ".".join(parts[0][:same])


def _features(call: LinearCall, tensor: Tensor | None) -> Features:
    """Returns which outputs of a shared Linear a tensor depends on."""
    if tensor is None:
        return ()
    weights = torch.arange(1, tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device).sin()
    (gradient,) = torch.autograd.grad(
        tensor, call.output, weights.reshape(tensor.shape), retain_graph=True
    )
    return _ranges(gradient.reshape(-1, call.out_features).ne(0).any(0).tolist())


def _ranges(used: list[bool]) -> Features:
    edges = [
        i for i, (a, b) in enumerate(zip([False, *used], [*used, False], strict=True)) if a != b
    ]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def _axis(found: Trace, length: int) -> Axis | None:
    if length == TOKENS and "input_ids" in found.inputs:
        return "input"
    return "decoder" if length == DECODER_TOKENS and "decoder_input_ids" in found.inputs else None


def _shared_features(roles: _Roles) -> dict[str, Features]:
    """Returns which outputs serve whom where one Linear serves several projections."""
    attention = roles.attention
    if len({roles.query.name, roles.key.name, roles.value.name}) == 3:
        return {}
    if attention.interface:
        return {
            f"{role}_features": _features(getattr(roles, role), getattr(attention, role))
            for role in ("query", "key", "value")
        }
    if attention.fused:
        return {}
    scores = _features(roles.query, attention.node._saved_result)
    rest = torch.ones(roles.query.out_features, dtype=torch.bool)
    for start, stop in scores:
        rest[start:stop] = False
    return {
        "query_features": scores,
        "key_features": scores,
        "value_features": _ranges(rest.tolist()),
    }


def _entry(found: Trace, roles: _Roles, taken: set[int], later: list[_Roles]) -> BlockSites:
    attention, output = roles.attention, roles.output
    block = _block_of(found, roles, taken)
    following = [r.output.at for r in later if block.start < r.output.at < block.stop]
    end = min(following, default=block.stop)
    ffn = tuple(c.name for c in found.linears if output.at < c.at < end and id(c) not in taken)
    cross = found.sources(roles.query.input) != found.sources(roles.key.input)
    heads, queries, keys = attention.shape[-3:]
    return BlockSites(
        block=block.name,
        attention=attention.name or _common_parent(roles.calls[:3]),
        query=roles.query.name,
        key=roles.key.name,
        value=roles.value.name,
        output=output.name,
        ffn=ffn,
        heads=heads,
        width=output.in_features // heads,
        hidden=block.width,
        call=sum(c.name == output.name and c.at < output.at for c in found.linears),
        block_call=block.number,
        kind="cross" if cross else "self",
        causal=attention.causal,
        ends_block=not following,
        interface=attention.interface,
        map_module=None if attention.interface else attention.dropout,
        positions=tuple(dict.fromkeys(c.name for c in roles.positions)),
        query_axis=_axis(found, queries),
        key_axis=_axis(found, keys),
        **_shared_features(roles),
    )


def _refuse_recalled(found: Trace, blocks: list[BlockSites]) -> None:
    """A module that also runs elsewhere would be taken for the next block's."""
    calls: dict[str, int] = {}
    for call in found.linears:
        calls[call.name] = calls.get(call.name, 0) + 1
    for name in dict.fromkeys(b.output for b in blocks):
        expected = sum(b.output == name for b in blocks)
        if calls[name] != expected:
            raise SiteError(
                f"{name!r} runs {calls[name]} times in a forward pass, {expected} of them after "
                "attention; an output projection must serve nothing else."
            )


def discover(model: nn.Module) -> SiteMap:
    """Finds the blocks of ``model`` by tracing one small forward pass in eval mode.

    The projections of an attention call are the Linears whose outputs its queries, keys and
    values come from; its output projection is the one Linear that takes the context. Attention
    that is written by hand, outside transformers' ``AttentionInterface``, is recognised by its
    softmax. Weights, random state and training flags are left as they were.

    Args:
        model: A transformers model.

    Returns:
        The sites of every attention call, in the order of the output projections.

    Raises:
        SiteError: There is no attention call, or a part of a block could not be told.
        UnsupportedModelError: The model cannot be traced.
    """
    found = trace(model)
    consumers: dict[int, list[LinearCall]] = {}
    for call in found.linears:
        for source in found.sources(call.input):
            if isinstance(source, Attention):
                consumers.setdefault(id(source), []).append(call)
    if not found.attentions:
        raise SiteError(
            f"{type(model).__name__} has no attention site: no attention was seen in a forward "
            "pass; use a Transformer model."
        )
    roles = [_Roles(found, a, consumers.get(id(a), [])) for a in found.attentions.values()]
    roles.sort(key=lambda r: r.output.at)
    taken = {id(call) for r in roles for call in r.calls}
    blocks = [_entry(found, r, taken, roles[i + 1 :]) for i, r in enumerate(roles)]
    _refuse_recalled(found, blocks)
    return SiteMap(tuple(blocks), tuple(dict.fromkeys(c.name for c in found.linears)))
