"""Distiller: a pure step, and refusals with a remedy."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertModel

import tutelage
from helpers import FAMILIES, enable_checkpointing, inputs_of, make_batch, pair, tiny, tiny_config
from tutelage import Distiller, losses
from tutelage.distill import SAMPLE_IDS, LiveTeacher, TeacherSource
from tutelage.distill.losses import Losses
from tutelage.errors import IncompatibleTeacherError, RecipeError, UnsupportedModelError
from tutelage.intervention import stages
from tutelage.sites import SiteMap

TERNARY = tutelage.Scheme.preset("ternary-a8")


# The step.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", stages())
def test_a_step_is_a_function_of_batch_and_stage(family: str, stage: str) -> None:
    student, teacher = pair(family)
    student.eval()
    distiller = Distiller(student, teacher)
    batch = make_batch()
    kept = {key: value.clone() for key, value in batch.items()}
    random = torch.get_rng_state()
    first = distiller.step(batch, stage)
    for other in stages():
        distiller.step(make_batch(3, 5, seed=9), other).loss.backward()
    torch.rand(7)
    second = distiller.step(batch, stage)
    assert torch.equal(first.loss, second.loss)
    assert torch.equal(first.student_logits, second.student_logits)
    assert all(torch.equal(first.terms[name], second.terms[name]) for name in first.terms)
    assert all(torch.equal(batch[key], kept[key]) for key in kept)
    assert list(batch) == list(kept)
    torch.set_rng_state(random)
    distiller.step(batch, stage)
    assert torch.equal(torch.get_rng_state(), random)  # nothing random in eval mode


@pytest.mark.parametrize("stage", stages())
def test_dropout_follows_the_global_generator_alone(stage: str) -> None:
    student, teacher = pair("bert")
    student.train()
    distiller = Distiller(student, teacher)
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(distiller.step(make_batch(), stage).loss)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_signals_of_the_step_without_intervention_are_the_plain_models() -> None:
    student, teacher = pair("bert")
    student.eval()
    batch = make_batch()
    with torch.no_grad():
        expected = student(**inputs_of(batch)).logits
        other = teacher(**inputs_of(batch)).logits
    step = Distiller(student, teacher).step(batch)
    assert torch.equal(step.student_logits, expected)
    torch.testing.assert_close(step.teacher_logits, other, atol=1e-5, rtol=0)


class _Spy(LiveTeacher):
    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.calls: list[tuple[set[str], Tensor | None, set[str]]] = []

    def get(self, batch: Mapping[str, Any], keys: Tensor | None, want: Collection[Any]) -> Any:
        self.calls.append((set(batch), keys, set(want)))
        return super().get(batch, keys, want)


def test_sample_ids_reach_the_teacher_and_no_model() -> None:
    student, teacher = pair("bert")
    spy = _Spy(teacher)
    ids = torch.tensor([4, 1, 0, 9])
    batch = {**make_batch(), SAMPLE_IDS: ids}
    plain = Distiller(student.eval(), spy).step(make_batch())
    step = Distiller(student.eval(), spy).step(batch)
    assert torch.equal(step.loss, plain.loss)
    assert spy.calls[0][1] is None
    assert spy.calls[1][1] is ids
    assert spy.calls[1][0] == {"input_ids", "attention_mask"}
    assert set(batch) == {"input_ids", "attention_mask", "labels", SAMPLE_IDS}


def test_only_the_signals_that_are_needed_are_asked_for() -> None:
    student, teacher = pair("bert")
    spy = _Spy(teacher)
    distiller = Distiller(student, spy, Losses.of({"logits": 1.0}))
    for stage in stages():
        distiller.step(make_batch(), stage)
    assert [call[2] for call in spy.calls] == [
        set(),
        {"attention_output"},
        {"context"},
        {"attention_map", "attention_scores"},
    ]


def test_labels_are_dropped_unless_a_term_asks() -> None:
    student, teacher = pair("bert")
    student.eval()
    distiller = Distiller(student, teacher)
    batch = make_batch()
    wrong = {**batch, "labels": torch.full((4,), 10**6)}  # would crash a cross-entropy
    assert torch.equal(distiller.step(wrong).loss, distiller.step(inputs_of(batch)).loss)
    seen: list[bool] = []
    hook = student.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append("labels" in kwargs), with_kwargs=True
    )
    asked = Distiller(student, teacher, Losses.of({"labels": 1.0}))
    step = asked.step(batch)
    hook.remove()
    assert seen == [False]  # the model computes no loss of its own
    expected = nn.functional.cross_entropy(step.student_logits, batch["labels"])
    torch.testing.assert_close(step.loss, expected)


def test_the_forward_goes_through_the_wrapped_model() -> None:
    student, teacher = pair("bert")
    student.eval()
    calls: list[int] = []

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Tensor) -> Any:
            calls.append(1)
            return self.module(**inputs)

    distiller = Distiller(student, teacher)
    for stage in stages():
        wrapped = distiller.step(make_batch(), stage, model=Wrapper(student))
        assert torch.equal(wrapped.loss, distiller.step(make_batch(), stage).loss)
    assert len(calls) == 4


class _Synchronisations(TorchDispatchMode):
    """Counts what reads a value on the host; on a GPU each would stop the queue."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select")):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", stages())
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_no_value_is_moved_to_the_host(family: str, stage: str, padded: bool) -> None:
    student, teacher = pair(family)
    student.train()
    distiller = Distiller(student, teacher)
    batch = make_batch(padded=padded)
    with _Synchronisations() as mode:
        distiller.step(batch, stage).loss.backward()
    assert mode.found == []


