"""A step never asks the device for a value."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import tutelage
from tutelage.intervention import stages

WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "_unique", "masked_select")


class RefuseSync(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in WAITING):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


def bert() -> torch.nn.Module:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return BertForSequenceClassification(config)


def roberta() -> torch.nn.Module:
    config = RobertaConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    return RobertaForSequenceClassification(config)


def distilbert() -> torch.nn.Module:
    config = DistilBertConfig(vocab_size=50, dim=16, n_layers=2, n_heads=2, hidden_dim=32)
    return DistilBertForSequenceClassification(config)


def test_the_guard_catches_item() -> None:
    with pytest.raises(AssertionError, match="waits"), RefuseSync():
        torch.ones(1).item()


@pytest.mark.parametrize("make", [bert, roberta, distilbert])
@pytest.mark.parametrize("scheme", ["ternary-a8", "binary-a4", "w2-a8", "reference"])
def test_no_stage_waits_for_the_device(make: Any, scheme: str) -> None:
    teacher = make()
    student = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset(scheme))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": torch.randint(2, 50, (2, 5)), "attention_mask": mask}
    for losses in (tutelage.losses.default(), tutelage.losses.reference()):
        distiller = tutelage.Distiller(student, teacher, losses)
        for stage in stages():
            with RefuseSync():
                step = distiller.step(batch, stage)
            step.loss.backward()
