"""A step makes no tensor on the host: on the meta device every tensor of it is a meta tensor."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from test_cached_teacher import llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tutelage
from helpers import FAMILIES, make_batch, tiny
from tutelage.intervention import stages


class RefuseHost(TorchDispatchMode):
    """Refuses operations on tensors of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs or {})):
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta", func
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            assert not isinstance(value, torch.Tensor) or value.device.type == "meta", func
        return made


def test_the_guard_catches_a_number_of_the_host() -> None:
    there = torch.ones(2, device="meta")
    with pytest.raises(AssertionError), RefuseHost():
        torch.where(there > 0, torch.zeros(()), there)


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("torch.tensor copies from the host")


@pytest.mark.parametrize("scheme", ["ternary-a8", "binary-a4", "w2-a8", "reference"])
@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_no_stage_copies_from_the_host(
    family: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher: Any = llama() if family == "llama" else tiny(family)
    student = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset(scheme))
    student.requires_grad_(True).train()
    distiller = tutelage.Distiller(student, teacher)
    student.to("meta"), teacher.to("meta")
    batch = {name: value.to("meta") for name, value in make_batch(3, 6).items()}
    # Autocast does not know the meta device; it is off here.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch, "tensor", refuse)
    for stage in stages():
        with RefuseHost():
            distiller.step(batch, stage, progress=torch.empty((), device="meta")).loss.backward()
