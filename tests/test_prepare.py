"""Preparing a model: what changes, what stays, what is refused, what it weighs."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel

import tutelage
from helpers import (
    FAMILIES,
    VOCAB,
    hooks_of,
    inputs_of,
    logits_of,
    make_batch,
    redraw,
    same_bits,
    tiny,
    tiny_config,
)
from tutelage import Scheme, prepare, summary
from tutelage._prepare import prepared
from tutelage.errors import SchemeError, SiteError, UnsupportedModelError
from tutelage.nn import AttentionQuantizer, QuantEmbedding, QuantLinear
from tutelage.quantizers import BinaryQuantizer, TernaryQuantizer
from tutelage.scheme import ActivationSpec, ModuleSpec, Rule, WeightSpec

TERNARY = Scheme.preset("ternary-a8")
_HEADS = {
    "bert": {"classifier"},
    "roberta": {"classifier.dense", "classifier.out_proj"},
    "distilbert": {"pre_classifier", "classifier"},
}
_WORDS = {name: f"{name}.embeddings.word_embeddings" for name in FAMILIES}


def _untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    assert prepared(model) is None
    assert not any(isinstance(m, QuantLinear | QuantEmbedding) for m in model.modules())
    assert not any("quantizer" in name for name, _ in model.named_modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert hooks_of(model) == {}


# What changes, and what stays.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", Scheme.presets())
def test_names_and_weights_stay(family: str, preset: str) -> None:
    model = tiny(family)
    before = copy.deepcopy(model)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    assert prepare(model, Scheme.preset(preset)) is model
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == list(before.state_dict())
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert type(model) is type(before)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_quantized(family: str) -> None:
    model = prepare(tiny(family), TERNARY)
    linears = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    plain = {n for n, m in model.named_modules() if type(m) is nn.Linear}
    assert plain == _HEADS[family]
    assert len(linears) == 12 + (family == "bert")  # the pooler
    embeddings = {n for n, m in model.named_modules() if isinstance(m, QuantEmbedding)}
    assert embeddings == {_WORDS[family]}
    state = prepared(model)
    assert state is not None
    attentions = {n for n, m in model.named_modules() if "attention_quantizer" in m._modules}
    assert attentions == {block.attention for block in state.sites.blocks}
    assert set(state.modules) == linears | embeddings | attentions
    assert state.scheme is TERNARY
    for name in attentions:
        made = model.get_submodule(f"{name}.attention_quantizer")
        assert isinstance(made, AttentionQuantizer)
    for name in linears:
        made = model.get_submodule(name)
        assert isinstance(made.weight_quantizer, TernaryQuantizer)
        assert made.input_quantizer is not None


def test_a_base_model_is_quantized_whole() -> None:
    model = prepare(BertModel(tiny_config("bert")), TERNARY)
    assert not any(type(m) is nn.Linear for m in model.modules())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_flags_hooks_and_random_state_are_kept(family: str, training: bool) -> None:
    model = tiny(family).train(training)
    model.base_model.embeddings.train(not training)
    model.classifier.requires_grad_(False)
    names = [name for name, _ in model.named_modules()]
    flags = {name: module.training for name, module in model.named_modules()}
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    calls: list[str] = []
    linear = next(m for m in model.base_model.modules() if type(m) is nn.Linear)
    linear.register_forward_hook(lambda *_: calls.append("mine"))
    hooks, random = hooks_of(model), torch.get_rng_state()
    prepare(model, TERNARY)
    assert {name: model.get_submodule(name).training for name in names} == flags
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert hooks_of(model) == hooks
    assert torch.equal(torch.get_rng_state(), random)
    calls.clear()
    model(**inputs_of(make_batch()))
    assert calls == ["mine"]


def test_the_forward_is_quantized() -> None:
    # Snap the weights to the grid and compare with a full-precision model that has them.
    scheme = Scheme(weight=WeightSpec(kind="ternary"), embedding=WeightSpec(kind="ternary"))
    plain = tiny("bert").eval()
    student = prepare(copy.deepcopy(plain), scheme)
    state = prepared(student)
    assert state is not None
    snapped = copy.deepcopy(plain)
    with torch.no_grad():
        for name, spec in state.modules.items():
            assert spec.weight is not None
            weight = snapped.get_submodule(name).weight
            values = spec.weight.build()(weight)
            levels = [len(row.unique()) for row in values]
            assert max(levels) == 3
            weight.copy_(values)
        inputs = inputs_of(make_batch())
        torch.testing.assert_close(
            student(**inputs).logits, snapped(**inputs).logits, atol=1e-5, rtol=1e-5
        )
        assert not torch.allclose(student(**inputs).logits, plain(**inputs).logits, atol=1e-2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_upcast(family: str, dtype: torch.dtype) -> None:
    model = tiny(family).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prepare(model.eval(), TERNARY)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name].float())
    logits = model(**inputs_of(make_batch())).logits
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()


def test_a_configuration_of_its_own() -> None:
    config = tiny_config("bert")
    first, second = (BertForSequenceClassification(config).eval() for _ in range(2))
    assert first.config is second.config
    implementation = second.config._attn_implementation
    inputs = inputs_of(make_batch())
    with torch.no_grad():
        before = second(**inputs).logits
    prepare(first, TERNARY)
    assert first.config is not second.config
    assert first.config._attn_implementation == "tutelage"
    assert second.config._attn_implementation == implementation
    assert config._attn_implementation == implementation
    assert getattr(config, "quantization_config", None) is None
    for module in second.modules():
        if hasattr(module, "config"):
            assert module.config is config
    inner = {id(m.config) for m in first.modules() if hasattr(m, "config")}
    assert inner == {id(first.config)}  # one object for all its parts, not a copy each
    with torch.no_grad():
        assert torch.equal(second(**inputs).logits, before)


def test_a_copy_of_a_student_is_a_student() -> None:
    student = prepare(tiny("bert"), TERNARY).eval()
    other = copy.deepcopy(student)
    assert prepared(other) == prepared(student)
    inputs = inputs_of(make_batch())
    with torch.no_grad():
        assert torch.equal(student(**inputs).logits, other(**inputs).logits)
        redraw(other, seed=4)
        assert not torch.equal(student(**inputs).logits, other(**inputs).logits)


@pytest.mark.parametrize("preset", Scheme.presets())
def test_zero_rows_and_zero_inputs_stay_finite(preset: str) -> None:
    model = tiny("bert")
    with torch.no_grad():
        model.get_input_embeddings().weight[1] = 0.0  # as transformers draws the padding row
        model.bert.encoder.layer[0].intermediate.dense.weight.zero_()
        model.bert.encoder.layer[0].intermediate.dense.bias.zero_()
        model.bert.encoder.layer[1].attention.self.value.weight[3] = 0.0
    student = prepare(model, Scheme.preset(preset)).eval()
    output = student(**make_batch())
    assert output.logits.isfinite().all()
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


# Rules.


def test_a_rule_excludes() -> None:
    rule = Rule(pattern=r"bert\.encoder\.layer\.1\..*")
    student = prepare(tiny("bert"), TERNARY.model_copy(update={"rules": (rule,)}))
    quantized = {n for n, m in student.named_modules() if isinstance(m, QuantLinear)}
    assert quantized
    assert not any("layer.1." in name for name in quantized)
    assert type(student.bert.encoder.layer[1].output.dense) is nn.Linear


def test_a_rule_overrides() -> None:
    rules = (
        Rule(
            pattern=r".*\.(query|key)",
            weight=WeightSpec(kind="binary", granularity="tensor"),
            input=ActivationSpec(bits=4),
        ),
        Rule(pattern=r".*word_embeddings", weight=WeightSpec(kind="binary")),
    )
    student = prepare(tiny("bert"), TERNARY.model_copy(update={"rules": rules}))
    attention = student.bert.encoder.layer[0].attention.self
    assert isinstance(attention.query.weight_quantizer, BinaryQuantizer)
    assert attention.query.weight_quantizer.granularity == "tensor"
    assert attention.query.input_quantizer.grid.hi == 7
    assert isinstance(attention.value.weight_quantizer, TernaryQuantizer)
    words = student.get_input_embeddings()
    assert isinstance(words.weight_quantizer, BinaryQuantizer)


@pytest.mark.parametrize("pattern", ["encoder.layer.0", "classifier", ".*LayerNorm"])
def test_a_rule_that_matches_nothing_is_refused(pattern: str) -> None:
    model = tiny("bert")
    before = copy.deepcopy(model.state_dict())
    scheme = TERNARY.model_copy(update={"rules": (Rule(pattern=pattern),)})
    told = rf"rule '{re.escape(pattern)}' matches none of the 14 modules.*must match a whole name"
    with pytest.raises(SchemeError, match=told):
        prepare(model, scheme)
    _untouched(model, before)


def test_a_scheme_that_matches_nothing_is_refused() -> None:
    model = tiny("bert")
    before = copy.deepcopy(model.state_dict())
    scheme = TERNARY.model_copy(update={"rules": (Rule(pattern=".*"),), "name": "mine"})
    with pytest.raises(SchemeError, match=r"scheme 'mine' matches no module of BertForSequence"):
        prepare(model, scheme)
    _untouched(model, before)
    prepare(model, TERNARY)  # and can be prepared after all


# Refusals.


def test_preparing_twice_is_refused() -> None:
    student = prepare(tiny("bert"), TERNARY)
    state = prepared(student)
    with pytest.raises(UnsupportedModelError, match=r"prepared already; load the full-precision"):
        prepare(student, Scheme.preset("binary-a8"))
    with pytest.raises(UnsupportedModelError, match="prepared already"):
        prepare(copy.deepcopy(student), TERNARY)
    assert prepared(student) is state


def test_a_patched_forward_is_refused() -> None:
    # accelerate's device_map hooks replace forward on the instance, which a class change misses.
    model = tiny("bert")
    before = copy.deepcopy(model.state_dict())
    dense = model.bert.encoder.layer[1].intermediate.dense
    plain = dense.forward
    dense.forward = lambda x: plain(x)
    name = r"bert\.encoder\.layer\.1\.intermediate\.dense"
    with pytest.raises(
        UnsupportedModelError, match=rf"forward of '{name}' was replaced.*device_map"
    ):
        prepare(model, TERNARY)
    _untouched(model, before)
    rule = Rule(pattern=name)
    prepare(model, TERNARY.model_copy(update={"rules": (rule,)}))


def test_accelerates_hooks_are_refused() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny("bert")
    add_hook_to_module(model.bert.encoder.layer[0].output.dense, ModelHook())
    with pytest.raises(UnsupportedModelError, match="was replaced on the instance"):
        prepare(model, TERNARY)


class _Own(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        product = input @ self.weight.T
        return product if self.bias is None else product + self.bias


class _Scaled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 1.01 * super().forward(input)


class _Two(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return super().forward(input), input


@pytest.mark.parametrize("cls", [_Scaled, _Two])
def test_a_subclass_of_linear_that_does_more_is_refused(cls: Any) -> None:
    model = tiny("bert")
    model.bert.encoder.layer[0].output.dense.__class__ = cls
    with pytest.raises(UnsupportedModelError):
        prepare(model, TERNARY)


def test_a_subclass_of_linear_with_more_parameters_is_refused() -> None:
    model = tiny("bert")
    dense = model.bert.encoder.layer[0].output.dense
    dense.__class__ = _Own
    dense.gain = nn.Parameter(torch.ones(1))
    with pytest.raises(UnsupportedModelError, match="is a _Own, not a plain Linear"):
        prepare(model, TERNARY)


def test_a_subclass_of_linear_that_multiplies_is_quantized(tmp_path: Path) -> None:
    model, plain = tiny("bert"), tiny("bert")
    for layer in model.bert.encoder.layer:
        layer.output.dense.__class__ = _Own
    student, other = prepare(model, TERNARY).eval(), prepare(plain, TERNARY).eval()
    found = logits_of(student, make_batch())
    assert same_bits(found, logits_of(other, make_batch()))
    tutelage.save(student, tmp_path / "out")
    assert same_bits(logits_of(tutelage.load(tmp_path / "out"), make_batch()), found)


def test_max_norm_is_refused() -> None:
    model = tiny("bert")
    model.get_input_embeddings().max_norm = 1.0
    with pytest.raises(UnsupportedModelError, match="word_embeddings' has max_norm; exclude it"):
        prepare(model, TERNARY)


def test_a_model_that_was_loaded_quantized_is_refused() -> None:
    model = tiny("bert")
    model.hf_quantizer = object()
    with pytest.raises(UnsupportedModelError, match="was loaded quantized"):
        prepare(model, TERNARY)


def test_calibration_is_refused_as_long_as_nothing_learns_from_it() -> None:
    model = tiny("bert")
    with pytest.raises(SchemeError, match="no quantizer that learns from calibration data"):
        prepare(model, TERNARY, calibration=[make_batch()])
    assert prepared(model) is None


def test_tied_embeddings_stay_tied_and_can_be_kept() -> None:
    model = BertForMaskedLM(tiny_config("bert"))
    weight = model.get_input_embeddings().weight
    assert model.cls.predictions.decoder.weight is weight
    kept = copy.deepcopy(model)
    prepare(model, TERNARY)
    assert model.cls.predictions.decoder.weight is model.get_input_embeddings().weight is weight
    assert isinstance(model.cls.predictions.decoder, QuantLinear)
    rule = Rule(pattern=r".*word_embeddings")
    prepare(kept, TERNARY.model_copy(update={"rules": (rule,)}))
    assert kept.cls.predictions.decoder.weight is kept.get_input_embeddings().weight
    assert type(kept.get_input_embeddings()) is nn.Embedding
    assert kept.eval()(**inputs_of(make_batch())).logits.isfinite().all()


def test_a_model_without_attention_is_refused() -> None:
    model = tiny("bert")
    before = copy.deepcopy(model.state_dict())
    model.bert.encoder.layer = nn.ModuleList()
    model.config.num_hidden_layers = 0
    with pytest.raises(SiteError, match="no attention site"):
        prepare(model, TERNARY)
    assert prepared(model) is None
    assert before.keys() >= model.state_dict().keys()


# The summary.


def _bytes(rows: int, width: int, bits: int, *, scales: int) -> int:
    return rows * -(-width * bits // 8) + 4 * scales


def test_summary_counts_bytes_by_hand() -> None:
    student = prepare(tiny("bert"), TERNARY)
    found = summary(student)
    by_name = {row.module: row for row in found.rows}
    # 2 bits a code, one float32 scale a row.
    words = by_name["bert.embeddings.word_embeddings"]
    assert words.packed_bytes == _bytes(VOCAB, 32, 2, scales=VOCAB) == 48 * 8 + 4 * 48
    assert words.float_bytes == 4 * 48 * 32
    query = by_name["bert.encoder.layer.0.attention.self.query"]
    assert query.packed_bytes == 32 * 8 + 4 * 32
    up = by_name["bert.encoder.layer.1.intermediate.dense"]
    assert up.packed_bytes == 64 * 8 + 4 * 64
    down = by_name["bert.encoder.layer.1.output.dense"]
    assert down.packed_bytes == 32 * 16 + 4 * 32
    assert {row.bits for name, row in by_name.items() if name != "(full precision)"} == {2}
    # The rest: positions, types, norms, biases, classifier.
    norms, biases = (1 + 2 * 2) * 64, 2 * (4 * 32 + 64 + 32) + 32
    rest = 40 * 32 + 2 * 32 + norms + biases + 3 * 32 + 3
    assert by_name["(full precision)"].packed_bytes == 4 * rest
    assert found.float_bytes == 4 * sum(p.numel() for p in student.parameters())
    assert found.packed_bytes == sum(row.packed_bytes for row in found.rows)
    assert len(found.rows) == 1 + 13 + 1


@pytest.mark.parametrize(
    ("preset", "bits", "scales"),
    [("binary-a8", 1, 32), ("w2-a8", 2, 32), ("reference", 2, 1)],
)
def test_summary_of_other_presets(preset: str, bits: int, scales: int) -> None:
    found = summary(prepare(tiny("bert"), Scheme.preset(preset)))
    row = next(r for r in found.rows if r.module.endswith("layer.0.attention.self.key"))
    assert row.bits == bits
    assert row.packed_bytes == _bytes(32, 32, bits, scales=scales)


def test_rows_that_fill_no_whole_byte_are_rounded_up() -> None:
    config = tiny_config("bert", width=30, heads=3)
    student = prepare(BertForSequenceClassification(config), Scheme.preset("ternary-a8"))
    row = next(r for r in summary(student).rows if r.module.endswith("layer.0.attention.self.key"))
    assert row.packed_bytes == 30 * 8 + 4 * 30  # 30 codes take 7.5 bytes


def test_summary_prints_a_table() -> None:
    text = str(summary(prepare(tiny("distilbert"), Scheme.preset("binary-a4"))))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "scheme", "bits", "packed", "bytes", "float32", "bytes"]
    assert any(
        "distilbert.transformer.layer.0.ffn.lin1" in line and "binary per row, input 4 bits" in line
        for line in lines
    )
    assert lines[-2].startswith("(full precision)")
    assert lines[-1].endswith("times smaller")


def test_summary_matches_what_is_saved(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    student = prepare(tiny("roberta"), TERNARY)
    tutelage.save(student, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert summary(student).packed_bytes == sum(
        t.numel() * t.element_size() for t in stored.values()
    )


def test_summary_of_an_unprepared_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"is not prepared; call tutelage\.prepare"):
        summary(tiny("bert"))


def test_the_map_is_plain_data() -> None:
    student = prepare(tiny("bert"), TERNARY)
    state = prepared(student)
    assert state is not None
    for spec in state.modules.values():
        assert ModuleSpec(**spec.model_dump(mode="json")) == spec
