"""The attention function: equal to transformers' own, quantized by formula, deaf to padding."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tutelage
from helpers import (
    DEFAULT_PRESETS,
    FAMILIES,
    PAD,
    VOCAB,
    inputs_of,
    make_batch,
    make_student,
    same_bits,
    tiny,
    tiny_llama_classifier,
)
from tutelage.errors import UnsupportedModelError
from tutelage.nn import (
    ATTENTION_NAME,
    FUSED_ATTENTION_NAME,
    AttentionQuantizer,
    attention,
    probe_of,
    register_attention,
    use_attention,
)
from tutelage.quantizers import UniformQuantizer, UnsignedQuantizer

F32 = np.float32
FAMILY = pytest.mark.parametrize("family", FAMILIES)
QUANTIZED = pytest.mark.parametrize(
    ("bits", "granularity"),
    [(8, "row"), (4, "row"), (8, "tensor"), (4, "tensor")],
    ids=["a8-row", "a4-row", "a8-tensor", "a4-tensor"],
)


def quantizer_of(bits: int, granularity: Any) -> AttentionQuantizer:
    """Per token as the default presets, or per tensor and signed as the reference."""
    if granularity == "row":
        q, k, v = (UniformQuantizer(bits) for _ in range(3))
        return AttentionQuantizer(q, k, v, UnsignedQuantizer(bits))
    q, k, v, p = (UniformQuantizer(bits, "tensor", clip=2.5) for _ in range(4))
    return AttentionQuantizer(q, k, v, p)


def by_hand(x: np.ndarray, levels: int, granularity: str, clip: float | None) -> Any:
    """Codes and scale in single float32 operations; a row is the last dimension."""
    x = x if clip is None else np.clip(x, F32(-clip), F32(clip))
    axes = -1 if granularity == "row" else None
    largest = np.abs(x).max(axis=axes, keepdims=True).astype(F32)
    scale = np.where(largest > 0, largest / F32(levels), F32(1)).astype(F32)
    return np.rint(x / scale), scale


def operands(shape: tuple[int, int, int, int, int] = (2, 3, 5, 7, 6)) -> tuple[Tensor, ...]:
    batch, heads, queries, keys, width = shape
    return (
        torch.randn(batch, heads, queries, width),
        torch.randn(batch, heads, keys, width),
        torch.randn(batch, heads, keys, width),
        torch.randn(batch, heads, queries, keys).softmax(-1),
    )


def within(got: Tensor, want: Tensor, tolerance: float) -> bool:
    return bool(((got.double() - want).abs().amax() / want.abs().amax()) < tolerance)


class TestWithoutQuantizer:
    @FAMILY
    def test_equals_eager_attention_of_transformers_with_padding(self, family: str) -> None:
        model = tiny(family, width=24, heads=3).eval()
        batch = make_batch(5, 9)
        model.set_attn_implementation("eager")
        want = model(**batch, output_hidden_states=True, output_attentions=True)
        with use_attention(model):
            got = model(**batch, output_hidden_states=True, output_attentions=True)
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-6)
        for one, other in zip(got.hidden_states, want.hidden_states, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
        for one, other in zip(got.attentions, want.attentions, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-6)

    @FAMILY
    def test_gradients_equal_those_of_eager_attention(self, family: str) -> None:
        model = tiny(family, width=24, heads=3).eval()
        batch = make_batch(5, 9)
        model.set_attn_implementation("eager")
        model(**batch).loss.backward()
        want = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        with use_attention(model):
            model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            if name in want:
                torch.testing.assert_close(parameter.grad, want[name], rtol=1e-4, atol=1e-6)

    def test_equals_eager_attention_of_a_causal_model_with_grouped_heads(self) -> None:
        model = tiny_llama_classifier()
        batch = make_batch(4, 8)
        model.set_attn_implementation("eager")
        want = model(**batch).logits
        with use_attention(model):
            torch.testing.assert_close(model(**batch).logits, want, rtol=0, atol=1e-6)

    def test_context_and_map_by_hand(self) -> None:
        q, k, v, _ = operands()
        mask = torch.zeros(2, 1, 5, 7)
        mask[0, :, :, 4:] = torch.finfo(torch.float32).min
        bias = torch.randn(1, 3, 5, 7)
        context, weights = attention(nn.Module(), q, k, v, mask, position_bias=bias)
        scores = q.double() @ k.double().mT / 6**0.5 + bias.double() + mask.double()
        want = scores.softmax(-1)
        assert within(weights, want, 1e-6)
        assert within(context, (want @ v.double()).transpose(1, 2), 1e-6)
        assert not weights[0, :, :, 4:].any()
        assert context.is_contiguous()

    def test_scaling_is_taken_as_given(self) -> None:
        q, k, v, _ = operands()
        _, weights = attention(nn.Module(), q, k, v, None, scaling=1.0)
        assert within(weights, (q.double() @ k.double().mT).softmax(-1), 1e-6)

    def test_dropout_only_while_training(self) -> None:
        q, k, v, _ = operands((2, 3, 50, 70, 6))
        module = nn.Module()
        _, dropped = attention(module.train(), q, k, v, None, dropout=0.5)
        _, kept = attention(module.eval(), q, k, v, None, dropout=0.5)
        zeros = (dropped == 0).double().mean().item()
        assert 0.45 < zeros < 0.55
        assert not (kept == 0).any()
        survived = dropped != 0
        torch.testing.assert_close(dropped[survived], 2 * kept[survived])


class TestProducts:
    @QUANTIZED
    def test_scores(self, bits: int, granularity: str) -> None:
        q, k, _, _ = operands()
        q, k = 2 * q, 2 * k  # beyond the clip
        levels, clip = 2 ** (bits - 1) - 1, None if granularity == "row" else 2.5
        got = quantizer_of(bits, granularity).scores(q, k, 0.3)
        cq, sq = by_hand(q.numpy(), levels, granularity, clip)
        ck, sk = by_hand(k.numpy(), levels, granularity, clip)
        exact = cq.astype(np.float64) @ ck.astype(np.float64).swapaxes(-1, -2)
        want = exact * sq.astype(np.float64) * sk.astype(np.float64).swapaxes(-1, -2) * 0.3
        assert got.dtype == torch.float32
        assert within(got, torch.from_numpy(want), 1e-6)

    @QUANTIZED
    def test_context(self, bits: int, granularity: str) -> None:
        _, _, v, p = operands()
        v = v * torch.logspace(-2, 1, 7)[:, None]  # scales of keys differ by far
        got = quantizer_of(bits, granularity).context(p, v)
        levels, clip = 2 ** (bits - 1) - 1, None if granularity == "row" else 2.5
        cv, sv = by_hand(v.numpy(), levels, granularity, clip)
        if granularity == "row":
            # The scale of a key joins the map, which is then rounded per row without sign.
            folded = (p.numpy() * sv.swapaxes(-1, -2)).astype(F32)
            cp, sp = by_hand(folded, 2**bits - 1, "row", None)
            want = (cp.astype(np.float64) @ cv.astype(np.float64)) * sp
        else:
            cp, sp = by_hand(p.numpy(), levels, "tensor", clip)
            want = (cp.astype(np.float64) @ cv.astype(np.float64)) * sp.astype(np.float64) * sv
        assert within(got, torch.from_numpy(want), 1e-6)

    def test_fold_keeps_every_value_near_the_plain_product(self) -> None:
        _, _, v, p = operands()
        got = quantizer_of(8, "row").context(p, v)
        assert within(got, p.double() @ v.double(), 0.02)

    @QUANTIZED
    def test_gradients_of_scores(self, bits: int, granularity: str) -> None:
        q, k, _, _ = operands()
        q, k = (2 * q).requires_grad_(), (2 * k).requires_grad_()
        levels, clip = 2 ** (bits - 1) - 1, None if granularity == "row" else 2.5
        upstream = torch.randn(2, 3, 5, 7)
        quantizer_of(bits, granularity).scores(q, k, 0.3).backward(upstream)
        leaves = [t.detach().double().requires_grad_() for t in (q, k)]
        hats = []
        for leaf, source in zip(leaves, (q, k), strict=True):
            codes, scale = by_hand(source.detach().numpy(), levels, granularity, clip)
            inside = leaf if clip is None else leaf.clamp(-clip, clip)
            value = torch.from_numpy(codes.astype(np.float64) * scale)
            hats.append(inside + (value - inside).detach())
        (hats[0] @ hats[1].mT * 0.3).backward(upstream.double())
        for source, leaf in zip((q, k), leaves, strict=True):
            assert within(source.grad, leaf.grad, 1e-4)

    @QUANTIZED
    def test_gradients_of_context(self, bits: int, granularity: str) -> None:
        _, _, v, p = operands()
        p, v = p.requires_grad_(), (2 * v).requires_grad_()
        levels, clip = 2 ** (bits - 1) - 1, None if granularity == "row" else 2.5
        upstream = torch.randn(2, 3, 5, 6)
        quantizer_of(bits, granularity).context(p, v).backward(upstream)
        lp, lv = (t.detach().double().requires_grad_() for t in (p, v))
        cv, sv = by_hand(v.detach().numpy(), levels, granularity, clip)
        if granularity == "row":
            folded = (p.detach().numpy() * sv.swapaxes(-1, -2)).astype(F32)
            cp, sp = by_hand(folded, 2**bits - 1, "row", None)
            map_value = cp.astype(np.float64) * sp / sv.astype(np.float64).swapaxes(-1, -2)
        else:
            cp, sp = by_hand(p.detach().numpy(), levels, "tensor", clip)
            map_value = cp.astype(np.float64) * sp
        inside = lv if clip is None else lv.clamp(-clip, clip)
        v_hat = inside + (torch.from_numpy(cv.astype(np.float64) * sv) - inside).detach()
        p_hat = lp + (torch.from_numpy(map_value) - lp).detach()
        (p_hat @ v_hat).backward(upstream.double())
        assert within(p.grad, lp.grad, 1e-4)
        assert within(v.grad, lv.grad, 1e-4)

    def test_only_what_wants_a_gradient_gets_one(self) -> None:
        q, k, v, p = operands()
        quantizer = quantizer_of(8, "row")
        quantizer.scores(q, k.requires_grad_(), 1.0).sum().backward()
        assert q.grad is None
        assert k.grad is not None
        quantizer.context(p, v.requires_grad_()).sum().backward()
        assert p.grad is None
        assert v.grad is not None

    def test_zero_rows_and_empty_batches_give_no_nan(self) -> None:
        quantizer = quantizer_of(8, "row")
        q, k, v, p = (t.clone() for t in operands())
        q[0, 0, 0], k[0, 0, 1], v[0, 0, 2], p[0, 0, 3] = 0.0, 0.0, 0.0, 0.0
        leaves = [t.requires_grad_() for t in (q, k, v, p)]
        scores, context = quantizer.scores(q, k, 1.0), quantizer.context(p, v)
        (scores.sum() + context.sum()).backward()
        assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves)
        assert not scores[0, 0, 0].any()
        assert not context[0, 0, 3].any()
        q, k, v, p = operands((0, 3, 5, 7, 6))
        assert quantizer.scores(q, k, 1.0).shape == (0, 3, 5, 7)
        assert quantizer.context(p, v).shape == (0, 3, 5, 6)

    @pytest.mark.parametrize("keys", [517, 518, 519, 700, 1200])
    def test_sums_over_many_keys_are_exact(self, keys: int) -> None:
        # A uniform map and constant values: every product is 255 * 127, every sum of one sign.
        p = torch.full((1, 1, 1, keys), 1.0 / keys)
        v = torch.ones(1, 1, keys, 2)
        v[..., -1, :] = 1e-6  # one code away from the others, so that the sum is no power
        got = quantizer_of(8, "row").context(p, v)
        cv, sv = by_hand(v.numpy(), 127, "row", None)
        folded = (p.numpy() * sv.swapaxes(-1, -2)).astype(F32)
        cp, sp = by_hand(folded, 255, "row", None)
        exact = (cp.astype(np.int64) @ cv.astype(np.int64)).astype(F32)
        assert np.array_equal(got.numpy(), exact * sp)

    @pytest.mark.parametrize("keys", [600, 1500])
    def test_random_sums_over_many_keys_are_exact(self, keys: int) -> None:
        p, v = torch.rand(1, 2, 3, keys) + 9, torch.rand(1, 2, keys, 4) + 9
        got = quantizer_of(8, "row").context(p, v)
        cv, sv = by_hand(v.numpy(), 127, "row", None)
        cp, sp = by_hand((p.numpy() * sv.swapaxes(-1, -2)).astype(F32), 255, "row", None)
        sums = cp.astype(np.int64) @ cv.astype(np.int64)
        assert sums.max() > 2**24
        assert np.array_equal(got.numpy(), sums.astype(F32) * sp)


class TestQuantizedFunction:
    def module(self, bits: int = 8) -> nn.Module:
        module = nn.Module()
        module.add_module("attention_quantizer", quantizer_of(bits, "row"))
        return module.eval()

    def test_is_scores_softmax_context(self) -> None:
        q, k, v, _ = operands()
        mask = torch.zeros(2, 1, 5, 7)
        mask[1, :, :, 3:] = torch.finfo(torch.float32).min
        module = self.module()
        context, weights = attention(module, q, k, v, mask, scaling=0.25)
        quantizer = module.attention_quantizer
        want = (quantizer.scores(q, k, 0.25) + mask).softmax(-1)
        assert same_bits(weights, want)
        assert same_bits(context, quantizer.context(want, v).transpose(1, 2).contiguous())
        assert not torch.equal(context, attention(nn.Module(), q, k, v, mask, scaling=0.25)[0])

    def test_masked_keys_have_no_influence_whatever_they_hold(self) -> None:
        q, k, v, _ = operands()
        mask = torch.zeros(2, 1, 5, 7)
        mask[..., 4:] = torch.finfo(torch.float32).min
        module = self.module()
        before, _ = attention(module, q, k, v, mask)
        k, v = k.clone(), v.clone()
        k[..., 4:, :], v[..., 4:, :] = 1e4 * torch.randn(2, 3, 3, 6), 1e6 * torch.randn(2, 3, 3, 6)
        after, _ = attention(module, q, k, v, mask)
        assert same_bits(before, after)

    @pytest.mark.parametrize("kv_heads", [1, 2, 4])
    @pytest.mark.parametrize("quantized", [True, False], ids=["quantized", "plain"])
    def test_grouped_heads_are_repeated_in_order(self, kv_heads: int, quantized: bool) -> None:
        module = self.module() if quantized else nn.Module()
        q = torch.randn(2, 4, 5, 6)
        k, v = torch.randn(2, kv_heads, 7, 6), torch.randn(2, kv_heads, 7, 6)
        group = [head * kv_heads // 4 for head in range(4)]
        got = attention(module, q, k, v, None)
        want = attention(module, q, k[:, group], v[:, group], None)
        assert same_bits(got[0], want[0])
        assert same_bits(got[1], want[1])

    @pytest.mark.parametrize("name", ["s_aux", "sinks", "head_mask"])
    def test_refuses_what_it_does_not_compute(self, name: str) -> None:
        q, k, v, _ = operands()
        with pytest.raises(UnsupportedModelError, match=f"passes '{name}'"):
            attention(nn.Module(), q, k, v, None, **{name: 30.0})

    def test_ignores_what_is_none_or_belongs_to_the_mask(self) -> None:
        q, k, v, _ = operands()
        got = attention(nn.Module(), q, k, v, None, softcap=None, sliding_window=3, use_cache=True)
        assert same_bits(got[0], attention(nn.Module(), q, k, v, None)[0])

    def test_soft_cap_against_a_loop(self) -> None:
        q, k, v, _ = operands()
        cap = 0.3
        mask = torch.zeros(2, 1, 5, 7)
        mask[..., 5:] = torch.finfo(torch.float32).min
        _, weights = attention(nn.Module(), q, k, v, mask, softcap=cap)
        for b, h, i in itertools.product(range(2), range(3), range(5)):
            raw = [float(q[b, h, i].double() @ k[b, h, j].double()) for j in range(5)]
            capped = [cap * math.tanh(s * q.shape[-1] ** -0.5 / cap) for s in raw]
            total = sum(math.exp(s) for s in capped)
            for j, s in enumerate(capped):
                assert abs(float(weights[b, h, i, j]) - math.exp(s) / total) < 1e-6
            assert weights[b, h, i, 5:].eq(0).all()


class TestProbe:
    def test_sees_every_signal_and_replaces_the_map(self) -> None:
        q, k, v, _ = operands()
        mask = torch.zeros(2, 1, 5, 7)
        mask[..., 5:] = torch.finfo(torch.float32).min
        seen: dict[str, Any] = {}
        other = torch.randn(2, 3, 5, 7).softmax(-1)

        def replace(attention_map: Tensor) -> Tensor:
            seen["map"] = attention_map
            return other

        probe = SimpleNamespace(
            inputs=lambda *args: seen.update(inputs=args),
            scores=lambda scores: seen.update(scores=scores),
            attention_map=replace,
        )
        module = nn.Module()
        with probe_of(module, probe):
            context, weights = attention(module, q, k, v, mask)
        assert all(a is b for a, b in zip(seen["inputs"], (q, k, v, mask), strict=True))
        assert seen["scores"].abs().amax() < 1e3  # before the mask
        torch.testing.assert_close(seen["map"], (seen["scores"] + mask).softmax(-1))
        assert same_bits(weights, other)
        torch.testing.assert_close(context, (other @ v).transpose(1, 2))
        assert not [key for key in module.__dict__ if "probe" in key]

    def test_is_gone_after_an_error(self) -> None:
        module = nn.Module()
        before = dict(module.__dict__)
        with pytest.raises(RuntimeError, match="on purpose"), probe_of(module, SimpleNamespace()):
            raise RuntimeError("on purpose")
        assert module.__dict__ == before


class TestUse:
    @staticmethod
    def implementation(model: Any) -> str:
        return str(model.config._attn_implementation)

    def test_is_taken_back(self) -> None:
        model = tiny()
        before = self.implementation(model)
        with use_attention(model):
            assert self.implementation(model) == ATTENTION_NAME
        assert self.implementation(model) == before

    def test_stays_where_wanted_but_not_after_an_error(self) -> None:
        model = tiny()
        before = self.implementation(model)
        with pytest.raises(RuntimeError, match="on purpose"), use_attention(model, keep=True):
            raise RuntimeError("on purpose")
        assert self.implementation(model) == before
        with use_attention(model, keep=True):
            pass
        assert self.implementation(model) == ATTENTION_NAME

    def test_registers_the_mask_function_too(self) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface

        register_attention()
        register_attention()
        assert AttentionInterface()[ATTENTION_NAME] is attention
        assert ATTENTION_NAME in AttentionMaskInterface()

    def test_refuses_what_is_no_transformers_model(self) -> None:
        with (
            pytest.raises(UnsupportedModelError, match="pass a PreTrainedModel"),
            use_attention(nn.Linear(2, 2)),
        ):
            pass

    def test_leaves_an_attention_written_by_hand_alone(self) -> None:
        from transformers import DebertaV2Config, DebertaV2Model

        config = DebertaV2Config(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        model = DebertaV2Model(config)
        before = model.config._attn_implementation
        with use_attention(model):
            assert model.config._attn_implementation == before

    def test_another_model_of_the_same_configuration_keeps_its_attention(self) -> None:
        one = tiny()
        other = type(one)(one.config)
        assert one.config is other.config
        before = self.implementation(other)
        tutelage.prepare(one, tutelage.Scheme.preset("ternary-a8"))
        assert self.implementation(one) == ATTENTION_NAME
        assert self.implementation(other) == before
        assert other.config is not one.config


def forward(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return (out.logits, *out.hidden_states)


class TestPadding:
    LENGTHS = (9, 4, 1, 6)

    def batch(self) -> tuple[Tensor, Tensor]:
        ids = torch.randint(3, VOCAB, (4, 11), generator=torch.Generator().manual_seed(1))
        mask = (torch.arange(11) < torch.tensor(self.LENGTHS)[:, None]).long()
        return ids.masked_fill(mask == 0, PAD), mask

    @FAMILY
    @pytest.mark.parametrize("preset", DEFAULT_PRESETS)
    def test_no_bit_depends_on_padded_tokens(self, family: str, preset: str) -> None:
        model = make_student(family, preset)
        ids, mask = self.batch()
        other = torch.where(mask == 0, torch.randint(3, VOCAB, ids.shape), ids)
        assert not torch.equal(ids, other)
        one, two = forward(model, ids, mask), forward(model, other, mask)
        assert same_bits(one[0], two[0])
        for left, right in zip(one[1:], two[1:], strict=True):
            assert same_bits(left[mask == 1], right[mask == 1])

    @FAMILY
    @pytest.mark.parametrize("preset", DEFAULT_PRESETS)
    def test_no_bit_depends_on_the_other_sentences(self, family: str, preset: str) -> None:
        model = make_student(family, preset)
        ids, mask = self.batch()
        for kept in range(4):
            others = torch.randint(3, VOCAB, ids.shape)
            changed = torch.ones_like(mask)
            others[kept], changed[kept] = ids[kept], mask[kept]
            one, two = forward(model, ids, mask), forward(model, others, changed)
            assert same_bits(one[0][kept], two[0][kept])
            assert not torch.equal(one[0], two[0])

    def test_one_scale_per_tensor_does_depend_on_them(self) -> None:
        # What the tests above would see if a default preset had one scale per tensor.
        model = make_student("bert", "reference")
        ids, mask = self.batch()
        others = torch.randint(3, VOCAB, ids.shape)
        others[0] = ids[0]
        assert not torch.equal(forward(model, ids, mask)[0][0], forward(model, others, mask)[0][0])

    @FAMILY
    def test_padding_is_not_ignored(self, family: str) -> None:
        model = make_student(family, "ternary-a8")
        ids, mask = self.batch()
        assert not torch.equal(
            forward(model, ids, mask)[0], forward(model, ids, torch.ones_like(mask))[0]
        )


def test_the_fused_attention_never_skips_a_quantizer() -> None:
    teacher = tiny("bert").eval()
    student = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset("ternary-a8")).eval()
    inputs = inputs_of(make_batch())
    with torch.no_grad():
        expected = student(**inputs).logits
        with use_attention(student, fused=True):
            assert student.config._attn_implementation_internal == FUSED_ATTENTION_NAME
            assert torch.equal(student(**inputs).logits, expected)
        with use_attention(teacher):
            parts = teacher(**inputs).logits
        with use_attention(teacher, fused=True):
            torch.testing.assert_close(teacher(**inputs).logits, parts)
            with torch.autocast("cpu", torch.bfloat16):
                inputs["attention_mask"][1] = 0
                assert teacher(**inputs).logits.isfinite().all()