def test_a_batch_without_a_mask_counts_every_token() -> None:
    student, teacher = pair("distilbert")
    student.eval()
    distiller = Distiller(student, teacher)
    batch = inputs_of(make_batch(padded=False))
    with_mask = distiller.step(batch)
    without = distiller.step({"input_ids": batch["input_ids"]})
    for name, value in with_mask.terms.items():
        torch.testing.assert_close(without.terms[name], value, rtol=1e-6, atol=0)


def test_regression_students_distil_too() -> None:
    student, teacher = pair("bert", labels=1)
    student.eval()
    step = Distiller(student, teacher).step(make_batch(labels=1), "context")
    expected = (step.student_logits - step.teacher_logits).square().mean()
    torch.testing.assert_close(step.terms["logits"], expected)


def test_a_model_without_logits_is_compared_by_its_last_hidden_state() -> None:
    teacher = BertModel(tiny_config("bert"), add_pooling_layer=False).eval()
    student = tutelage.prepare(copy.deepcopy(teacher), TERNARY).eval()
    batch = inputs_of(make_batch())
    step = Distiller(student, teacher).step(batch)
    assert step.student_logits.shape == (4, 7, 32)
    real = batch["attention_mask"].bool()
    error = (step.student_logits - step.teacher_logits)[real].square().mean()
    torch.testing.assert_close(step.terms["logits"], error)


def test_attention_implementation_of_the_teacher_does_not_matter() -> None:
    student, teacher = pair("bert")
    student.eval()
    results = []
    for name in ("sdpa", "eager"):
        teacher.set_attn_implementation(name)
        results.append(Distiller(student, teacher).step(make_batch(), "attention_map").loss)
        assert teacher.config._attn_implementation == name
    assert torch.equal(*results)


# The teacher.


def test_a_live_teacher_is_frozen_and_in_eval_mode() -> None:
    student, teacher = pair("bert")
    teacher.train().requires_grad_(True)
    distiller = Distiller(student, teacher)
    assert isinstance(distiller.teacher, TeacherSource)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not any(module.training for module in teacher.modules())
    teacher.train()  # someone switches it on again: the step must not draw dropout
    losses_found = {distiller.step(make_batch(), "none").teacher_logits.sum().item() for _ in "ab"}
    assert len(losses_found) == 1


class _Canned:
    """A teacher that is no model."""

    def __init__(self, inner: LiveTeacher) -> None:
        self._inner = inner

    @property
    def sites(self) -> SiteMap:
        return self._inner.sites

    def get(self, batch: Mapping[str, Any], keys: Tensor | None, want: Collection[Any]) -> Any:
        return self._inner.get(batch, keys, want)


def test_any_source_of_signals_can_teach() -> None:
    student, teacher = pair("bert")
    student.eval()
    source = _Canned(LiveTeacher(teacher))
    assert isinstance(source, TeacherSource)
    for stage in stages():
        canned = Distiller(student, source).step(make_batch(), stage)
        live = Distiller(student, teacher).step(make_batch(), stage)
        assert torch.equal(canned.loss, live.loss)


# Refusals.


def test_an_unprepared_student_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"not prepared; call tutelage\.prepare\(model"):
        Distiller(tiny("bert"), tiny("bert"))


def test_a_prepared_teacher_is_refused() -> None:
    student, _ = pair("bert")
    other, _ = pair("bert", seed=1)
    with pytest.raises(IncompatibleTeacherError, match="the teacher is a prepared student"):
        Distiller(student, other)
    with pytest.raises(IncompatibleTeacherError, match="pass the full-precision model"):
        LiveTeacher(other)


def test_shared_parameters_are_refused() -> None:
    teacher = tiny("bert")
    student = copy.deepcopy(teacher)
    student.classifier = teacher.classifier
    tutelage.prepare(student, TERNARY)
    with pytest.raises(
        IncompatibleTeacherError, match=r"share the parameter 'classifier\.weight'.*copy\.deepcopy"
    ):
        Distiller(student, teacher)
    assert all(p.requires_grad for p in student.parameters())  # a refusal freezes nothing
    with pytest.raises(IncompatibleTeacherError, match="share the parameter"):
        Distiller(student, student)


def test_shared_parameters_are_refused_in_a_live_teacher_too() -> None:
    teacher = tiny("bert")
    student = copy.deepcopy(teacher)
    student.classifier = teacher.classifier
    tutelage.prepare(student, TERNARY)
    with pytest.raises(IncompatibleTeacherError, match="share the parameter"):
        Distiller(student, LiveTeacher(teacher))


