"""The loss around the weights against a loop, and weights that come back bit for bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from helpers import differing, inputs_of, make_batch, pair, tiny, weights_of
from tutelage import Scheme, prepare
from tutelage.distill import Distiller
from tutelage.errors import StudyError
from tutelage.study._surface import filter_normalised, loss_surface


def test_rows_of_a_direction_are_as_long_as_those_of_the_weight() -> None:
    weights = [torch.randn(3, 5), torch.randn(4, 2, 3, 3), torch.zeros(2, 2)]
    found = filter_normalised(weights, torch.Generator().manual_seed(1))
    for weight, direction in zip(weights, found, strict=True):
        for row, other in zip(weight, direction, strict=True):
            length = math.sqrt(sum(x * x for x in row.double().flatten().tolist()))
            norm = math.sqrt(sum(x * x for x in other.double().flatten().tolist()))
            assert norm == pytest.approx(length, rel=1e-5)
    again = filter_normalised(weights, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_losses_are_those_of_a_loop() -> None:
    model = nn.Linear(3, 2).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    start, bias = model.weight.detach().clone(), model.bias.detach().clone()
    found = loss_surface(model, lambda: float(model(x).square().sum()), points=5, reach=0.4, seed=7)
    assert found.steps == pytest.approx((-0.4, -0.2, 0.0, 0.2, 0.4))
    assert found.parameters == 6
    made = torch.Generator().manual_seed(7)
    one, two = (filter_normalised([start], made)[0] for _ in range(2))
    for i, a in enumerate(found.steps):
        for j, b in enumerate(found.steps):
            total = 0.0
            for row in range(4):
                for out in range(2):
                    value = float(bias[out])
                    for k in range(3):
                        moved = start[out, k] + a * one[out, k] + b * two[out, k]
                        value += float(moved) * float(x[row, k])
                    total += value * value
            assert found.losses[i][j] == pytest.approx(total, rel=1e-9)


def test_a_student_is_quantized_anew_and_comes_back() -> None:
    student, teacher = pair("bert", "binary-a8")
    student.eval()
    distiller, batch = Distiller(student, teacher), inputs_of(make_batch())
    before, here = weights_of(student), float(distiller.step(batch).loss.detach())
    layer = student.get_submodule("bert.encoder.layer.0.output.dense")
    codes = []

    def loss() -> float:
        codes.append(layer.quantized_weight().codes.clone())
        return float(distiller.step(batch).loss.detach())

    found = loss_surface(student, loss, points=3, reach=1.0)
    assert not differing(before, weights_of(student))
    assert found.losses[1][1] == here
    assert not torch.equal(codes[0], codes[4])
    moved = copy.deepcopy(student)
    made = torch.Generator().manual_seed(0)
    weights = [p for p in moved.parameters() if p.dim() > 1]
    directions = [filter_normalised(weights, made) for _ in range(2)]
    with torch.no_grad():
        for weight, one, two in zip(weights, *directions, strict=True):
            weight.sub_(one).add_(two)
    expected = float(Distiller(moved, teacher).step(batch).loss.detach())
    assert found.losses[0][2] == pytest.approx(expected, rel=1e-5)


def test_learned_gains_of_scales_stay() -> None:
    teacher = tiny("bert", dropout=0.0).eval()
    scheme = Scheme.preset("binary-a8").with_learned_scales()
    student = prepare(copy.deepcopy(teacher), scheme).requires_grad_(True).eval()
    gains = {n: p for n, p in student.named_parameters() if n.endswith("log_gain")}
    assert gains
    with torch.no_grad():
        for gain in gains.values():
            gain.fill_(0.25)
    plain = prepare(copy.deepcopy(teacher), Scheme.preset("binary-a8"))
    seen = []

    def loss() -> float:
        seen.append(all(bool((gain == 0.25).all()) for gain in gains.values()))
        return 0.0

    found = loss_surface(student, loss, points=3, reach=1.0)
    assert seen == [True] * 9
    assert found.parameters == sum(p.numel() for p in plain.parameters() if p.dim() > 1)


def test_weights_come_back_after_an_error_and_infinities_are_left_out() -> None:
    model = nn.Linear(2, 2)
    before = weights_of(model)
    calls = iter([1.0, math.inf])

    def broken() -> float:
        return next(calls)

    with pytest.raises(StopIteration):
        loss_surface(model, broken, points=3)
    assert not differing(before, weights_of(model))
    assert loss_surface(model, lambda: math.nan, points=3).losses[0][0] is None


@pytest.mark.parametrize(("points", "reach"), [(4, 0.5), (1, 0.5), (3, 0.0)])
def test_refusals(points: int, reach: float) -> None:
    with pytest.raises(StudyError, match="odd number of points"):
        loss_surface(nn.Linear(2, 2), lambda: 0.0, points=points, reach=reach)
