"""A student on its way from full precision to quantized."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tutelage
from helpers import make_batch, pair
from tutelage.nn import QuantEmbedding, QuantLinear, ramp_gate, ramped
from tutelage.nn._gate import GATE
from tutelage.quantizers import TernaryQuantizer, UniformQuantizer

PRESETS = ("ternary-a8", "ternary-a4", "binary-a8", "binary-a4", "w2-a8", "reference")


def gate(value: float) -> Tensor:
    return torch.tensor(value)


def logits(model: Any) -> Tensor:
    batch = make_batch()
    del batch["labels"]
    with torch.no_grad():
        return model(**batch).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_begins_as_the_teacher_and_ends_as_the_student(family: str, preset: str) -> None:
    student, teacher = pair(family, preset)
    student.eval()
    quantized = logits(student)
    with ramped(student, gate(0.0)):
        torch.testing.assert_close(logits(student), logits(teacher), atol=2e-6, rtol=1e-5)
    with ramped(student, gate(1.0)):
        # A rounding tie may fall to the other side: codes are found from other last bits.
        assert (logits(student) - quantized).abs().max() < 0.05 * quantized.abs().max()
    with ramped(student, gate(0.5)):
        between = logits(student)
    assert not torch.allclose(between, quantized, atol=1e-4)
    assert not torch.allclose(between, logits(teacher), atol=1e-4)
    assert torch.equal(logits(student), quantized)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_linear_layer_is_the_product_of_blends(value: float) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(5, 8), torch.randn(3, 8)
    layer = nn.Linear(8, 5)
    layer.weight.data.copy_(weight)
    made = QuantLinear.from_linear(layer, TernaryQuantizer("row"), UniformQuantizer(4))
    qw, qx = TernaryQuantizer("row")(weight).detach(), UniformQuantizer(4)(x).detach()
    bias = layer.bias.tolist()
    want = torch.zeros(3, 5, dtype=torch.float64)
    for i in range(3):
        for j in range(5):
            total = bias[j]
            for k in range(8):
                a = float(x[i, k]) + value * (float(qx[i, k]) - float(x[i, k]))
                b = float(weight[j, k]) + value * (float(qw[j, k]) - float(weight[j, k]))
                total += a * b
            want[i, j] = total
    with ramped(made, gate(value)):
        torch.testing.assert_close(made(x).double(), want, atol=1e-6, rtol=1e-6)


def test_gradients_pass_in_part_where_a_quantizer_stops_them() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data.copy_(torch.tensor([[0.1, 3.0]]))
    made = QuantLinear.from_linear(layer, TernaryQuantizer("row", clip=2.5), None)
    with ramped(made, gate(0.25)):
        made(torch.tensor([[1.0, 1.0]])).sum().backward()
    grad = layer.weight.grad
    assert grad is not None
    torch.testing.assert_close(grad, torch.tensor([[1.0, 0.75]]))


@pytest.mark.parametrize("granularity", ["row", "tensor"])
def test_an_embedding_is_blended(granularity: Any) -> None:
    table = nn.Embedding(6, 4)
    latent = table.weight.detach().clone()
    quantizer = TernaryQuantizer(granularity)
    made = QuantEmbedding.from_embedding(table, quantizer)
    ids = torch.tensor([[1, 5, 1]])
    want = (latent + 0.4 * (quantizer(latent) - latent))[ids]
    with ramped(made, gate(0.4)):
        torch.testing.assert_close(made(ids), want)


def test_nothing_is_left_behind() -> None:
    student, _ = pair("bert")
    before = copy.deepcopy(student.state_dict())

    with ramped(student, gate(0.5)):
        assert any(GATE in module.__dict__ for module in student.modules())
    with pytest.raises(RuntimeError), ramped(student, gate(0.5)):
        raise RuntimeError
    assert not any(GATE in module.__dict__ for module in student.modules())
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


@pytest.mark.parametrize("stage", ["none", "attention_output", "context", "attention_map"])
def test_a_step_at_full_precision_has_no_loss(stage: str) -> None:
    """Teacher and student are then the same model, whatever the stage replaces."""
    student, teacher = pair("bert")
    student.train()
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    distiller = tutelage.Distiller(student.eval(), teacher)
    with ramped(student, gate(0.0)):
        step = distiller.step(make_batch(), stage)
        assert float(step.loss.detach()) < 1e-8
    with ramped(student, gate(0.5)):
        step = distiller.step(make_batch(), stage)
        step.loss.backward()
    assert float(step.loss.detach()) > 1e-4
    grads = [p.grad for p in student.parameters() if p.grad is not None]
    assert grads
    assert all(bool(g.isfinite().all()) for g in grads)


def test_an_inner_ramp_gives_the_outer_one_back() -> None:
    student, _ = pair("bert", "binary-a8")
    assert ramp_gate(student) is None
    outer, inner = gate(0.25), gate(0.75)
    with ramped(student, outer):
        with ramped(student, inner):
            assert ramp_gate(student) is inner
        assert ramp_gate(student) is outer
        assert all(
            m.__dict__[GATE] is outer for m in student.modules() if isinstance(m, QuantLinear)
        )
    assert ramp_gate(student) is None
    assert not any(GATE in module.__dict__ for module in student.modules())