def test_another_depth_is_refused() -> None:
    student, _ = pair("bert", layers=2)
    with pytest.raises(
        IncompatibleTeacherError, match=r"student has 2 attention blocks, the teacher 3.*same depth"
    ):
        Distiller(student, tiny("bert", layers=3))


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        pytest.param({"width": 48}, r"\(4, 8, 32\), the teacher's \(4, 12, 48\)", id="width"),
        pytest.param({"heads": 2}, r"\(4, 8, 32\), the teacher's \(2, 16, 32\)", id="heads"),
    ],
)
def test_another_width_is_refused(shape: dict[str, int], told: str) -> None:
    student, _ = pair("bert")
    with pytest.raises(IncompatibleTeacherError, match=rf"block 0 of the student has.*{told}"):
        Distiller(student, tiny("bert", **shape))


def test_a_teacher_of_another_family_of_equal_shape_is_welcome() -> None:
    student, _ = pair("bert")
    step = Distiller(student, tiny("roberta")).step(make_batch(), "context")
    assert step.loss.isfinite()


@pytest.mark.parametrize("stage", stages())
def test_logits_of_another_shape_are_refused(stage: str) -> None:
    student, _ = pair("bert", labels=3)
    distiller = Distiller(student, tiny("bert", labels=2))
    with pytest.raises(
        IncompatibleTeacherError, match=r"shape \(4, 3\), the teacher's \(4, 2\); fine-tune"
    ):
        distiller.step(make_batch(), stage)


def test_an_unknown_stage_is_refused_with_a_hint() -> None:
    student, teacher = pair("bert")
    with pytest.raises(RecipeError, match=r"no stage 'context_map'; use one of 'none'.*Did you"):
        Distiller(student, teacher).step(make_batch(), "context_map")


@pytest.mark.parametrize("stage", stages())
def test_gradient_checkpointing_gives_equal_gradients(stage: str) -> None:
    found = []
    for reentrant in (None, False):
        student, teacher = pair("bert", dropout=0.0)
        if reentrant is not None:
            enable_checkpointing(student, {"use_reentrant": reentrant})
        step = Distiller(student.train(), teacher).step(make_batch(), stage)
        step.loss.backward()
        found.append({n: p.grad for n, p in student.named_parameters() if p.grad is not None})
    plain, recomputed = found
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-7, rtol=1e-6)


def test_reentrant_gradient_checkpointing_is_refused() -> None:
    student, teacher = pair("bert")
    enable_checkpointing(student, {"use_reentrant": True})
    distiller = Distiller(student.train(), teacher)
    with pytest.raises(UnsupportedModelError, match="'use_reentrant': False"):
        distiller.step(make_batch())


@pytest.mark.parametrize("stage", stages())
def test_autocast_to_float16_is_refused(stage: str) -> None:
    student, teacher = pair("bert")
    distiller = Distiller(student, teacher)
    with (
        torch.autocast("cpu", dtype=torch.float16),
        pytest.raises(UnsupportedModelError, match=r"without a GradScaler.*take torch\.bfloat16"),
    ):
        distiller.step(make_batch(), stage)
    assert distiller.step(make_batch(), stage).loss.dtype == torch.float32


def test_a_frozen_student_is_refused_with_a_remedy_that_works() -> None:
    _, teacher = pair("bert")
    LiveTeacher(teacher)  # in use: frozen
    student = tutelage.prepare(copy.deepcopy(teacher), TERNARY)
    with pytest.raises(UnsupportedModelError, match=r"call student\.requires_grad_\(True\)"):
        Distiller(student, teacher)
    student.requires_grad_(True)
    Distiller(student, teacher).step(make_batch()).loss.backward()
    student.requires_grad_(False).classifier.requires_grad_(True)  # a part may well be frozen
    step = Distiller(student, teacher).step(make_batch())
    assert step.loss.requires_grad


def test_an_output_without_prediction_is_refused() -> None:
    student, teacher = pair("bert")

    class Odd(nn.Module):
        def forward(self, **inputs: Tensor) -> Any:
            student(**inputs)
            return (torch.zeros(4, 3),)

    with pytest.raises(UnsupportedModelError, match="returned tuple, which has neither logits"):
        Distiller(student, teacher).step(make_batch(), model=Odd())


@pytest.mark.parametrize("kind", ["default", "reference"])
def test_default_losses_are_used(kind: str) -> None:
    student, teacher = pair("bert")
    student.eval()
    assert [w.term.name for w in Distiller(student, teacher).losses.terms] == [
        w.term.name for w in losses.default().terms
    ]
    chosen = getattr(losses, kind)()
    used = Distiller(student, teacher, chosen).losses
    assert [(w.term.name, w.weight) for w in used.terms] == [
        (w.term.name, w.weight) for w in chosen.terms
    ]


def test_what_compile_returned_is_refused_as_student_and_teacher() -> None:
    student, teacher = pair("bert")
    compiled = torch.compile(student, backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"torch\.compile returned.*step\(model="):
        Distiller(compiled, teacher)
    with pytest.raises(UnsupportedModelError, match=r"torch\.compile returned.*the model itself"):
        Distiller(student, torch.compile(tiny("bert"), backend="eager"))
