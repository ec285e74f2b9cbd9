"""Autocast to bfloat16: what is rounded, and what is not."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import tutelage
from helpers import (
    ENCODER_TERMS,
    FAMILIES,
    PRESETS,
    RefuseSync,
    inputs_of,
    make_batch,
    pair,
    same_bits,
    tiny,
)
from tutelage import Distiller, TrainStep
from tutelage.distill.losses import Losses
from tutelage.intervention import stages
from tutelage.nn import QuantLinear

_EVERYTHING = Losses.of(dict.fromkeys(ENCODER_TERMS, 1.0))


def _bf16() -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", stages())
@pytest.mark.parametrize("preset", ["ternary-a8", "reference"])
def test_a_step_is_close_to_that_in_float32(family: str, stage: str, preset: str) -> None:
    # bfloat16 has 8 bits: each activation is off by up to 0.4 %, and some codes by one.
    student, teacher = pair(family, preset, dropout=0.0)
    distiller = Distiller(student.train(), teacher, _EVERYTHING)
    batch = make_batch(8, 9)
    full = distiller.step(batch, stage)
    full.loss.backward()
    expected = _gradients(student)
    with _bf16(), RefuseSync():
        half = distiller.step(batch, stage)
    half.loss.backward()
    found = _gradients(student)
    assert not torch.equal(half.loss, full.loss)  # it did run in bfloat16
    for name, value in full.terms.items():
        assert half.terms[name].dtype == torch.float32
        assert half.terms[name].item() == pytest.approx(value.item(), rel=0.05), name
    assert half.loss.item() == pytest.approx(full.loss.item(), rel=0.01)
    assert found.keys() == expected.keys()
    assert all(gradient.dtype == torch.float32 for gradient in found.values())
    one, other = (torch.cat([g.flatten() for g in f.values()]) for f in (found, expected))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.98


@pytest.mark.parametrize("preset", PRESETS)
def test_codes_and_products_are_exact(preset: str) -> None:
    student, _ = pair("bert", preset)
    linear = next(m for m in student.modules() if isinstance(m, QuantLinear))
    x = torch.randn(3, 5, 32).bfloat16()
    codes = linear.weight_quantizer.quantize(linear.weight)
    exact = linear(x.float())
    with _bf16():
        again = linear.weight_quantizer.quantize(linear.weight)
        found = linear(x)
        same = linear(x.float())
    assert same_bits(codes.codes, again.codes)
    assert same_bits(codes.scale, again.scale)
    assert again.scale.dtype == torch.float32
    # One rounding, at the very end; float32 inputs are not rounded before.
    assert same_bits(found, exact.bfloat16())
    assert same_bits(same, exact.bfloat16())


@pytest.mark.parametrize("preset", PRESETS)
def test_attention_products_are_exact(preset: str) -> None:
    student, _ = pair("bert", preset)
    quantizer: Any = next(
        m.attention_quantizer for m in student.modules() if hasattr(m, "attention_quantizer")
    )
    query, key, value = (torch.randn(2, 3, 6, 8).bfloat16() for _ in range(3))
    attention_map = torch.rand(2, 3, 6, 6).softmax(-1)
    scores = quantizer.scores(query.float(), key.float(), 0.3)
    context = quantizer.context(attention_map, value.float())
    with _bf16():
        assert same_bits(quantizer.scores(query, key, 0.3), scores)
        assert same_bits(quantizer.context(attention_map, value), context.bfloat16())


@pytest.mark.parametrize("input_bits", [8, None], ids=["a8", "weight-only"])
def test_the_gradient_of_a_linear_layer_is_exact(input_bits: int | None) -> None:
    student, _ = pair("bert")
    linear = next(m for m in student.modules() if isinstance(m, QuantLinear))
    if input_bits is None:
        linear.input_quantizer = None
    x = torch.randn(3, 5, 32).bfloat16()
    grad = torch.randn(3, 5, 32).bfloat16()
    results = []
    for context in (torch.autocast("cpu", enabled=False), _bf16()):
        own = (x.float() if not results else x.clone()).requires_grad_(True)
        with context:
            out = linear(own)
        # Even a backward pass inside the context does not round the products of the function.
        with context if input_bits is not None else contextlib.nullcontext():
            out.backward(grad.to(out.dtype))
        results.append((own.grad, linear.weight.grad, linear.bias.grad))
        linear.zero_grad(set_to_none=True)
    full, half = results
    assert same_bits(half[0], full[0].bfloat16())
    assert same_bits(half[1], full[1])
    assert same_bits(half[2], full[2])


@pytest.mark.parametrize("stage", ["attention_output", "context", "attention_map"])
def test_injected_signals_have_the_students_dtype(stage: str) -> None:
    student, teacher = pair("bert", dropout=0.0)
    distiller = Distiller(student, teacher)
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    from tutelage.intervention import _stages

    real = _stages.Replace.__call__

    def call(self: Any, own: Tensor, other: Tensor, progress: Tensor | None) -> Tensor:
        out = real(self, own, other.double(), progress)
        seen.append((own.dtype, out.dtype))
        return out

    with pytest.MonkeyPatch.context() as patch, _bf16():
        patch.setattr(_stages.Replace, "__call__", call)
        distiller.step(make_batch(), stage)
    expected = torch.float32 if stage == "attention_map" else torch.bfloat16
    assert seen == [(expected, expected)] * 2


def test_long_masks_and_softmax_are_not_rounded() -> None:
    # A row of the map sums to one to float32's precision, and padding gets exactly nothing.
    student, teacher = pair("bert", dropout=0.0)
    from tutelage.sites import Tap

    batch = inputs_of(make_batch(4, 30))
    for model in (teacher, student):
        from tutelage.nn import use_attention

        distiller = Distiller(student, teacher)
        sites = distiller._sites
        with _bf16(), use_attention(model, keep=True), Tap(model, sites, {"attention_map"}) as tap:
            model.eval()(**batch)
        for found in tap.signals()["attention_map"]:
            assert found.dtype == torch.float32
            torch.testing.assert_close(found.sum(-1), torch.ones(4, 4, 30), atol=1e-6, rtol=0)
            padded = found.masked_select(batch["attention_mask"][:, None, None] == 0)
            assert (padded == 0).all()


@pytest.mark.parametrize("preset", ["ternary-a8", "binary-a4", "w2-a8"])
def test_a_packed_model_equals_the_student_under_autocast(tmp_path: Any, preset: str) -> None:
    student, _ = pair("bert", preset)
    tutelage.save(student.eval(), tmp_path / "out")
    loaded = tutelage.load(tmp_path / "out")
    batch = inputs_of(make_batch())
    with torch.no_grad(), _bf16():
        assert same_bits(loaded(**batch).logits, student(**batch).logits)


def test_updates_under_autocast_keep_everything_in_float32() -> None:
    student, teacher = pair("bert", dropout=0.0)
    other = copy.deepcopy(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    train_step = TrainStep(Distiller(student.train(), teacher), optimizer)
    parts = [make_batch(2, 5), make_batch(4, 9, seed=1)]
    with _bf16():
        found = [train_step(parts, stage)["loss"].item() for stage in (*stages(), "none")]
    assert all(torch.isfinite(torch.tensor(found)))
    assert all(t.dtype != torch.bfloat16 for t in student.state_dict().values())
    for state in optimizer.state.values():
        assert all(value.dtype == torch.float32 for value in state.values())
    assert any(
        not torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True)
    )


def test_a_teacher_in_bfloat16_teaches_a_student_in_float32() -> None:
    teacher = tiny("bert", dropout=0.0).eval()
    student = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset("ternary-a8"))
    full = {s: Distiller(student, teacher, _EVERYTHING).step(make_batch(), s) for s in stages()}
    distiller = Distiller(student, teacher.bfloat16(), _EVERYTHING)
    for stage in stages():
        step = distiller.step(make_batch(), stage)
        step.loss.backward()
        assert step.loss.item() == pytest.approx(full[stage].loss.item(), rel=0.05)
