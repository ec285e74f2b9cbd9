"""Discovery by tracing: the right names, and no trace of the tracing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_outputs import BaseModelOutput

from helpers import FAMILIES, hooks_of, make_batch, tiny, weights_of
from tutelage.errors import SiteError, UnsupportedModelError
from tutelage.sites import BlockSites, discover, synthesize_inputs

_NAMES = {
    "bert": {
        "block": "bert.encoder.layer.{}",
        "attention": "bert.encoder.layer.{}.attention.self",
        "query": "bert.encoder.layer.{}.attention.self.query",
        "key": "bert.encoder.layer.{}.attention.self.key",
        "value": "bert.encoder.layer.{}.attention.self.value",
        "output": "bert.encoder.layer.{}.attention.output.dense",
        "ffn": ("bert.encoder.layer.{}.intermediate.dense", "bert.encoder.layer.{}.output.dense"),
    },
    "distilbert": {
        "block": "distilbert.transformer.layer.{}",
        "attention": "distilbert.transformer.layer.{}.attention",
        "query": "distilbert.transformer.layer.{}.attention.q_lin",
        "key": "distilbert.transformer.layer.{}.attention.k_lin",
        "value": "distilbert.transformer.layer.{}.attention.v_lin",
        "output": "distilbert.transformer.layer.{}.attention.out_lin",
        "ffn": (
            "distilbert.transformer.layer.{}.ffn.lin1",
            "distilbert.transformer.layer.{}.ffn.lin2",
        ),
    },
}
_NAMES["roberta"] = {
    role: tuple(n.replace("bert.", "roberta.", 1) for n in name)
    if isinstance(name, tuple)
    else name.replace("bert.", "roberta.", 1)
    for role, name in _NAMES["bert"].items()
}
_HEAD = {
    "bert": ("bert.pooler.dense", "classifier"),
    "roberta": ("classifier.dense", "classifier.out_proj"),
    "distilbert": ("pre_classifier", "classifier"),
}


def _expected(family: str, index: int) -> BlockSites:
    names = _NAMES[family]
    ffn = names["ffn"]
    assert isinstance(ffn, tuple)
    single = {role: str(name).format(index) for role, name in names.items() if role != "ffn"}
    return BlockSites(
        **single, ffn=tuple(n.format(index) for n in ffn), call=0, heads=4, width=8, hidden=32
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [1, 2, 3], ids=lambda n: f"{n}-layers")
def test_names_of_every_block(family: str, layers: int) -> None:
    sites = discover(tiny(family, layers=layers))
    assert sites.blocks == tuple(_expected(family, i) for i in range(layers))
    assert sites.linears[-2:] == _HEAD[family]
    assert len(sites.linears) == 6 * layers + 2
    assert sites.shape() == ((4, 8, 32),) * layers


@pytest.mark.parametrize("family", FAMILIES)
def test_a_square_block_is_told_apart(family: str) -> None:
    # FFN as wide as the model and one head: only order and tensor identity can tell the roles.
    config = tiny(family, heads=1).config
    for name in ("intermediate_size", "hidden_dim"):
        if hasattr(config, name):
            setattr(config, name, 32)
    model = type(tiny(family))(config)
    for index, block in enumerate(discover(model).blocks):
        expected = _expected(family, index)
        assert (block.query, block.key, block.value) == (
            expected.query,
            expected.key,
            expected.value,
        )
        assert (block.output, block.ffn) == (expected.output, expected.ffn)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_discover_leaves_no_trace(family: str, training: bool) -> None:
    model = tiny(family).train(training)
    model.base_model.embeddings.eval()  # a mixed state must survive as well
    hook = model.classifier.register_forward_hook(lambda *_: None)
    weights, hooks = weights_of(model), hooks_of(model)
    flags = [module.training for module in model.modules()]
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    attention, random = model.config._attn_implementation, torch.get_rng_state()

    first = discover(model)
    assert discover(model) == first

    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == flags
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), random)
    assert hooks_of(model) == hooks
    hook.remove()
    assert hooks_of(model) == {}


def test_discover_leaves_no_trace_when_the_model_fails() -> None:
    model = tiny("bert").train()
    bomb = model.bert.encoder.layer[1].intermediate.dense
    attention, random = model.config._attn_implementation, torch.get_rng_state()

    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    hook = bomb.register_forward_pre_hook(explode)
    with pytest.raises(UnsupportedModelError, match=r"synthesized input \(input_ids.*boom"):
        discover(model)
    hook.remove()
    assert hooks_of(model) == {}
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), random)


def test_discover_needs_the_model_alone() -> None:
    # The structure decides, not the values: a copy and a redrawn model have the same sites.
    model = tiny("bert")
    assert discover(copy.deepcopy(model)) == discover(tiny("bert", seed=9))


def test_a_base_model_has_sites_too() -> None:
    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4))
    assert [block.attention for block in discover(model).blocks] == [
        "encoder.layer.0.attention.self",
        "encoder.layer.1.attention.self",
    ]


def test_a_shared_block_is_counted_by_calls() -> None:
    config = AlbertConfig(
        vocab_size=48,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
    )
    blocks = discover(AlbertModel(config)).blocks
    assert [block.call for block in blocks] == [0, 1, 2]
    assert len({block.attention for block in blocks}) == 1


class _Plain(PreTrainedModel):
    config_class = PretrainedConfig
    _supports_sdpa = True

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, 8)
        self.linear = nn.Linear(8, 8)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.linear(self.embed(input_ids)))

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True


def test_a_model_without_attention_is_refused() -> None:
    model = _Plain(PretrainedConfig(vocab_size=20))
    with pytest.raises(SiteError, match=r"_Plain has no attention site.*use a Transformer model"):
        discover(model)
    assert hooks_of(model) == {}


def test_a_bare_module_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="pass a PreTrainedModel"):
        discover(nn.Linear(2, 2))


def test_an_unknown_main_input_is_refused() -> None:
    model = tiny("bert")
    model.main_input_name = "input_values"
    with pytest.raises(UnsupportedModelError, match="'input_values' as its main input"):
        synthesize_inputs(model)


def test_an_image_model_is_traced_by_its_pixels() -> None:
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=16,
        patch_size=8,
    )
    model, random = ViTModel(config), torch.get_rng_state()
    assert synthesize_inputs(model)["pixel_values"].shape == (1, 3, 16, 16)
    blocks = discover(model).blocks
    assert [b.output for b in blocks] == [f"layers.{i}.attention.o_proj" for i in range(2)]
    assert blocks[0].ffn == ("layers.0.mlp.fc1", "layers.0.mlp.fc2")
    assert torch.equal(torch.get_rng_state(), random)


def test_a_block_without_feed_forward_layers_is_refused() -> None:
    model = tiny("distilbert")
    model.distilbert.transformer.layer[1].ffn = nn.Identity()
    with pytest.raises(
        SiteError, match=r"no feed-forward Linear.*'distilbert\.transformer\.layer\.1'"
    ):
        discover(model)


def test_an_attention_that_stands_in_no_list_is_refused() -> None:
    model = tiny("distilbert", layers=1)
    layer = model.distilbert.transformer.layer[0]

    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = layer

        def __iter__(self) -> Any:
            return iter([self.only])

    model.distilbert.transformer.layer = Only()
    with pytest.raises(SiteError, match="stands in no ModuleList"):
        discover(model)


def test_synthesized_inputs_are_valid_and_draw_nothing() -> None:
    model, random = tiny("roberta"), torch.get_rng_state()
    made = synthesize_inputs(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert made["input_ids"].shape == made["attention_mask"].shape == (1, 8)
    assert made["input_ids"].max() < model.config.vocab_size
    assert model.eval()(**made).logits.isfinite().all()


def test_synthesized_inputs_respect_a_small_vocabulary() -> None:
    model = BertModel(
        BertConfig(
            vocab_size=3,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
        )
    )
    assert synthesize_inputs(model)["input_ids"].max() < 3
    assert len(discover(model).blocks) == 1


def test_the_map_is_plain_data() -> None:
    import json

    sites = discover(tiny("distilbert"))
    data = json.loads(json.dumps(sites.to_dict()))
    assert data["blocks"][1]["output"] == "distilbert.transformer.layer.1.attention.out_lin"
    assert data["linears"][-1] == "classifier"


def test_make_batch_is_padded() -> None:
    # The other tests rest on it: several lengths, one row without padding.
    lengths = make_batch(4, 7)["attention_mask"].sum(1)
    assert lengths.max() == 7
    assert len(set(lengths.tolist())) > 2
