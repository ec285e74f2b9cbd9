"""Where the inner signals of a model are, as plain data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

__all__ = ["SITES", "Axis", "BlockSites", "Features", "Projection", "Site", "SiteMap"]

Site = Literal[
    "attention_scores",
    "attention_map",
    "context",
    "attention_output",
    "ffn_input",
    "block_output",
    "embeddings",
]
"""Names of the signals of a block (``embeddings`` is the input of the first one of every stack).

* ``attention_scores``: (batch, heads, queries, keys), scaled, before the mask.
* ``attention_map``: the same shape, after the softmax, before dropout.
* ``context``: (batch, tokens, heads * width), input of the output projection.
* ``attention_output``: (batch, tokens, hidden), its output with bias, before dropout and residual.
* ``ffn_input``: (batch, tokens, hidden), input of the first feed-forward Linear.
* ``block_output``: (batch, tokens, hidden), the residual stream after the block.
"""

SITES: tuple[Site, ...] = get_args(Site)

Projection = Literal["query", "key", "value"]

Features = tuple[tuple[int, int], ...]
"""Ranges (start, stop) of output features of a Linear; empty for all of them."""

Axis = Literal["input", "decoder"]
"""Whose positions an axis of a signal counts: the model's input, or the decoder's tokens."""


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class BlockSites:
    """One attention call and the modules around it, by qualified name.

    Attributes:
        block: The block it stands in.
        attention: The module that computes it.
        query: Projection that makes the queries.
        key: Projection that makes the keys.
        value: Projection that makes the values; one of the three may serve several.
        output: The attention output projection.
        ffn: The feed-forward projections that follow in the block, in call order; empty where
            another attention call comes first.
        heads: Number of query heads.
        width: Width of one head of the context.
        hidden: Width of the block's output.
        call: How many calls of ``output`` came before in one forward pass; 0 unless shared.
        block_call: How many calls of ``block`` came before; 0 unless shared.
        kind: ``"self"``, or ``"cross"`` where keys come from elsewhere.
        causal: Whether a query sees no later key.
        ends_block: Whether it is the last attention call of the block.
        interface: Whether it runs through transformers' ``AttentionInterface``.
        map_module: Without the interface, the Dropout that the attention map passes through;
            ``None`` where the map is out of reach.
        positions: Further Linears that feed the scores, such as relative positions.
        query_features: Which outputs of a shared ``query`` projection are the queries.
        key_features: The same of the keys.
        value_features: The same of the values.
        query_axis: What the queries are counted by, ``None`` if neither by the input's tokens nor
            by the decoder's.
        key_axis: The same of the keys.
    """

    block: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    ffn: tuple[str, ...]
    heads: int
    width: int
    hidden: int
    call: int = 0
    block_call: int = 0
    kind: Literal["self", "cross"] = "self"
    causal: bool = False
    ends_block: bool = True
    interface: bool = True
    map_module: str | None = None
    positions: tuple[str, ...] = ()
    query_features: Features = ()
    key_features: Features = ()
    value_features: Features = ()
    query_axis: Axis | None = "input"
    key_axis: Axis | None = "input"

    @property
    def stack(self) -> str:
        """Name of the list of blocks it stands in."""
        return self.block.rpartition(".")[0]

    def has(self, site: Site) -> bool:
        """Whether a signal can be seen here.

        Args:
            site: Its name; ``embeddings`` is asked of the map, not of a block.
        """
        if site == "attention_scores":
            return self.interface
        if site == "attention_map":
            return self.interface or self.map_module is not None
        if site == "ffn_input":
            return bool(self.ffn)
        return self.ends_block if site == "block_output" else True

    def input_cuts(self, projection: Projection) -> Iterator[tuple[str, Features]]:
        """Yields the Linears, with the outputs concerned, that make one of the three.

        Args:
            projection: Which one.
        """
        yield getattr(self, projection), getattr(self, f"{projection}_features")
        if projection != "value":
            for name in self.positions:
                yield name, ()


@dataclass(frozen=True)
class SiteMap:
    """All attention calls of a model, in order.

    Attributes:
        blocks: One entry per attention call.
        linears: Every Linear and Conv1D that ran in the traced forward pass, in order of its
            first call.
    """

    blocks: tuple[BlockSites, ...]
    linears: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-able data."""
        return {"blocks": [asdict(b) for b in self.blocks], "linears": list(self.linears)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SiteMap:
        """Returns the map that ``to_dict`` made plain data of, also after a way through JSON.

        Args:
            data: The plain data.
        """
        return cls(
            tuple(
                BlockSites(**{name: _tuples(value) for name, value in block.items()})
                for block in data["blocks"]
            ),
            tuple(data["linears"]),
        )

    def shape(self) -> tuple[tuple[int, int, int], ...]:
        """Returns (heads, width, hidden) of every block: what teacher and student must share."""
        return tuple((b.heads, b.width, b.hidden) for b in self.blocks)

    def at(self, site: Site) -> tuple[int, ...]:
        """Returns the indices of the blocks that a recorded signal has one tensor of each for.

        Args:
            site: Name of the signal.
        """
        if site == "embeddings":
            first = dict[str, int]()
            for index, block in enumerate(self.blocks):
                first.setdefault(block.stack, index)
            return tuple(first.values())
        return tuple(index for index, block in enumerate(self.blocks) if block.has(site))

    @property
    def causal(self) -> bool:
        """Whether the model is a decoder alone: every attention is causal self-attention."""
        return all(block.causal and block.kind == "self" for block in self.blocks)
