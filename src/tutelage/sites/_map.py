"""Where the inner signals of a model are, as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

__all__ = ["SITES", "BlockSites", "Site", "SiteMap"]

Site = Literal[
    "attention_scores",
    "attention_map",
    "context",
    "attention_output",
    "ffn_input",
    "block_output",
    "embeddings",
]
"""Names of the signals of a block (``embeddings`` is the input of the first one).

* ``attention_scores``: (batch, heads, queries, keys), scaled, before the mask.
* ``attention_map``: the same shape, after the softmax, before dropout.
* ``context``: (batch, tokens, heads * width), input of the output projection.
* ``attention_output``: (batch, tokens, hidden), its output with bias, before dropout and residual.
* ``ffn_input``: (batch, tokens, hidden), input of the first feed-forward Linear.
* ``block_output``: (batch, tokens, hidden), the residual stream after the block.
"""

SITES: tuple[Site, ...] = get_args(Site)


@dataclass(frozen=True)
class BlockSites:
    """The modules of one Transformer block, by qualified name.

    Attributes:
        block: The block itself.
        attention: The module that calls the attention function.
        call: How many calls of that module came before in one forward pass; 0 unless shared.
        query: Projection that makes the queries.
        key: Projection that makes the keys.
        value: Projection that makes the values.
        output: The attention output projection.
        ffn: The feed-forward projections in call order.
        heads: Number of query heads.
        width: Width of one head.
        hidden: Width of the residual stream.
    """

    block: str
    attention: str
    call: int
    query: str
    key: str
    value: str
    output: str
    ffn: tuple[str, ...]
    heads: int
    width: int
    hidden: int


@dataclass(frozen=True)
class SiteMap:
    """All blocks of a model in call order.

    Attributes:
        blocks: One entry per attention call.
        linears: Every Linear that ran in the traced forward pass, in order of its first call.
    """

    blocks: tuple[BlockSites, ...]
    linears: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON-able data."""
        return {"blocks": [asdict(b) for b in self.blocks], "linears": list(self.linears)}

    def shape(self) -> tuple[tuple[int, int, int], ...]:
        """Returns (heads, width, hidden) of every block: what teacher and student must share."""
        return tuple((b.heads, b.width, b.hidden) for b in self.blocks)
