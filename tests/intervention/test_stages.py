"""Stages: what is replaced, which parameters learn, and how error travels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import FAMILIES, STAGES, hooks_of, inputs_of, make_batch, pair, projections
from tutelage import Distiller, losses
from tutelage._prepare import prepared
from tutelage.distill.losses import Losses
from tutelage.errors import RecipeError
from tutelage.intervention import (
    NO_INTERVENTION,
    Intervention,
    Replace,
    _stages,
    intervention,
    register,
    stages,
)
from tutelage.sites import Tap

# Section 3.2: roles without gradient under the losses of the published code.
_RESTING = {
    "none": set(),
    "attention_output": {"value", "output"},
    "context": {"value"},
    "attention_map": set(),
}


def _sites(student: nn.Module) -> Any:
    state = prepared(student)
    assert state is not None
    return state.sites


def _without_gradient(student: nn.Module) -> set[str]:
    return {name for name, p in student.named_parameters() if p.grad is None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", stages())
@pytest.mark.parametrize("kind", ["reference", "default"])
def test_gradient_map_of_the_published_code(family: str, stage: str, kind: str) -> None:
    student, teacher = pair(family, "reference" if kind == "reference" else "ternary-a8", layers=3)
    distiller = Distiller(student, teacher, getattr(losses, kind)(local="code"))
    distiller.step(make_batch(), stage).loss.backward()

    expected = {
        f"{getattr(block, role)}.{part}"
        for block in _sites(student).blocks
        for role in _RESTING[stage]
        for part in ("weight", "bias")
    }
    assert _without_gradient(student) == expected
    for role, name, weight in projections(student, _sites(student)):
        if role not in _RESTING[stage]:
            assert weight.grad is not None
            assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", stages())
@pytest.mark.parametrize("kind", ["reference", "default"])
def test_local_distillation_trains_every_projection(family: str, stage: str, kind: str) -> None:
    student, teacher = pair(family, layers=3)
    distiller = Distiller(student, teacher, getattr(losses, kind)(local="paper"))
    step = distiller.step(make_batch(), stage)
    step.loss.backward()
    assert _without_gradient(student) == set()
    for _, name, weight in projections(student, _sites(student)):
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0, name
    added = set(step.terms) - {"logits", "hidden_states", "attention_output", "attention_scores"}
    assert (
        added
        == {
            "none": set(),
            "attention_output": {"attention_output_local"},
            "context": {"context_local"},
            "attention_map": set(),
        }[stage]
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("stage", "alone", "learning"),
    [
        ("attention_output", "attention_scores", {"query", "key"}),
        ("context", "attention_scores", {"query", "key"}),
        ("attention_map", "attention_scores", {"query", "key"}),
        ("attention_map", "attention_map", {"query", "key"}),
        ("context", "context_local", {"query", "key", "value"}),
        ("attention_output", "attention_output_local", {"query", "key", "value", "output"}),
    ],
)
def test_a_local_term_reaches_its_own_block_only(
    family: str, stage: str, alone: str, learning: set[str]
) -> None:
    # Inputs are detached: nothing below the block, neither FFN nor embeddings, hears of it.
    student, teacher = pair(family, layers=2)
    distiller = Distiller(student, teacher, Losses.of({alone: 1.0}, local="code"))
    distiller.step(make_batch(), stage).loss.backward()
    expected = {
        f"{getattr(block, role)}.{part}"
        for block in _sites(student).blocks
        for role in learning
        for part in ("weight", "bias")
    }
    assert {n for n, p in student.named_parameters() if p.grad is not None} == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
def test_the_replaced_signal_carries_no_gradient_to_what_it_replaces(
    family: str, stage: Any
) -> None:
    student, teacher = pair(family, layers=1)
    distiller = Distiller(student, teacher, Losses.of({"logits": 1.0}, local="paper"))
    # Only logits: what is upstream of the replaced signal gets its gradient from the local term.
    terms = distiller.losses.at(stage)
    assert [w.term.name for w in terms] == ["logits", intervention(stage).local]  # type: ignore[union-attr]
    step = distiller.step(make_batch(), stage)
    step.terms["logits"].backward()
    bypassed = {
        "attention_output": {"query", "key", "value", "output"},
        "context": {"query", "key", "value"},
        "attention_map": {"query", "key"},
    }[stage]
    for role, name, weight in projections(student, _sites(student)):
        assert (weight.grad is None) == (role in bypassed), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [2, 3], ids=lambda n: f"{n}-layers")
@pytest.mark.parametrize("preset", ["ternary-a8", "binary-a8"])
def test_error_at_the_last_block_falls_with_the_depth_of_the_intervention(
    family: str, layers: int, preset: str
) -> None:
    inputs = inputs_of(make_batch(16, 8, padded=False))
    errors = dict.fromkeys(("none", "context", "attention_output"), 0.0)
    for seed in range(3):
        student, teacher = pair(family, preset, layers=layers, seed=seed)
        student.eval()
        source = Distiller(student, teacher).teacher
        want = {"block_output", "context", "attention_output"}
        _, signals = source.get(inputs, None, want)  # type: ignore[arg-type]
        for stage in errors:
            active = intervention(stage)

            def replacement(
                own: Tensor, index: int, active: Any = active, signals: Any = signals
            ) -> Tensor:
                return active(own, signals[active.site][index], None)

            with (
                torch.no_grad(),
                Tap(
                    student,
                    _sites(student),
                    ["block_output"],
                    replace=None if active is None else active.site,
                    with_=None if active is None else replacement,
                ) as tap,
            ):
                student(**inputs)
            own, other = tap.signals()["block_output"][-1], signals["block_output"][-1]
            errors[stage] += (own - other).square().mean().item()
    assert errors["none"] > 1.1 * errors["context"]
    assert errors["context"] > 1.1 * errors["attention_output"]
    assert errors["attention_output"] > 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_stage_is_honoured_and_modes_are_kept(family: str, stage: str, training: bool) -> None:
    student, teacher = pair(family, dropout=0.0)
    student.train(training)
    student.base_model.embeddings.train(not training)
    flags = [module.training for module in student.modules()]
    distiller = Distiller(student, teacher)
    plain = distiller.step(make_batch(), "none")
    step = distiller.step(make_batch(), stage)
    assert [module.training for module in student.modules()] == flags
    assert not any(module.training for module in teacher.modules())
    assert not torch.equal(step.student_logits, plain.student_logits)
    assert torch.equal(step.teacher_logits, plain.teacher_logits)
    # Training and eval mode intervene alike: without dropout they give the same bits.
    student.train(not training)
    assert torch.equal(distiller.step(make_batch(), stage).loss, step.loss)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", stages())
def test_after_a_step_nothing_is_left(family: str, stage: str) -> None:
    student, teacher = pair(family)
    student.eval()
    inputs = inputs_of(make_batch())
    with torch.no_grad():
        before = student(**inputs).logits
        plain_teacher = teacher(**inputs).logits
    attention = teacher.config._attn_implementation
    keys = list(student.state_dict())
    distiller = Distiller(student, teacher)
    distiller.step(make_batch(), stage).loss.backward()
    assert hooks_of(student) == {}
    assert hooks_of(teacher) == {}
    assert teacher.config._attn_implementation == attention
    assert list(student.state_dict()) == keys
    with torch.no_grad():
        assert torch.equal(student(**inputs).logits, before)
        assert torch.equal(teacher(**inputs).logits, plain_teacher)


@pytest.mark.parametrize("stage", stages())
@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("where", [0, 1], ids=["first-block", "last-block"])
def test_after_an_exception_nothing_is_left(stage: str, who: str, where: int) -> None:
    student, teacher = pair("bert")
    distiller = Distiller(student, teacher)
    model = {"student": student, "teacher": teacher}[who]

    def explode(*_: object) -> None:
        raise RuntimeError("boom")

    attention = teacher.config._attn_implementation
    hook = model.bert.encoder.layer[where].output.dense.register_forward_pre_hook(explode)
    with pytest.raises(RuntimeError, match="boom"):
        distiller.step(make_batch(), stage)
    hook.remove()
    assert hooks_of(student) == {}
    assert hooks_of(teacher) == {}
    assert teacher.config._attn_implementation == attention
    step = distiller.step(make_batch(), stage)
    assert step.loss.isfinite()


@pytest.mark.parametrize("stage", stages())
def test_the_teacher_gets_no_gradient(stage: str) -> None:
    student, teacher = pair("bert")
    distiller = Distiller(student, teacher)
    step = distiller.step(make_batch(), stage)
    step.loss.backward()
    assert not step.teacher_logits.requires_grad
    assert step.student_logits.requires_grad
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


@pytest.mark.parametrize("stage", STAGES)
def test_the_replacement_is_the_teachers_own_signal(stage: Any) -> None:
    # With the teacher's signal in place, the student computes as if it had produced it.
    student, teacher = pair("bert", dropout=0.0)
    student.eval()
    inputs = inputs_of(make_batch())
    distiller = Distiller(student, teacher)
    _, signals = distiller.teacher.get(inputs, None, distiller.wanted(stage))
    with (
        torch.no_grad(),
        Tap(student, _sites(student), [], replace=stage, with_=lambda own, i: signals[stage][i]),
    ):
        expected = student(**inputs).logits
    assert torch.equal(distiller.step(inputs, stage).student_logits, expected)


def test_stages_by_name() -> None:
    assert stages()[:4] == (NO_INTERVENTION, *STAGES)
    assert intervention("none") is None
    for name in STAGES:
        active = intervention(name)
        assert isinstance(active, Intervention)
        assert active.site == name
    with pytest.raises(RecipeError, match=r"no stage 'contxt'; use one of.*mean 'context'\?"):
        intervention("contxt")


def test_a_registered_stage_works_and_names_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_stages, "_STAGES", dict(_stages._STAGES))

    class Halfway:
        site = "attention_output"
        detach = ()
        local = "attention_output_local"

        def __call__(self, own: Tensor, teacher: Tensor, progress: Tensor | None) -> Tensor:
            assert progress is not None
            return own + progress * (teacher - own)

    register("halfway", Halfway())
    student, teacher = pair("bert")
    student.eval()
    distiller = Distiller(student, teacher)
    batch = make_batch()
    logits = {
        share: distiller.step(batch, "halfway", progress=torch.tensor(share)).student_logits
        for share in (0.0, 0.5, 1.0)
    }
    assert torch.equal(logits[0.0], distiller.step(batch, "none").student_logits)
    torch.testing.assert_close(
        logits[1.0], distiller.step(batch, "attention_output").student_logits
    )
    assert not torch.equal(logits[0.5], logits[0.0])
    for taken in ("halfway", "context", "none"):
        with pytest.raises(ValueError, match=f"the stage '{taken}' exists already"):
            register(taken, Halfway())


def test_replace_casts_to_the_students_dtype() -> None:
    stage = Replace("context", (), "context_local")
    own, other = torch.zeros(2, dtype=torch.float16), torch.ones(2, dtype=torch.float64)
    assert stage(own, other, None).dtype == torch.float16
    assert stage(own, other, None).tolist() == [1.0, 1.0]
