"""Which modules a scheme names, which share one weight, and what is refused."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from families import make_any_student, make_model, output_of, weight_map
from helpers import tiny
from tutelage import Scheme, prepare, summary
from tutelage._resolve import refuse_unsupported, resolve
from tutelage.errors import SchemeError, UnsupportedModelError
from tutelage.nn import QuantConv2d, QuantEmbedding, QuantLinear, QuantWeight
from tutelage.scheme import ActivationSpec, ModuleSpec, Rule, WeightSpec
from tutelage.sites import SiteMap

TERNARY = Scheme.preset("ternary-a8")
BINARY = WeightSpec(kind="binary")


def with_rules(*rules: Rule) -> Scheme:
    return TERNARY.model_copy(update={"rules": rules})


def shared(student: Any) -> dict[str, str | None]:
    return {n: s.shared_with for n, s in weight_map(student).items() if s.shared_with}


# Exactly the modules that are meant.


def test_llama_quantizes_gate_up_and_down() -> None:
    found = weight_map(make_any_student("llama"))
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    parts += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    layers = {f"model.layers.{i}.{part}" for i in range(2) for part in parts}
    assert set(found) == layers | {"model.embed_tokens"}
    assert {spec.kind for name, spec in found.items() if name in layers} == {"linear"}


def test_dinov2_keeps_patches_positions_and_layer_scale() -> None:
    student = make_any_student("dinov2")
    found = weight_map(student)
    base = {n for n, m in student.dinov2.named_modules(prefix="dinov2") if isinstance(m, nn.Linear)}
    assert len(base) == 2 * 6
    assert set(found) == base
    assert type(student.dinov2.embeddings.patch_embeddings.projection) is nn.Conv2d
    scales = [p for n, p in student.named_parameters() if "layer_scale" in n]
    assert len(scales) == 4


def test_gpt2_quantizes_every_conv1d() -> None:
    student = make_any_student("gpt2")
    found = weight_map(student)
    conv1d = {name for name, module in student.named_modules() if isinstance(module, Conv1D)}
    assert len(conv1d) == 8
    assert {name for name, spec in found.items() if spec.kind == "conv1d"} == conv1d
    assert set(found) == conv1d | {"transformer.wte", "lm_head"}
    assert type(student.transformer.wpe) is nn.Embedding


def test_t5_keeps_relative_positions() -> None:
    student = make_any_student("t5")
    found = weight_map(student)
    tables = {n for n, m in student.named_modules() if isinstance(m, nn.Embedding)}
    assert sum("relative_attention_bias" in name for name in tables) == 2
    kept = {name for name in tables if name not in found}
    assert all("relative_attention_bias" in name for name in kept)
    assert len(kept) == 2
    linears = {n for n, m in student.named_modules() if isinstance(m, nn.Linear)}
    assert linears == {n for n, spec in found.items() if spec.kind == "linear"}
    assert len(linears) == 2 * (4 + 2) + 2 * (8 + 2) + 1


def test_albert_uses_one_block_many_times() -> None:
    found = weight_map(make_any_student("albert-mlm"))
    block = "albert.encoder.albert_layer_groups.0.albert_layers.0"
    assert sum(name.startswith(f"{block}.") for name in found) == 6


def test_a_classifier_whose_base_goes_by_another_name_keeps_its_head() -> None:
    from transformers import CLIPForImageClassification, CLIPVisionConfig
    from transformers.models.clip.configuration_clip import CLIPConfig

    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1}
    vision = CLIPVisionConfig(**sizes, num_attention_heads=4, image_size=16, patch_size=4)
    text = {**sizes, "num_attention_heads": 4, "vocab_size": 8, "bos_token_id": 1}
    config = CLIPConfig(
        vision_config=vision.to_dict(), text_config={**text, "eos_token_id": 2, "pad_token_id": 0}
    )
    found = resolve(CLIPForImageClassification(config), TERNARY, SiteMap((), ()))
    assert "classifier" not in found
    assert len(found) == 6


# Tied embeddings and heads.

TIED = {
    "gpt2": ("transformer.wte", {"lm_head"}),
    "llama-tied": ("model.embed_tokens", {"lm_head"}),
    "gemma3": ("model.embed_tokens", {"lm_head"}),
    "opt-projected": ("model.decoder.embed_tokens", {"lm_head"}),
    "bert-mlm": ("bert.embeddings.word_embeddings", {"cls.predictions.decoder"}),
    "albert-mlm": ("albert.embeddings.word_embeddings", {"predictions.decoder"}),
    "t5": ("shared", {"encoder.embed_tokens", "decoder.embed_tokens", "lm_head"}),
    "bart-scaled": (
        "model.shared",
        {"model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"},
    ),
}


@pytest.mark.parametrize("name", TIED)
def test_what_is_tied_shares_weight_and_quantizer(name: str) -> None:
    owner, others = TIED[name]
    model = make_model(name)
    weight = model.get_parameter(f"{owner}.weight")
    student = prepare(model, TERNARY)
    assert shared(student) == dict.fromkeys(others, owner)
    table = student.get_submodule(owner)
    assert isinstance(table, QuantEmbedding)
    assert table.weight is weight
    for other in others:
        module = student.get_submodule(other)
        assert isinstance(module, QuantWeight)
        assert module.weight is table.weight
        assert module.weight_quantizer is table.weight_quantizer
        spec = weight_map(student)[other]
        if isinstance(module, QuantLinear):
            assert (spec.weight, spec.input) == (TERNARY.embedding, TERNARY.input)
            assert spec.arithmetic == TERNARY.arithmetic
    assert output_of(student).isfinite().all()


def test_a_tied_head_multiplies_by_what_the_lookup_returns() -> None:
    student = make_any_student("llama-tied")
    values = student.model.embed_tokens(torch.arange(student.config.vocab_size))
    x = torch.randn(5, 32)
    want = student.lm_head.input_quantizer(x).double() @ values.double().T
    torch.testing.assert_close(student.lm_head(x).double(), want, atol=1e-5, rtol=1e-5)


def test_the_gradient_of_a_tied_weight_is_the_sum_of_both_uses() -> None:
    student = make_any_student("llama-tied")
    weight = student.model.embed_tokens.weight
    ids, g = torch.tensor([[4, 4, 9]]), torch.randn(1, 3, 32)
    x = torch.randn(2, 32)
    (student.model.embed_tokens(ids) * g).sum().backward()
    lookup, weight.grad = weight.grad.clone(), None
    student.lm_head(x).square().sum().backward()
    head, weight.grad = weight.grad.clone(), None
    assert lookup.abs().sum() > 0
    assert head.abs().sum() > 0
    assert (lookup.abs().sum(-1) > 0).nonzero().flatten().tolist() == [4, 9]
    ((student.model.embed_tokens(ids) * g).sum() + student.lm_head(x).square().sum()).backward()
    torch.testing.assert_close(weight.grad, lookup + head)


def test_the_summary_counts_a_shared_weight_once() -> None:
    student = make_any_student("t5")
    found = summary(student)
    rows = {row.module: row for row in found.rows}
    assert rows["shared"].packed_bytes == 48 * 8 + 4 * 48
    for name in ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head"):
        assert (rows[name].packed_bytes, rows[name].float_bytes) == (0, 0)
        assert rows[name].scheme.endswith(", shared with shared")
        assert rows[name].bits == 2
    assert rows["lm_head"].scheme == "ternary per row, input 8 bits, shared with shared"
    assert found.float_bytes == 4 * sum(p.numel() for p in student.parameters())


def test_an_untied_head_stays_in_full_precision_unless_a_rule_names_it() -> None:
    assert type(make_any_student("llama").lm_head) is nn.Linear
    rule = Rule(pattern="lm_head", weight=BINARY, input=ActivationSpec(bits=4))
    student = prepare(make_model("llama"), with_rules(rule))
    spec = weight_map(student)["lm_head"]
    assert (spec.weight, spec.input, spec.shared_with) == (rule.weight, rule.input, None)
    assert shared(student) == {}
    assert isinstance(student.lm_head, QuantLinear)
    kept = prepare(make_model("llama"), with_rules(Rule(pattern="lm_head")))
    assert type(kept.lm_head) is nn.Linear


@pytest.mark.parametrize("pattern", ["lm_head", r"model\.embed_tokens", r"lm_head|.*embed_tokens"])
def test_a_rule_about_one_keeps_table_and_head(pattern: str) -> None:
    student = prepare(make_model("llama-tied"), with_rules(Rule(pattern=pattern)))
    assert type(student.lm_head) is nn.Linear
    assert type(student.model.embed_tokens) is nn.Embedding
    assert student.lm_head.weight is student.model.embed_tokens.weight


def test_a_rule_about_the_head_decides_on_the_table_too() -> None:
    rule = Rule(pattern="lm_head", weight=BINARY)
    found = weight_map(prepare(make_model("llama-tied"), with_rules(rule)))
    assert found["model.embed_tokens"].weight == found["lm_head"].weight == BINARY
    assert found["lm_head"].input is None


def test_rules_that_disagree_about_one_weight_are_refused() -> None:
    rules = Rule(pattern="lm_head"), Rule(pattern=".*embed_tokens", weight=BINARY)
    with pytest.raises(
        SchemeError, match=r"'model.embed_tokens' and 'lm_head' share one weight.*matches both"
    ):
        prepare(make_model("llama-tied"), with_rules(*rules))


def test_without_a_spec_for_embeddings_table_and_head_stay() -> None:
    scheme = TERNARY.model_copy(update={"embedding": None})
    student = prepare(make_model("llama-tied"), scheme)
    assert type(student.lm_head) is nn.Linear
    assert type(student.model.embed_tokens) is nn.Embedding


def test_untied_tables_of_encoder_and_decoder_are_quantized_each() -> None:
    found = weight_map(make_any_student("bart-untied"))
    tables = {name: spec for name, spec in found.items() if spec.kind == "embedding"}
    assert {"model.encoder.embed_tokens", "model.decoder.embed_tokens"} <= set(tables)
    assert {spec.shared_with for spec in tables.values()} == {None}
    assert "lm_head" not in found


# Other modules that share.


def two_that_share(kind: str) -> Any:
    model = tiny("bert")
    layers = model.bert.encoder.layer
    if kind == "two linears":
        layers[1].attention.self.query.weight = layers[0].attention.self.query.weight
    elif kind == "with the head":
        model.classifier = nn.Linear(32, 32)
        model.classifier.weight = layers[0].attention.self.query.weight
    else:
        model.bert.encoder.alias = layers[0].attention.self.query.weight
    return model


def test_two_linears_that_share_are_quantized_as_one() -> None:
    student = prepare(two_that_share("two linears"), TERNARY)
    first, second = (f"bert.encoder.layer.{i}.attention.self.query" for i in range(2))
    assert shared(student) == {second: first}
    one, other = student.get_submodule(first), student.get_submodule(second)
    assert one.weight is other.weight
    assert one.weight_quantizer is other.weight_quantizer


@pytest.mark.parametrize("kind", ["with the head", "another parameter"])
def test_sharing_with_what_stays_is_refused_with_a_remedy_that_works(kind: str) -> None:
    model = two_that_share(kind)
    with pytest.raises(
        UnsupportedModelError, match=r"share one weight and only one of them"
    ) as error:
        prepare(model, TERNARY)
    pattern = str(error.value).split("pattern='")[1].split("'")[0]
    prepare(model, with_rules(Rule(pattern=pattern)))


def test_sharing_with_two_specs_is_refused() -> None:
    rule = Rule(pattern=r".*layer\.1.*query", weight=BINARY)
    with pytest.raises(UnsupportedModelError, match="share one weight that would be quantized in"):
        prepare(two_that_share("two linears"), with_rules(rule))


def test_one_module_under_two_names_is_refused() -> None:
    model = tiny("bert")
    model.bert.encoder.twin = model.bert.encoder.layer[0].output.dense
    with pytest.raises(UnsupportedModelError, match="are one module under two names"):
        prepare(model, TERNARY)


# Patch embeddings.

PATCH = Rule(pattern=r".*patch_embeddings\.projection", weight=BINARY, input=ActivationSpec(bits=8))


@pytest.mark.parametrize("preset", Scheme.presets())
def test_no_preset_touches_the_patch_embedding(preset: str) -> None:
    found = resolve(make_model("vit"), Scheme.preset(preset), SiteMap((), ()))
    assert not any("patch" in name for name in found)


@pytest.mark.parametrize("name", ["vit", "dinov2"])
def test_a_rule_quantizes_the_patch_embedding(name: str) -> None:
    student = prepare(make_model(name), with_rules(PATCH))
    patches = [m for m in student.modules() if isinstance(m, nn.Conv2d)]
    assert [type(m) for m in patches] == [QuantConv2d]
    (spec,) = [s for s in weight_map(student).values() if s.kind == "conv2d"]
    assert spec == ModuleSpec(kind="conv2d", weight=BINARY, input=PATCH.input)
    assert not torch.equal(output_of(student), output_of(make_any_student(name)))


@pytest.mark.parametrize(
    "more",
    [
        {"stride": 2},
        {"padding": 1},
        {"padding": "same", "stride": 1},
        {"groups": 3},
        {"dilation": 2},
    ],
    ids=str,
)
def test_any_other_convolution_that_a_rule_names_is_refused(more: dict[str, Any]) -> None:
    model = make_model("vit")
    before = copy.deepcopy(model.state_dict())
    embeddings = model.vit.embeddings.patch_embeddings
    embeddings.projection = nn.Conv2d(3, 33, 4, **({"stride": 4} | more))
    found = resolve(model, with_rules(PATCH), SiteMap((), ()))
    with pytest.raises(UnsupportedModelError, match=r"projection' is a Conv2d whose stride.*Rule"):
        refuse_unsupported(model, found)
    assert before.keys() == model.state_dict().keys()
    kept = Rule(pattern=PATCH.pattern)
    refuse_unsupported(model, resolve(model, with_rules(kept), SiteMap((), ())))


# Embeddings with a forward of their own.


@pytest.mark.parametrize("name", ["gemma3", "bart-scaled"])
def test_scaled_embeddings_keep_their_scale(name: str) -> None:
    model = make_model(name)
    plain = model.get_input_embeddings()
    cls, scale = type(plain), 32**0.5
    assert cls is not nn.Embedding
    ids = torch.tensor([[4, 5, 6]])
    unscaled = TERNARY.embedding.build()(plain.weight.detach())[ids]
    student = prepare(model, TERNARY)
    words = student.get_input_embeddings()
    assert isinstance(words, cls)
    assert isinstance(words, QuantEmbedding)
    torch.testing.assert_close(words(ids), unscaled * scale)


def test_an_embedding_that_bypasses_the_lookup_is_refused() -> None:
    class Own(nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.weight[ids]

    model = make_model("llama-tied")
    model.model.embed_tokens.__class__ = Own
    told = r"'model.embed_tokens' is a Own, which does not look its rows up.*exclude it with a Rule"
    with pytest.raises(UnsupportedModelError, match=told):
        prepare(model, TERNARY)
    assert type(model.model.embed_tokens) is Own
    prepare(model, with_rules(Rule(pattern=re.escape("model.embed_tokens"))))
    assert output_of(model).isfinite().all()
