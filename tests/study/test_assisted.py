"""Errors under a stage: against a loop, and where the teacher must make them vanish."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers import STAGES, hooks_of, inputs_of, make_batch, pair
from tutelage.distill import Distiller, LiveTeacher
from tutelage.errors import StudyError
from tutelage.sites import Tap
from tutelage.study import block_errors
from tutelage.study._assisted import stage_errors


def test_without_a_stage_they_are_those_of_the_student_alone() -> None:
    student, teacher = pair("bert", "binary-a8")
    student.eval()
    given = [inputs_of(make_batch(seed=seed)) for seed in range(2)]
    (found,) = stage_errors(Distiller(student, teacher), given, ["none"])
    expected = block_errors(student, teacher, given)
    assert not found.assisted
    assert found.blocks == tuple(block.block for block in expected)
    signals = [block.signals["block_output"] for block in expected]
    assert found.mse == pytest.approx([error.mse for error in signals], rel=1e-5)
    assert found.relative == pytest.approx([error.relative for error in signals], rel=1e-5)
    total, count = 0.0, 0
    for batch in given:
        with torch.no_grad():
            s, t = (model(**batch).logits.double() for model in (student, teacher))
        for own, other in zip(s.tolist(), t.tolist(), strict=True):
            p, q = (torch.tensor(x).double().softmax(0).tolist() for x in (other, own))
            total += sum(a * torch.tensor(a / b).log().item() for a, b in zip(p, q, strict=True))
            count += 1
    assert found.kl == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_under_a_stage_they_are_those_of_a_student_with_the_teachers_signals(stage: str) -> None:
    student, teacher = pair("bert", "binary-a8")
    student.eval()
    batch = inputs_of(make_batch(padded=False))
    distiller = Distiller(student, teacher)
    plain, found = stage_errors(distiller, [batch], ["none", stage])
    assert found.assisted
    live = LiveTeacher(copy.deepcopy(teacher))
    theirs = live.get(batch, None, {stage, "block_output"})[1]
    with (
        torch.no_grad(),
        Tap(
            student,
            live.sites,
            {"block_output"},
            replace=stage,
            with_=lambda own, index: theirs[stage][index],
        ) as tap,
    ):
        student(**batch)
    for index, mse in enumerate(found.mse):
        own = tap.signals()["block_output"][index].double()
        exact = (own - theirs["block_output"][index].double()).square().mean()
        assert mse == pytest.approx(float(exact), rel=1e-5)
    assert found.mse != plain.mse
    assert not hooks_of(student)


def test_a_student_whose_attention_alone_is_wrong_is_mended_by_the_attention_output() -> None:
    student, teacher = pair("bert", "ternary-a8")
    student.eval()
    for name, parameter in teacher.named_parameters():
        if ".attention." not in name:
            own = student.get_submodule(name.rpartition(".")[0])
            if hasattr(own, "quantized_weight") and name.endswith("weight"):
                with torch.no_grad():
                    parameter.copy_(own.quantized_weight().dequantize())
    given = [inputs_of(make_batch())]
    plain, mended = stage_errors(Distiller(student, teacher), given, ["none", "attention_output"])
    assert max(mended.mse) < 0.05 * max(plain.mse)
    assert mended.kl is not None
    assert mended.kl < plain.kl


def test_there_must_be_a_batch() -> None:
    student, teacher = pair("bert")
    with pytest.raises(StudyError, match="no batch"):
        stage_errors(Distiller(student, teacher), [], ["none"])
