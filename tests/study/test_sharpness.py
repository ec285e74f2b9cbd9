"""Curvature of a tiny student against the full matrix of a plain model in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tutelage
from helpers import inputs_of, make_batch, tiny
from tutelage.distill import Distiller, losses
from tutelage.distill.losses import Losses
from tutelage.errors import StudyError
from tutelage.exporters._layers import twin
from tutelage.nn import QuantWeight
from tutelage.scheme import Scheme
from tutelage.study._sharpness import curved_parameters, sharpness

SHAPE: dict[str, Any] = {"layers": 1, "width": 4, "heads": 2, "dropout": 0.0}


def made(preset: str, *, weights_only: bool = False, terms: Losses | None = None) -> Distiller:
    teacher = tiny("bert", **SHAPE).eval()
    scheme = Scheme.preset(preset)
    if weights_only:
        scheme = Scheme(weight=scheme.weight)
    student = tutelage.prepare(copy.deepcopy(teacher), scheme).requires_grad_(True).eval()
    with torch.no_grad():
        for index, parameter in enumerate(student.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter.add_(0.3 * noise * parameter.abs().mean())
    return Distiller(student, teacher, terms)


def batches(count: int) -> list[dict[str, Tensor]]:
    return [inputs_of(make_batch(1, 5, padded=False, seed=seed)) for seed in range(count)]


def full_matrix(distiller: Distiller, batch: dict[str, Tensor], terms: Any) -> Tensor:
    """Returns the Hessian of a plain float64 model at the quantized weights, row by row."""
    plain = twin(distiller.student).double()
    plain.set_attn_implementation("eager")
    theirs = copy.deepcopy(distiller.teacher.model).double()
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        want = theirs(**batch, output_hidden_states=True)
    tables = {id(m.weight) for m in plain.modules() if isinstance(m, nn.Embedding)}
    parameters = [p for p in plain.parameters() if id(p) not in tables]
    loss = terms(plain(**batch, output_hidden_states=True), want)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    used = [(g, p) for g, p in zip(gradients, parameters, strict=True) if g is not None]
    flat = torch.cat([g.reshape(-1) for g, _ in used])
    rows = []
    for entry in flat:
        row = torch.autograd.grad(entry, [p for _, p in used], retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if r is None else r).reshape(-1)
                    for r, (_, p) in zip(row, used, strict=True)
                ]
            )
        )
    return torch.stack(rows)


def logits_and_hidden(own: Any, other: Any) -> Tensor:
    p = other.logits.softmax(-1)
    divergence = (p * (p.log() - own.logits.log_softmax(-1))).sum(-1).mean()
    hidden = sum(
        (s - t).square().mean() for s, t in zip(own.hidden_states, other.hidden_states, strict=True)
    )
    return divergence + hidden


@pytest.mark.parametrize("preset", ["ternary-a8", "binary-a8", "w2-a8"])
def test_is_that_of_the_full_matrix_over_quantized_weights(preset: str) -> None:
    terms = Losses.of({"logits": 1.0, "hidden_states": 1.0})
    distiller = made(preset, weights_only=True, terms=terms)
    given = batches(2)
    found = sharpness(distiller, given, given, count=2, probes=100, iterations=500, tolerance=1e-6)
    matrices = [full_matrix(distiller, batch, logits_and_hidden) for batch in given]
    for eigenvalues, matrix in zip(found.per_sample, matrices, strict=True):
        exact = sorted(torch.linalg.eigvalsh(matrix).tolist(), key=abs, reverse=True)
        assert list(eigenvalues) == pytest.approx(exact[:2], rel=2e-3)
    mean = (matrices[0] + matrices[1]) / 2
    exact = sorted(torch.linalg.eigvalsh(mean).tolist(), key=abs, reverse=True)
    assert [e.value for e in found.batch] == pytest.approx(exact[:2], rel=2e-3)
    assert found.parameters == len(mean)
    assert abs(found.trace.value - float(mean.trace())) < 4 * found.trace.error
    assert found.trace.error < 0.4 * abs(float(mean.trace()))


def test_quantized_activations_count_at_their_rounded_values() -> None:
    """One Linear under a squared error: the Hessian is 2 x x^T over the rounded input x."""
    distiller = made("ternary-a4", terms=Losses.of({"logits": 1.0}))
    student, batch = distiller.student, batches(1)[0]
    layer = student.get_submodule("bert.pooler.dense")
    assert isinstance(layer, QuantWeight)
    seen: list[Tensor] = []
    with layer.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach())):
        student(**batch)
    rounded = layer.input_quantizer.quantize(seen[0]).dequantize().double()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name == "bert.pooler.dense.weight")
    found = sharpness(distiller, [batch], [batch], iterations=2000, tolerance=1e-7, probes=2)
    head = twin(student).double().classifier
    target = distiller.teacher.model(**batch).logits.double()
    start = layer.quantized_weight().dequantize().double()
    bias = layer.bias.detach().double()

    def loss(weight: Tensor) -> Tensor:
        logits = head(torch.tanh(rounded @ weight.reshape(start.shape).t() + bias))
        p = target.softmax(-1)
        return (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean()

    matrix = torch.autograd.functional.hessian(loss, start.reshape(-1))
    exact = max(torch.linalg.eigvalsh(matrix).tolist(), key=abs)
    assert found.per_sample[0][0] == pytest.approx(exact, rel=2e-3)


def test_depends_on_codes_and_scales_alone() -> None:
    distiller = made("binary-a8")
    again = Distiller(
        tutelage.prepare(twin(distiller.student), Scheme.preset("binary-a8")).requires_grad_(True),
        copy.deepcopy(distiller.teacher.model),
        losses.default(),
    )
    given = batches(2)
    here, there = (
        sharpness(d, given, given, iterations=200, tolerance=1e-6) for d in (distiller, again)
    )
    assert here.batch[0].value == pytest.approx(there.batch[0].value, rel=1e-3)
    assert here.trace.value == pytest.approx(there.trace.value, rel=1e-3)


def test_leaves_the_student_as_it_was() -> None:
    distiller, given = made("ternary-a8"), batches(1)
    before = distiller.student(**given[0]).logits
    found = sharpness(distiller, given, given, probes=2, iterations=3)
    assert torch.equal(before, distiller.student(**given[0]).logits)
    assert all(parameter.grad is None for parameter in distiller.student.parameters())
    assert found.to_dict()["batch"][0]["iterations"] <= 3
    tables = [m.weight for m in distiller.student.modules() if isinstance(m, nn.Embedding)]
    assert not {id(t) for t in tables} & {id(p) for p in curved_parameters(distiller.student)}


def test_refusals() -> None:
    distiller, given = made("ternary-a8"), batches(1)
    with pytest.raises(StudyError, match="nothing to measure"):
        sharpness(distiller, [], given)
    with pytest.raises(StudyError, match="no batch"):
        sharpness(distiller, given, [], iterations=2)
