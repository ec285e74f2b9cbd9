"""Students of every family: one step under every stage, error that falls, files that load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tutelage
from families import FAMILIES, make_inputs, make_model, output_of
from helpers import STAGES, hooks_of, same_bits
from tutelage import Distiller
from tutelage._prepare import prepared
from tutelage.errors import IncompatibleTeacherError, SchemeError, SiteError
from tutelage.intervention import stages
from tutelage.sites import Tap

_GENERATING = [name for name, family in FAMILIES.items() if family.seq2seq or "LM" in family.model]
_BY_HAND = [name for name, family in FAMILIES.items() if not family.interface]


def _scheme(name: str) -> tutelage.Scheme:
    scheme = tutelage.Scheme.preset("ternary-a8")
    return scheme if FAMILIES[name].interface else scheme.without_attention()


def _pair(name: str) -> tuple[Any, Any]:
    teacher = make_model(name)
    return tutelage.prepare(copy.deepcopy(teacher), _scheme(name)).eval(), teacher


@pytest.mark.parametrize("name", FAMILIES)
def test_every_projection_trains_in_every_stage(name: str) -> None:
    student, teacher = _pair(name)
    distiller = Distiller(student, teacher)
    state = prepared(student)
    assert state is not None
    inputs = make_inputs(name)
    for stage in stages():
        student.zero_grad()
        step = distiller.step(inputs, stage)
        assert torch.isfinite(step.loss)
        step.loss.backward()
        for block in state.sites.blocks:
            roles = (block.query, block.key, block.value, block.output)
            for module in {*roles, *block.ffn}:
                gradient = student.get_submodule(module).weight.grad
                assert gradient is not None, (stage, module)
                assert gradient.isfinite().all()
                assert gradient.abs().sum() > 0 or _unreached(name, module), (stage, module)
    assert hooks_of(student) == hooks_of(teacher) == {}


def _unreached(name: str, module: str) -> bool:
    # The last block's feed-forward of a model whose output is not made from it.
    return name == "clip-vision" and module.startswith("encoder.layers.1.mlp")


def _propagated(student: Any, teacher: Any, stage: str | None, inputs: dict[str, Tensor]) -> float:
    """Returns the error of the last block's output, relative, under a stage."""
    state = prepared(student)
    assert state is not None
    sites = state.sites
    with torch.no_grad(), tutelage.nn.use_attention(teacher):
        with Tap(teacher, sites, ("block_output", *STAGES)) as tap:
            teacher(**inputs)
        signals: Any = tap.signals()
        with Tap(
            student,
            sites,
            ("block_output",),
            replace=stage,  # type: ignore[arg-type]
            with_=lambda _, i: signals[stage][i],
        ) as tap:
            student(**inputs)
    own, other = tap.signals()["block_output"][-1], signals["block_output"][-1]
    return float((own - other).square().mean() / other.square().mean())


@pytest.mark.parametrize("name", FAMILIES)
def test_error_falls_with_what_the_teacher_replaces(name: str) -> None:
    student, teacher = _pair(name)
    total = {stage: 0.0 for stage in (None, "context", "attention_output")}
    for seed in range(3):
        inputs = make_inputs(name, 6, seed=seed)
        for stage in total:
            total[stage] += _propagated(student, teacher, stage, inputs)
    assert total[None] > total["context"] > total["attention_output"] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_it_predicts_the_same_bits(name: str, tmp_path: Path) -> None:
    student, _ = _pair(name)
    inputs = make_inputs(name)
    loaded = tutelage.load(tutelage.save(student, tmp_path / "out"))
    with torch.no_grad():
        assert same_bits(output_of(loaded, inputs), output_of(student, inputs))


@pytest.mark.parametrize("name", _BY_HAND)
def test_products_computed_by_hand_are_not_quantized_in_silence(name: str) -> None:
    with pytest.raises(SchemeError, match=r"'ternary-a8'\)\.without_attention\(\)"):
        tutelage.prepare(make_model(name), tutelage.Scheme.preset("ternary-a8"))
    student, teacher = _pair(name)
    chosen = tutelage.losses.Losses.of({"attention_scores": 1.0})
    with pytest.raises(SiteError, match="'attention_map' in place"):
        Distiller(student, teacher, chosen).step(make_inputs(name))


_DEPTH = ("num_hidden_layers", "n_layers", "n_layer", "num_layers", "encoder_layers", "depths")
_SAID = {
    "depth": r"attention blocks, the teacher \d+; they must be of the same depth",
    "width": r"the teacher's \(.*; they must be of the same shape",
}
_WIDTH = ("hidden_size", "dim", "n_embd", "d_model", "embed_dim")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("what", ["depth", "width"])
def test_a_teacher_of_another_shape_is_refused(name: str, what: str) -> None:
    import transformers

    family = FAMILIES[name]
    keys = _DEPTH if what == "depth" else _WIDTH
    key = next(key for key in keys if key in family.settings)
    changed = [2, 3] if key == "depths" else 3 if what == "depth" else 48
    settings = {**family.settings, key: changed}
    other = getattr(transformers, family.model)(getattr(transformers, family.config)(**settings))
    student, _ = _pair(name)
    with pytest.raises(IncompatibleTeacherError, match=_SAID[what]):
        Distiller(student, other)


@pytest.mark.parametrize("name", _GENERATING)
def test_generation_is_the_same_before_and_after_a_step(name: str) -> None:
    student, teacher = _pair(name)
    inputs = make_inputs(name)
    given = {k: v for k, v in inputs.items() if not k.startswith("decoder")}
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    first = student.generate(**given, **settings)
    for stage in stages():
        Distiller(student, teacher).step(inputs, stage).loss.backward()
    assert torch.equal(student.generate(**given, **settings), first)
    assert hooks_of(student) == {}
