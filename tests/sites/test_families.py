"""Every family: signals, replacement, gradients, padding, causality, recomputation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import FAMILIES, make_inputs, make_model, output_of
from helpers import STAGES, enable_checkpointing, hooks_of
from tutelage.errors import SiteError, UnsupportedModelError
from tutelage.nn import use_attention
from tutelage.sites import SITES, Site, SiteMap, Tap, discover

_TEXT = [name for name, family in FAMILIES.items() if family.input == "text"]
_WITH_TOKENS = [name for name, family in FAMILIES.items() if family.input != "image"]
_CHECKPOINTING = [name for name, family in FAMILIES.items() if family.checkpointing]
_DETACH: dict[str, tuple[Any, ...]] = {
    "attention_output": ("query", "key", "value"),
    "context": ("query", "key", "value"),
    "attention_map": ("query", "key"),
}


def _sites_of(name: str) -> tuple[Site, ...]:
    return tuple(s for s in SITES if s != "attention_scores" or FAMILIES[name].interface)


def _signals(model: nn.Module, sites: SiteMap, inputs: dict[str, Tensor], record: Any) -> Any:
    with torch.no_grad(), use_attention(model), Tap(model, sites, record) as tap:
        output = output_of(model, inputs)
    return output, tap.signals()


def _eager(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    eager: Any = copy.deepcopy(model)
    if eager._can_set_attn_implementation():
        eager.set_attn_implementation("eager")
    for module in eager.modules():
        # In transformers 5.17 the halves of T5 keep configurations of their own.
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    with torch.no_grad():
        return eager(**inputs, output_attentions=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_taps_equal_the_librarys_eager_attention(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    sites = discover(model)
    theirs = _eager(model, inputs)
    output, ours = _signals(model, sites, inputs, _sites_of(name))
    expected = theirs.logits if hasattr(theirs, "logits") else theirs.last_hidden_state
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    kinds = {
        "self": getattr(theirs, "attentions", None) or getattr(theirs, "decoder_attentions", None),
        "cross": getattr(theirs, "cross_attentions", None),
        "encoder": getattr(theirs, "encoder_attentions", None),
    }
    seen = 0
    turns = {kind: iter(found or ()) for kind, found in kinds.items()}
    for i, (block, own) in enumerate(zip(sites.blocks, ours["attention_map"], strict=True)):
        if name == "swin" and any(later.stack == block.stack for later in sites.blocks[i + 1 :]):
            continue  # the library shows the last block of a stage only
        in_encoder = FAMILIES[name].seq2seq and not block.causal and block.kind == "self"
        other = next(turns["encoder" if in_encoder else block.kind])
        torch.testing.assert_close(own, other, atol=1e-5, rtol=0)
        seen += 1
    assert seen == (2 if name == "swin" else len(sites.blocks))
    assert all(next(turn, None) is None for turn in turns.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_output_projection_joins_context_and_attention_output(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    sites = discover(model)
    _, found = _signals(model, sites, inputs, _sites_of(name))
    for i, block in enumerate(sites.blocks):
        layer = model.get_submodule(block.output)
        assert torch.equal(layer(found["context"][i]), found["attention_output"][i])
        heads = found["attention_map"][i].shape[-3]
        assert heads == block.heads
        assert found["context"][i].shape[-1] == block.heads * block.width
    assert len(found["block_output"]) == len({(b.block, b.block_call) for b in sites.blocks})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", FAMILIES)
def test_intervening_with_equal_signals_changes_no_bit(name: str, stage: Any) -> None:
    model, inputs = make_model(name), make_inputs(name)
    sites = discover(model)
    plain, own = _signals(model, sites, inputs, _sites_of(name))
    with (
        torch.no_grad(),
        use_attention(model),
        Tap(
            model,
            sites,
            (),
            replace=stage,
            with_=lambda _, i: own[stage][i].clone(),
            detach=_DETACH[stage],
        ),
    ):
        again = output_of(model, inputs)
    assert torch.equal(again, plain)
    assert hooks_of(model) == {}


def _rows(model: nn.Module, name: str, features: Any) -> Tensor | None:
    """Returns the gradient of a projection's weight by output, or of a part of the outputs."""
    module = model.get_submodule(name)
    gradient = module.weight.grad
    if gradient is None:
        return None
    by_output = gradient if isinstance(module, nn.Linear) else gradient.t()
    if not features:
        return by_output
    return torch.cat([by_output[start:stop] for start, stop in features])


