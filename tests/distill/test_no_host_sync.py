"""A step never asks the device for a value."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tutelage
from helpers import FAMILIES, make_batch, tiny
from tutelage.intervention import stages

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique", "masked_select")


class RefuseSync(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WAITING):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


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
