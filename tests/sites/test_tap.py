"""Taps: transformers' own signals, replacement that is exact, and hooks that go away."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForSequenceClassification

from helpers import FAMILIES, STAGES, hooks_of, inputs_of, make_batch, pair, tiny
from tutelage._prepare import prepared
from tutelage.errors import SiteError
from tutelage.nn import use_attention
from tutelage.sites import SITES, SiteMap, Tap, discover

ALL = tuple(SITES)


def _own(model: nn.Module, sites: SiteMap, inputs: dict[str, Tensor]) -> tuple[Tensor, Any]:
    with torch.no_grad(), use_attention(model), Tap(model, sites, ALL) as tap:
        logits = model(**inputs).logits
    return logits, tap.signals()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_taps_equal_transformers_own_outputs(family: str, padded: bool) -> None:
    model = tiny(family, layers=3).eval()
    inputs = inputs_of(make_batch(padded=padded))
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = eager(**inputs, output_attentions=True, output_hidden_states=True)
    logits, ours = _own(model, discover(model), inputs)

    torch.testing.assert_close(logits, theirs.logits, atol=1e-5, rtol=0)
    hidden = (*ours["embeddings"], *ours["block_output"])
    assert len(hidden) == len(theirs.hidden_states) == 4
    for mine, other in zip(hidden, theirs.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    assert len(ours["attention_map"]) == len(theirs.attentions) == 3
    for mine, other in zip(ours["attention_map"], theirs.attentions, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_inner_signals_follow_from_each_other(family: str) -> None:
    # Scores -> map -> context -> attention output, recomputed from the weights in float64.
    model = tiny(family).eval()
    sites, inputs = discover(model), inputs_of(make_batch())
    _, found = _own(model, sites, inputs)
    real = inputs["attention_mask"].bool()
    blocked = torch.zeros(real.shape, dtype=torch.float64).masked_fill(~real, -torch.inf)
    entering = found["embeddings"][0].double()
    for i, block in enumerate(sites.blocks):

        def apply(name: str, x: Tensor) -> Tensor:
            layer = model.get_submodule(name)
            return x @ layer.weight.detach().double().T + layer.bias.detach().double()

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (4, 8)).transpose(1, 2)

        query, key, value = (
            heads(apply(getattr(block, role), entering)) for role in ("query", "key", "value")
        )
        scores = query @ key.transpose(-1, -2) / 8**0.5
        probabilities = (scores + blocked[:, None, None, :]).softmax(-1)
        context = (probabilities @ value).transpose(1, 2).flatten(-2)
        output = apply(block.output, context)
        for site, expected in (
            ("attention_scores", scores),
            ("attention_map", probabilities),
            ("context", context),
            ("attention_output", output),
        ):
            torch.testing.assert_close(found[site][i].double(), expected, atol=2e-5, rtol=1e-5)
        entering = found["block_output"][i].double()


@pytest.mark.parametrize("family", FAMILIES)
def test_ffn_input_is_the_normalised_sum_of_branch_and_residual(family: str) -> None:
    model = tiny(family).eval()
    sites, inputs = discover(model), inputs_of(make_batch())
    _, found = _own(model, sites, inputs)
    norm = {
        "bert": "attention.output.LayerNorm",
        "roberta": "attention.output.LayerNorm",
        "distilbert": "sa_layer_norm",
    }[family]
    entering = found["embeddings"][0]
    for i, block in enumerate(sites.blocks):
        layer = model.get_submodule(f"{block.block}.{norm}")
        expected = layer(found["attention_output"][i] + entering)
        torch.testing.assert_close(found["ffn_input"][i], expected, atol=1e-6, rtol=0)
        entering = found["block_output"][i]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("quantized", [False, True], ids=["plain", "ternary"])
@pytest.mark.parametrize("site", STAGES)
def test_replacing_a_signal_by_itself_changes_no_bit(
    family: str, quantized: bool, site: Any
) -> None:
    model = pair(family)[0].eval() if quantized else tiny(family).eval()
    state = prepared(model)
    sites = discover(model) if state is None else state.sites
    inputs = inputs_of(make_batch())
    with torch.no_grad(), use_attention(model):
        plain = model(**inputs).logits
    logits, own = _own(model, sites, inputs)
    assert torch.equal(logits, plain)

    seen: list[int] = []

    def same(tensor: Tensor, index: int) -> Tensor:
        seen.append(index)
        assert torch.equal(tensor, own[site][index])
        return own[site][index].clone()

    with (
        torch.no_grad(),
        use_attention(model),
        Tap(model, sites, ALL, replace=site, with_=same) as tap,
    ):
        replaced = model(**inputs).logits
    assert seen == [0, 1]
    assert torch.equal(replaced, plain)
    again = tap.signals()
    assert all(torch.equal(a, b) for s in ALL for a, b in zip(again[s], own[s], strict=True))


@pytest.mark.parametrize("site", STAGES)
def test_a_replaced_signal_is_used_and_recorded_before(site: Any) -> None:
    model = tiny("bert").eval()
    sites, inputs = discover(model), inputs_of(make_batch())
    plain, own = _own(model, sites, inputs)
    with (
        torch.no_grad(),
        use_attention(model),
        Tap(model, sites, ALL, replace=site, with_=lambda own, index: own * 0.5) as tap,
    ):
        logits = model(**inputs).logits
    assert not torch.equal(logits, plain)
    found = tap.signals()
    assert torch.equal(found[site][0], own[site][0])
    downstream = {
        "attention_map": "context",
        "context": "attention_output",
        "attention_output": "ffn_input",
    }[site]
    assert not torch.equal(found[downstream][0], own[downstream][0])  # type: ignore[index]


def test_only_the_replaced_site_changes() -> None:
    model = tiny("bert").eval()
    sites, inputs = discover(model), inputs_of(make_batch())
    _, own = _own(model, sites, inputs)
    with (
        torch.no_grad(),
        use_attention(model),
        Tap(
            model, sites, ALL, replace="attention_output", with_=lambda a, i: own["context"][i]
        ) as tap,
    ):
        model(**inputs)
    found = tap.signals()
    for site in ("embeddings", "attention_scores", "attention_map", "context", "attention_output"):
        assert torch.equal(found[site][0], own[site][0])  # type: ignore[index]
    layer = model.bert.encoder.layer[0].attention.output.LayerNorm
    expected = layer(own["context"][0] + own["embeddings"][0])
    assert torch.equal(found["ffn_input"][0], expected)


@pytest.mark.parametrize(
    "detach",
    [("query",), ("key", "value"), ("query", "key", "value")],
    ids=["query", "key-value", "all"],
)
def test_detach_cuts_the_way_back_and_keeps_the_weight(detach: Any) -> None:
    model = tiny("distilbert", layers=1).eval()
    sites, inputs = discover(model), inputs_of(make_batch())
    block = sites.blocks[0]
    with use_attention(model), Tap(model, sites, ["context", "embeddings"], detach=detach) as tap:
        model(**inputs)
    found = tap.signals()
    found["context"][0].sum().backward()
    for role in ("query", "key", "value"):
        assert model.get_submodule(getattr(block, role)).weight.grad is not None
    words = model.get_input_embeddings().weight.grad
    assert (words is None) == (len(detach) == 3)


@pytest.mark.parametrize("where", ["replacement", "module"])
def test_an_exception_leaves_nothing_behind(where: str) -> None:
    model = tiny("bert").eval()
    sites, inputs = discover(model), inputs_of(make_batch())
    attention = model.config._attn_implementation

    def explode(*_: object) -> Any:
        raise RuntimeError("boom")

    hook = None
    if where == "module":
        hook = model.bert.encoder.layer[1].register_forward_pre_hook(explode)
    replace = explode if where == "replacement" else lambda own, index: own
    with (
        pytest.raises(RuntimeError, match="boom"),
        use_attention(model),
        Tap(model, sites, ALL, replace="context", with_=replace, detach=("query",)),
    ):
        model(**inputs)
    if hook is not None:
        hook.remove()
    assert hooks_of(model) == {}
    assert model.config._attn_implementation == attention


def test_a_failed_installation_leaves_nothing_behind() -> None:
    model = tiny("bert")
    sites = discover(model)
    wrong = dataclasses.replace(sites.blocks[1], attention="bert.nowhere")
    with (
        pytest.raises(AttributeError, match="nowhere"),
        Tap(model, SiteMap((sites.blocks[0], wrong), sites.linears), ALL),
    ):
        raise AssertionError("must not be entered")
    assert hooks_of(model) == {}


def test_hooks_of_others_stay() -> None:
    model = tiny("bert").eval()
    calls: list[str] = []
    name = "bert.encoder.layer.0.attention.output.dense"
    model.get_submodule(name).register_forward_hook(lambda *_: calls.append("mine"))
    before = hooks_of(model)
    _own(model, discover(model), inputs_of(make_batch()))
    assert hooks_of(model) == before
    assert calls == ["mine"] * 2  # one by discover, one by the tapped pass


def test_a_block_that_was_skipped_is_named() -> None:
    model = tiny("bert").eval()
    sites, inputs = discover(model), inputs_of(make_batch())
    del model.bert.encoder.layer[1]
    model.config.num_hidden_layers = 1
    blocks = SiteMap((sites.blocks[0], sites.blocks[0]), sites.linears)
    with torch.no_grad(), use_attention(model), Tap(model, blocks, ["context"]) as tap:
        model(**inputs)
    with pytest.raises(SiteError, match=r"reached 'context' in 1 of 2 blocks of Bert.*skipped"):
        tap.signals()


@pytest.mark.parametrize(
    "site", ["attention_scores", "attention_map", "context", "attention_output", "block_output"]
)
def test_a_block_that_runs_more_often_is_named(site: Any) -> None:
    model = _albert()
    sites, inputs = discover(model), inputs_of(make_batch())
    fewer = SiteMap(sites.blocks[:2], sites.linears)
    with (
        torch.no_grad(),
        use_attention(model),
        pytest.raises(SiteError, match=r"ran more often than in the traced pass \('"),
        Tap(model, fewer, [site]),
    ):
        model(**inputs)
    assert hooks_of(model) == {}


@pytest.mark.parametrize("site", ["attention_scores", "block_output", "ffn_input", "embeddings"])
def test_a_site_that_cannot_be_replaced_is_refused(site: Any) -> None:
    model = tiny("bert")
    with pytest.raises(SiteError, match=rf"'{site}' cannot be replaced; use 'attention_map'"):
        Tap(model, discover(model), [], replace=site, with_=lambda own, index: own)


def test_replacing_with_nothing_is_refused() -> None:
    model = tiny("bert")
    with pytest.raises(SiteError, match="nothing was given to replace 'context' with"):
        Tap(model, discover(model), [], replace="context")


def test_fused_projections_detach_together_or_not_at_all() -> None:
    model = tiny("bert")
    sites = discover(model)
    blocks = tuple(dataclasses.replace(b, key=b.query, value=b.query) for b in sites.blocks)
    fused = SiteMap(blocks, sites.linears)
    with pytest.raises(SiteError, match=r"query' makes query together with others"):
        Tap(model, fused, [], detach=("query",))
    Tap(model, fused, [], detach=("query", "key", "value"))
    Tap(model, fused, [])


def _albert() -> nn.Module:
    config = AlbertConfig(
        vocab_size=48,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    return AlbertForSequenceClassification(config).eval()


def test_a_shared_block_records_every_call() -> None:
    model = _albert()
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    sites, inputs = discover(model), inputs_of(make_batch())
    record = [site for site in ALL if site != "embeddings"]
    with torch.no_grad():
        theirs = eager(**inputs, output_attentions=True, output_hidden_states=True)
        with use_attention(model), Tap(model, sites, record) as tap:
            model(**inputs)
    found = tap.signals()
    for mine, other in zip(found["attention_map"], theirs.attentions, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    for mine, other in zip(found["block_output"], theirs.hidden_states[1:], strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)


def test_a_shared_block_records_its_first_input() -> None:
    model = _albert()
    sites, inputs = discover(model), inputs_of(make_batch())
    with torch.no_grad(), use_attention(model), Tap(model, sites, ["embeddings"]) as tap:
        model(**inputs)
    assert len(tap.signals()["embeddings"]) == 1