def _moves(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.abs().sum() > 0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_map(name: str, stage: Any) -> None:
    # Section 3.2: what the task's loss reaches under each stage, and the scores' own block only.
    model, inputs = make_model(name), make_inputs(name)
    sites = discover(model)
    _, own = _signals(model, sites, inputs, (stage,))
    record = ("attention_map", *(["attention_scores"] if FAMILIES[name].interface else []))
    with (
        use_attention(model),
        Tap(
            model,
            sites,
            record,
            replace=stage,
            with_=lambda _, i: own[stage][i],
            detach=_DETACH[stage],
        ),
    ):
        output = output_of(model, inputs)
    draw = torch.Generator().manual_seed(1)
    (output * torch.randn(output.shape, generator=draw)).sum().backward(retain_graph=True)
    reached = {"attention_map": ("value", "output"), "context": ("output",), "attention_output": ()}
    dead = _dead(model, sites, inputs)
    for i, block in enumerate(sites.blocks):
        if FAMILIES[name].seq2seq and stage == "context" and block.query_axis != "decoder":
            assert not _moves(_rows(model, block.output, ()))
            continue  # replaced cross-attention cuts the way to the encoder
        for role in ("query", "key", "value"):
            gradient = _rows(model, getattr(block, role), getattr(block, f"{role}_features"))
            assert _moves(gradient) == (role in reached[stage] and (i, role) not in dead), (i, role)
        gradient = _rows(model, block.output, ())
        assert _moves(gradient) == ("output" in reached[stage] and (i, "output") not in dead)
    for block in sites.blocks:
        if FAMILIES[name].seq2seq and stage != "attention_map" and block.query_axis != "decoder":
            continue
        assert all(_moves(model.get_submodule(f).weight.grad) for f in block.ffn)


def _dead(model: nn.Module, sites: SiteMap, inputs: dict[str, Tensor]) -> set[tuple[int, str]]:
    """Returns projections that no loss reaches in the plain model (padding alone, say)."""
    plain = copy.deepcopy(model)
    plain.zero_grad()
    with use_attention(plain):
        output = output_of(plain, inputs)
    draw = torch.Generator().manual_seed(1)
    (output * torch.randn(output.shape, generator=draw)).sum().backward()
    return {
        (i, role)
        for i, block in enumerate(sites.blocks)
        for role in ("value", "output")
        if not _moves(_rows(plain, getattr(block, role), getattr(block, f"{role}_features", ())))
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_a_maps_own_loss_trains_query_and_key_of_its_block_alone(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    sites = discover(model)
    _, own = _signals(model, sites, inputs, ("attention_map",))
    with (
        use_attention(model),
        Tap(
            model,
            sites,
            ("attention_map",),
            replace="attention_map",
            with_=lambda _, i: own["attention_map"][i],
            detach=("query", "key"),
        ) as tap,
    ):
        output_of(model, inputs)
    maps = tap.signals()["attention_map"]
    last = len(maps) - 1
    draw = torch.Generator().manual_seed(1)
    (maps[last] * torch.randn(maps[last].shape, generator=draw)).sum().backward()
    for i, block in enumerate(sites.blocks):
        if block.attention == sites.blocks[last].attention and i != last:
            continue  # a shared block
        for role in ("query", "key"):
            gradient = _rows(model, getattr(block, role), getattr(block, f"{role}_features"))
            assert _moves(gradient) == (i == last), (i, role)
        value = _rows(model, block.value, block.value_features)
        assert not _moves(value)
        assert not _moves(_rows(model, block.output, ()))


def _scrambled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    made = dict(inputs)
    for prefix in ("", "decoder_"):
        mask = made.get(f"{prefix}attention_mask")
        if mask is not None:
            ids = made[f"{prefix}input_ids"]
            made[f"{prefix}input_ids"] = torch.where(mask.bool(), ids, (ids + 7) % 40 + 4)
    return made


@pytest.mark.parametrize("name", [n for n in _WITH_TOKENS if n != "mobilebert"])
def test_padding_is_not_seen(name: str) -> None:
    # MobileBERT's embedding of a token contains its neighbours': there it is seen by design.
    model, inputs = make_model(name), make_inputs(name)
    other = _scrambled(inputs)
    assert any(not torch.equal(inputs[key], other[key]) for key in inputs)
    with torch.no_grad(), use_attention(model):
        first, second = output_of(model, inputs), output_of(model, other)
    mask = inputs.get("decoder_attention_mask", inputs.get("attention_mask"))
    if first.dim() == 3:
        assert mask is not None
        first, second = first[mask.bool()], second[mask.bool()]
    torch.testing.assert_close(first, second, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", _WITH_TOKENS)
def test_the_future_is_not_seen(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    sites = discover(model)
    if not any(block.causal for block in sites.blocks):
        assert name in _TEXT[:9]  # the encoders
        return
    key = "decoder_input_ids" if FAMILIES[name].seq2seq else "input_ids"
    other = dict(inputs)
    other[key] = inputs[key].clone()
    other[key][0, -1] = (other[key][0, -1] + 5) % 40 + 4
    assert not torch.equal(other[key], inputs[key])
    with torch.no_grad(), use_attention(model):
        first, second = output_of(model, inputs), output_of(model, other)
    assert torch.equal(first[0, :-1], second[0, :-1])
    assert not torch.equal(first[0, -1], second[0, -1])


def _gradients(model: Any, name: str, stage: Any, teacher: Any, checkpointed: bool) -> Any:
    student, inputs = copy.deepcopy(model), make_inputs(name)
    sites = discover(student)
    if checkpointed:
        enable_checkpointing(student, {"use_reentrant": False})
    student.train()
    before = hooks_of(student)  # the library hangs one of its own on the embeddings
    record: tuple[Site, ...] = ("attention_map", "attention_output", "block_output")
    with (
        use_attention(student),
        Tap(
            student,
            sites,
            record,
            replace=stage,
            with_=lambda _, i: teacher[stage][i],
            detach=_DETACH[stage],
        ) as tap,
    ):
        output = output_of(student, inputs)
    loss = output.square().mean()
    for site in record:
        loss = loss + sum(t.square().mean() for t in tap.signals()[site])
    with use_attention(student):
        loss.backward()
    assert hooks_of(student) == before
    return {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", _CHECKPOINTING)
def test_gradient_checkpointing_gives_equal_gradients(name: str, stage: Any) -> None:
    model = make_model(name)
    # Signals of another model: were the recomputation left alone, gradients would differ.
    other = make_model(name)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    _, teacher = _signals(other, discover(other), make_inputs(name), (stage,))
    plain = _gradients(model, name, stage, teacher, False)
    recomputed = _gradients(model, name, stage, teacher, True)
    assert plain.keys() == recomputed.keys()
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", _CHECKPOINTING)
def test_reentrant_checkpointing_is_refused(name: str) -> None:
    model, inputs = make_model(name), make_inputs(name)
    sites = discover(model)
    enable_checkpointing(model, {"use_reentrant": True})
    model.train()
    before = hooks_of(model)
    with (
        use_attention(model),
        pytest.raises(UnsupportedModelError, match="'use_reentrant': False"),
        Tap(model, sites, ("context",)),
    ):
        output_of(model, inputs)
    assert hooks_of(model) == before


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if not f.interface])
def test_scores_computed_by_hand_are_refused(name: str) -> None:
    model = make_model(name)
    with pytest.raises(SiteError, match=r"loss term 'attention_map' in place"):
        Tap(model, discover(model), ("attention_scores",))
