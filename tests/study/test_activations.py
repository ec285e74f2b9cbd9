"""Ranges of activations against NumPy over recorded signals, and other families."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

import tutelage
from families import make_any_student, make_inputs, make_model
from helpers import hooks_of, inputs_of, make_batch, pair
from tutelage.distill import LiveTeacher
from tutelage.errors import StudyError
from tutelage.sites import Tap
from tutelage.study._activations import ACTIVATIONS, activation_ranges


def recorded(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the inputs of block 1's Linears, and its attention map."""
    found: dict[str, Tensor] = {}
    layer = "bert.encoder.layer.1"
    names = {
        "input": f"{layer}.attention.self.query",
        "context": f"{layer}.attention.output.dense",
        "ffn_input": f"{layer}.intermediate.dense",
        "ffn_hidden": f"{layer}.output.dense",
    }
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, site=site: found.__setitem__(site, args[0].detach())
        )
        for site, name in names.items()
    ]
    sites = LiveTeacher(make_teacher()).sites
    with (
        torch.no_grad(),
        tutelage.nn.use_attention(model),
        Tap(model, sites, {"attention_map"}) as tap,
    ):
        model(**batch)
    found["attention_map"] = tap.signals()["attention_map"][1]
    for handle in handles:
        handle.remove()
    return found


def make_teacher() -> torch.nn.Module:
    return pair("bert")[1]


def test_figures_are_those_of_a_loop_over_real_tokens() -> None:
    student, teacher = pair("bert", "binary-a4")
    student.eval()
    given = [inputs_of(make_batch(seed=seed)) for seed in range(3)]
    found = {
        entry.site: entry
        for entry in activation_ranges(student, teacher, given)
        if entry.block == "bert.encoder.layer.1"
    }
    assert tuple(found) == ACTIVATIONS
    for site in ("input", "context", "ffn_input", "ffn_hidden"):
        for model, which in ((student, "student"), (teacher, "teacher")):
            values, codes = [], []
            for batch in given:
                x = recorded(model, batch)[site]
                for row, token in batch["attention_mask"].nonzero().tolist():
                    numbers = x[row, token].double().tolist()
                    values += [abs(n) for n in numbers]
                    top = max(abs(n) for n in numbers)
                    codes += [round(n * 7 / top) for n in numbers]
            range_ = getattr(found[site], which)
            assert range_.largest == pytest.approx(max(values), rel=1e-5)
            exact = np.quantile(values, 0.999, method="inverted_cdf")
            assert range_.percentile == pytest.approx(exact, rel=0.005)
            if which == "student":
                assert found[site].levels == 15
                assert found[site].zeros == pytest.approx(codes.count(0) / len(codes), abs=2e-3)
                assert found[site].used == len(set(codes)) / 15
    maps = []
    for batch in given:
        attention_map, mask = recorded(teacher, batch)["attention_map"], batch["attention_mask"]
        for row, token in mask.nonzero().tolist():
            for head in range(attention_map.shape[1]):
                numbers = attention_map[row, head, token].tolist()
                maps += [n for n, real in zip(numbers, mask[row].tolist(), strict=True) if real]
    range_ = found["attention_map"].teacher
    assert range_.largest == pytest.approx(max(maps))
    exact = np.quantile(maps, 0.999, method="inverted_cdf")
    assert range_.percentile == pytest.approx(exact, rel=0.005)
    assert not hooks_of(student)
    assert not hooks_of(teacher)


def test_codes_inside_attention_are_those_that_are_multiplied() -> None:
    student, teacher = pair("bert", "ternary-a8")
    student.eval()
    batch = inputs_of(make_batch(padded=False))
    seen: dict[str, list[Tensor]] = {}
    quantizers = student.get_submodule("bert.encoder.layer.0.attention.self.attention_quantizer")
    with torch.no_grad():
        attention = student.get_submodule("bert.encoder.layer.0.attention.self")
        inner: dict[str, Tensor] = {}

        class Probe:
            def inputs(self, query: Tensor, key: Tensor, value: Tensor, mask: object) -> None:
                inner.update(query=query, key=key, value=value)

            def scores(self, scores: Tensor) -> None: ...

            def attention_map(self, attention_map: Tensor) -> Tensor:
                inner["attention_map"] = attention_map
                return attention_map

        with tutelage.nn.probe_of(attention, Probe()):
            student(**batch)
        scale = quantizers.value.quantize(inner["value"]).scale.transpose(-1, -2)
        inner["attention_map"] = inner["attention_map"] * scale
        for name in ("query", "key", "value", "attention_map"):
            codes = getattr(quantizers, name).quantize(inner[name]).codes
            seen[name] = [codes, inner[name]]
    found = {
        entry.site: entry
        for entry in activation_ranges(student, teacher, [batch])
        if entry.block == "bert.encoder.layer.0"
    }
    for name, (codes, values) in seen.items():
        assert found[name].zeros == pytest.approx(float((codes == 0).double().mean()))
        assert found[name].used == len(codes.unique()) / found[name].levels
        assert found[name].student.largest == pytest.approx(float(values.abs().max()))
    assert found["attention_map"].levels == 256


