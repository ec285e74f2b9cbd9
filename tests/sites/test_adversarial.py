"""Models that tracing could misread end in the right sites or in a typed error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from helpers import redraw
from tutelage.errors import SiteError
from tutelage.nn import use_attention
from tutelage.sites import Tap, discover

_WIDTH, _HEADS = 16, 2


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (_HEADS, -1)).transpose(1, 2)


class _Attention(nn.Module):
    """Attention by hand; with ``dropout`` the map passes through a module."""

    def __init__(self, dropout: bool = True, fused: bool = False) -> None:
        super().__init__()
        # Names that mislead: a reader of names would take them for others.
        self.output = nn.Linear(_WIDTH, _WIDTH)
        self.value = nn.Linear(_WIDTH, _WIDTH)
        self.dense = nn.Linear(_WIDTH, _WIDTH)
        self.query = nn.Linear(_WIDTH, _WIDTH)
        self.drop = nn.Dropout(0.0) if dropout else None
        self.fused = fused

    def context(self, x: Tensor) -> Tensor:
        # "output" makes the queries, "value" the keys, "dense" the values, "query" comes last.
        q, k, v = _heads(self.output(x)), _heads(self.value(x)), _heads(self.dense(x))
        if self.fused:
            made = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            maps = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
            made = (maps if self.drop is None else self.drop(maps)) @ v
        return made.transpose(1, 2).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(self.context(x))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = _Attention()
        self.up, self.down = nn.Linear(_WIDTH, 24), nn.Linear(24, _WIDTH)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.feed_forward(x)


class _Model(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(PretrainedConfig(vocab_size=20))
        self.words = nn.Embedding(20, _WIDTH)
        self.blocks = nn.ModuleList(blocks)
        self.post_init()
        redraw(self)
        self.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> BaseModelOutput:
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutput(last_hidden_state=x)


def _ids() -> Tensor:
    return torch.arange(12).reshape(2, 6)


def _check_roles(model: Any, entries: int) -> None:
    sites = discover(model)
    assert len(sites.blocks) == entries
    for block in sites.blocks:
        assert block.query == f"{block.attention}.output"
        assert block.key == f"{block.attention}.value"
        assert block.value == f"{block.attention}.dense"
        assert block.output == f"{block.attention}.query"
        assert (block.heads, block.width, block.hidden) == (_HEADS, _WIDTH // _HEADS, _WIDTH)


def test_attention_by_hand_is_found_by_its_softmax() -> None:
    model = _Model(_Block(), _Block())
    _check_roles(model, 2)
    sites = discover(model)
    assert [b.map_module for b in sites.blocks] == [f"blocks.{i}.attention.drop" for i in range(2)]
    assert not any(b.interface for b in sites.blocks)
    with torch.no_grad(), use_attention(model), Tap(model, sites, ("attention_map",)) as tap:
        model(_ids())
    maps = tap.signals()["attention_map"]
    assert all(torch.allclose(m.sum(-1), torch.ones(()), atol=1e-6) for m in maps)


@pytest.mark.parametrize("fused", [False, True], ids=["softmax", "sdpa"])
def test_a_map_out_of_reach_is_refused_where_it_is_wanted(fused: bool) -> None:
    block = _Block()
    block.attention = _Attention(dropout=False, fused=fused)
    model = _Model(block, _Block())
    _check_roles(model, 2)
    sites = discover(model)
    assert sites.blocks[0].map_module is None
    with pytest.raises(SiteError, match=r"'blocks\.0\.attention'.*out of reach"):
        Tap(model, sites, ("attention_map",))
    Tap(model, sites, ("context", "attention_output"))


class _Two(_Block):
    """Two attentions in one block."""

    def __init__(self) -> None:
        super().__init__()
        self.second = _Attention()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.second(x)
        return x + self.feed_forward(x)


def test_a_block_with_two_attentions_has_two_entries() -> None:
    model = _Model(_Two(), _Two())
    _check_roles(model, 4)
    sites = discover(model)
    assert [b.ends_block for b in sites.blocks] == [False, True] * 2
    assert [bool(b.ffn) for b in sites.blocks] == [False, True] * 2
    assert sites.at("block_output") == (1, 3)
    assert sites.at("embeddings") == (0,)
    with torch.no_grad(), use_attention(model), Tap(model, sites, ("block_output",)) as tap:
        out = model(_ids()).last_hidden_state
    assert torch.equal(tap.signals()["block_output"][1], out)


class _ContextTwice(_Block):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        context = self.attention.context(x)
        x = x + self.attention.query(context) + self.other(context)
        return x + self.feed_forward(x)


def test_a_context_that_two_linears_take_is_refused() -> None:
    with pytest.raises(SiteError, match=r"goes into 2 Linears \(blocks\.0\.attention\.query, "):
        discover(_Model(_ContextTwice()))


class _OutputTwice(_Block):
    """The attention output enters the residual stream and a gate."""

    def forward(self, x: Tensor) -> Tensor:
        out = self.attention(x)
        x = x + out
        return x + out.sigmoid() * self.feed_forward(x)


def test_an_attention_output_used_twice_is_replaced_for_both() -> None:
    model = _Model(_OutputTwice())
    _check_roles(model, 1)
    sites = discover(model)
    other = torch.randn(2, 6, _WIDTH, generator=torch.Generator().manual_seed(0))
    with (
        torch.no_grad(),
        Tap(
            model, sites, ("ffn_input",), replace="attention_output", with_=lambda *_: other
        ) as tap,
    ):
        out = model(_ids()).last_hidden_state
        x = model.words(_ids()) + other
    block: Any = model.blocks[0]
    assert torch.equal(tap.signals()["ffn_input"][0], x)
    with torch.no_grad():
        assert torch.equal(out, x + other.sigmoid() * block.feed_forward(x))


class _Residual(_Block):
    """Scaled branches, and a residual that skips the attention."""

    def forward(self, x: Tensor) -> Tensor:
        y = 0.5 * x - 2.0 * self.attention(x.tanh())
        return x + 0.1 * self.feed_forward(y)


def test_a_residual_of_another_kind_changes_no_role() -> None:
    _check_roles(_Model(_Residual(), _Residual()), 2)


class _Elsewhere(_Block):
    """The output projection also serves as something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.attention.query(x))


