"""A step never asks the device for a value."""

from __future__ import annotations

import copy

import pytest
import torch

import tutelage
from helpers import FAMILIES, RefuseSync, make_batch, tiny
from tutelage.intervention import stages


def test_the_guard_catches_item() -> None:
    with pytest.raises(AssertionError, match="waits"), RefuseSync():
        torch.ones(1).item()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["ternary-a8", "binary-a4", "w2-a8", "reference"])
def test_no_stage_waits_for_the_device(family: str, scheme: str) -> None:
    teacher = tiny(family)
    student = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset(scheme))
    batch = make_batch(3, 6)
    for losses in (tutelage.losses.default(), tutelage.losses.reference()):
        distiller = tutelage.Distiller(student, teacher, losses)
        for stage in stages():
            with RefuseSync():
                step = distiller.step(batch, stage)
            step.loss.backward()