class Maps:
    """Keeps the values and the attention map of one call."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def inputs(self, query: Tensor, key: Tensor, value: Tensor, mask: object) -> None:
        self.seen["value"] = value

    def scores(self, scores: Tensor) -> None: ...

    def attention_map(self, attention_map: Tensor) -> Tensor:
        self.seen["attention_map"] = attention_map
        return attention_map


@pytest.mark.parametrize(
    ("family", "block", "attention"),
    [
        ("bert", "bert.encoder.layer.0", "attention.self"),
        ("llama", "model.layers.0", "self_attn"),
        ("gpt2", "transformer.h.0", "attn"),
    ],
)
def test_attention_maps_count_real_queries_and_the_keys_that_they_see(
    family: str, block: str, attention: str
) -> None:
    teacher, student = make_model(family).eval(), make_any_student(family).eval()
    batch, causal = make_inputs(family), family != "bert"
    real = batch["attention_mask"].bool()
    assert not bool(real.all())
    found = {
        entry.site: entry
        for entry in activation_ranges(student, teacher, [batch])
        if entry.block == block
    }["attention_map"]
    for model, which in ((student, "student"), (teacher, "teacher")):
        module, maps = model.get_submodule(f"{block}.{attention}"), Maps()
        with (
            torch.no_grad(),
            tutelage.nn.use_attention(model),
            tutelage.nn.probe_of(module, maps),
        ):
            model(**batch)
        x, codes = maps.seen["attention_map"], torch.zeros(0)
        if which == "student":
            quantizer = module.attention_quantizer
            scale = quantizer.value.quantize(maps.seen["value"]).scale.transpose(-1, -2)
            x = x * scale.repeat_interleave(x.shape[1] // scale.shape[1], dim=1)
            codes = quantizer.attention_map.quantize(x).codes
        values, kept = [], []
        rows, heads, queries, keys = x.shape
        for row, head, query, key in itertools.product(*map(range, (rows, heads, queries, keys))):
            hidden = causal and key > query
            if real[row, query] and real[row, key] and not hidden:
                values.append(float(x[row, head, query, key]))
                if which == "student":
                    kept.append(float(codes[row, head, query, key]))
        range_ = getattr(found, which)
        assert range_.largest == pytest.approx(max(values))
        exact = np.quantile(values, 0.999, method="inverted_cdf")
        assert range_.percentile == pytest.approx(exact, rel=0.005)
        if which == "student":
            assert found.zeros == pytest.approx(kept.count(0.0) / len(kept))
            assert found.used == len(set(kept)) / found.levels


@pytest.mark.parametrize("family", ["distilbert", "gpt2", "vit", "llama", "t5", "albert"])
def test_other_families(family: str) -> None:
    teacher, student = make_model(family).eval(), make_any_student(family).eval()
    found = activation_ranges(student, teacher, [make_inputs(family)])
    assert found
    for entry in found:
        assert entry.site in ACTIVATIONS
        assert 0 < entry.teacher.percentile <= entry.teacher.largest
        assert entry.zeros is None or 0 <= entry.zeros < 1
        assert entry.used is None or 0 < entry.used <= 1


def test_a_packed_student_has_the_same(tmp_path: object) -> None:
    student, teacher = pair("bert", "ternary-a8")
    batch = inputs_of(make_batch())
    tutelage.save(student.eval(), f"{tmp_path}/packed")
    packed = tutelage.load(f"{tmp_path}/packed").eval()
    assert activation_ranges(packed, teacher, [batch]) == activation_ranges(
        student, teacher, [batch]
    )


def test_there_must_be_a_batch() -> None:
    student, teacher = pair("bert")
    with pytest.raises(StudyError, match="no batch"):
        activation_ranges(student, teacher, [])
