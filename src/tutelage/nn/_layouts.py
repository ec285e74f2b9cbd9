"""Where the parts of known Transformer encoder blocks are."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAYOUTS", "BlockLayout"]


@dataclass(frozen=True)
class BlockLayout:
    """Names of the submodules of an encoder block, relative to the block.

    Post-norm: ``h = norm1(x + attention(x)); y = norm2(h + ffn(h))``. Pre-norm:
    ``h = x + attention(norm1(x)); y = h + ffn(norm2(h))``.

    Attributes:
        attention: The module that holds the attention quantizers.
        query: Projection of the queries.
        key: Projection of the keys.
        value: Projection of the values.
        output: Projection of the context.
        norm1: First layer norm.
        up: First Linear of the feed-forward network.
        activation: What is applied to its output.
        down: Second Linear.
        norm2: Second layer norm.
        pre_norm: Which of the two it is.
    """

    attention: str
    query: str
    key: str
    value: str
    output: str
    norm1: str
    up: str
    activation: str
    down: str
    norm2: str
    pre_norm: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """The six Linears, in the order of the computation."""
        return (self.query, self.key, self.value, self.output, self.up, self.down)


_BERT = BlockLayout(
    attention="attention.self",
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    output="attention.output.dense",
    norm1="attention.output.LayerNorm",
    up="intermediate.dense",
    activation="intermediate.intermediate_act_fn",
    down="output.dense",
    norm2="output.LayerNorm",
)
_DISTILBERT = BlockLayout(
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    output="attention.out_lin",
    norm1="sa_layer_norm",
    up="ffn.lin1",
    activation="ffn.activation",
    down="ffn.lin2",
    norm2="output_layer_norm",
)
_VIT = BlockLayout(
    attention="attention",
    query="attention.q_proj",
    key="attention.k_proj",
    value="attention.v_proj",
    output="attention.o_proj",
    norm1="layernorm_before",
    up="mlp.fc1",
    activation="mlp.activation_fn",
    down="mlp.fc2",
    norm2="layernorm_after",
    pre_norm=True,
)

LAYOUTS: dict[str, BlockLayout] = {
    "BertLayer": _BERT,
    "CamembertLayer": _BERT,
    "DeiTLayer": _VIT,
    "ElectraLayer": _BERT,
    "RobertaLayer": _BERT,
    "TransformerBlock": _DISTILBERT,
    "ViTLayer": _VIT,
    "XLMRobertaLayer": _BERT,
}
"""Layouts by the class of a block; add yours."""