def test_an_output_projection_with_a_second_job_is_refused() -> None:
    with pytest.raises(SiteError, match=r"'blocks\.0\.attention\.query' runs 2 times"):
        discover(_Model(_Elsewhere()))


class _Bare(_Block):
    """No output projection: the context is added as it is."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention.context(x)
        return x + self.feed_forward(x)


def test_attention_without_an_output_projection_is_refused() -> None:
    with pytest.raises(SiteError, match=r"goes into \d+ Linears"):
        discover(_Model(_Bare(), _Bare()))


class _Plain(_Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.feed_forward(x)


def test_a_model_without_attention_is_refused() -> None:
    with pytest.raises(SiteError, match="has no attention site"):
        discover(_Model(_Plain()))


class _Gated(_Block):
    """A gate on the context: the output projection takes two things."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        context = self.attention.context(x) * self.gate(x).sigmoid()
        x = x + self.attention.query(context)
        return x + self.feed_forward(x)


def test_values_that_cannot_be_told_from_a_gate_are_refused() -> None:
    with pytest.raises(SiteError, match="2 to its values"):
        discover(_Model(_Gated()))


def test_discovery_of_a_refused_model_leaves_nothing() -> None:
    from helpers import hooks_of

    model = _Model(_Gated())
    with pytest.raises(SiteError):
        discover(model)
    assert hooks_of(model) == {}
    assert all(p.grad is None for p in model.parameters())
