"""The published optimizer against a float64 loop, and its first steps beside AdamW's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tutelage.train import BertAdam
from tutelage.train._optim import reset_state


def _loop(
    weights: list[float],
    gradients: list[list[float]],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    norm: float,
) -> list[float]:
    """Section 4.1, one tensor: clip, moments, no bias correction, decoupled decay."""
    b1, b2 = betas
    first, second = [0.0] * len(weights), [0.0] * len(weights)
    weights = list(weights)
    for gradient in gradients:
        length = math.sqrt(sum(g * g for g in gradient))
        factor = min(1.0, norm / (length + 1e-6))
        for i, g in enumerate(gradient):
            g *= factor
            first[i] = b1 * first[i] + (1 - b1) * g
            second[i] = b2 * second[i] + (1 - b2) * g * g
            weights[i] -= lr * (first[i] / (math.sqrt(second[i]) + eps) + decay * weights[i])
    return weights


_numbers = st.floats(-3, 3).filter(lambda x: x == 0 or abs(x) > 1e-3)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    steps=st.integers(1, 5),
    lr=st.floats(1e-4, 1e-1),
    decay=st.sampled_from([0.0, 0.01, 0.3]),
    norm=st.sampled_from([0.1, 1.0, 10.0]),
    data=st.data(),
)
def test_bert_adam_equals_a_loop(
    sizes: list[int], steps: int, lr: float, decay: float, norm: float, data: st.DataObject
) -> None:
    def draw(n: int) -> list[float]:
        return data.draw(st.lists(_numbers, min_size=n, max_size=n))

    starts = [draw(n) for n in sizes]
    gradients = [[draw(n) for _ in range(steps)] for n in sizes]
    tensors = [nn.Parameter(torch.tensor(s, dtype=torch.float64)) for s in starts]
    options: dict[str, Any] = {"betas": (0.8, 0.99), "eps": 1e-6}
    optimizer = BertAdam(tensors, lr=lr, weight_decay=decay, max_grad_norm=norm, **options)
    for t in range(steps):
        for tensor, own in zip(tensors, gradients, strict=True):
            tensor.grad = torch.tensor(own[t], dtype=torch.float64)
        optimizer.step()
    for tensor, start, own in zip(tensors, starts, gradients, strict=True):
        expected = _loop(start, own, lr=lr, decay=decay, norm=norm, **options)
        assert tensor.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_the_defaults_are_the_published_ones() -> None:
    defaults = BertAdam([nn.Parameter(torch.zeros(1))]).defaults
    assert defaults == {
        "lr": 2e-5,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
    }


@pytest.mark.parametrize(
    ("step", "told"),
    [(1, 3.2), (5, 5.8), (10, 6.5), (20, 6.2), (40, 5.0), (60, 4.1), (120, 3.0)],
)
def test_first_steps_are_larger_than_adamws(step: int, told: float) -> None:
    def displacements(kind: str) -> float:
        weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0}
        if kind == "adamw":
            optimizer: Any = torch.optim.AdamW([weight], eps=1e-12, **options)
        else:
            optimizer = BertAdam([weight], eps=1e-12, max_grad_norm=1e9, **options)
        for _ in range(step):
            before = weight.item()
            weight.grad = torch.full_like(weight, 0.37)
            optimizer.step()
        return abs(weight.item() - before)

    ratio = displacements("bert_adam") / displacements("adamw")
    assert ratio == pytest.approx((1 - 0.9**step) / math.sqrt(1 - 0.999**step), rel=1e-6)
    assert ratio == pytest.approx(told, abs=0.06)


def test_every_tensor_is_clipped_on_its_own() -> None:
    small, large = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    optimizer = BertAdam([small, large], lr=1.0, betas=(0.0, 0.0), weight_decay=0.0, eps=1.0)
    small.grad, large.grad = torch.tensor([0.3, 0.4]), torch.tensor([30.0, 40.0])
    optimizer.step()
    # m / (sqrt(v) + 1) with m = g and v = g^2, the gradient of `small` not scaled down.
    torch.testing.assert_close(small.detach(), -torch.tensor([0.3 / 1.3, 0.4 / 1.4]))
    torch.testing.assert_close(large.detach(), -torch.tensor([0.6 / 1.6, 0.8 / 1.8]))
    assert large.grad.tolist() == [30.0, 40.0]  # the gradient itself is left alone


def test_parameters_without_gradient_rest() -> None:
    resting, moving = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = BertAdam([resting, moving], lr=0.1)
    moving.grad = torch.ones(2)
    optimizer.step()
    assert resting.tolist() == [1.0, 1.0]
    assert resting not in optimizer.state
    assert moving[0].item() < 1.0


def test_groups_have_settings_of_their_own() -> None:
    decayed, plain = (nn.Parameter(torch.ones(1)) for _ in range(2))
    groups = [{"params": [decayed], "weight_decay": 0.5}, {"params": [plain], "weight_decay": 0.0}]
    optimizer = BertAdam(groups, lr=0.1)
    for parameter in (decayed, plain):
        parameter.grad = torch.zeros(1)
    optimizer.step()
    assert decayed.item() == pytest.approx(1 - 0.1 * 0.5)
    assert plain.item() == 1.0


def test_a_closure_is_evaluated_with_gradient() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    optimizer = BertAdam([weight], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0  # type: ignore[union-attr]
    assert weight.item() < 2.0


def test_state_survives_saving() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(6, 3)

    def run(cut: int) -> torch.Tensor:
        weight = nn.Parameter(torch.ones(3))
        optimizer = BertAdam([weight], lr=0.1)
        for t, gradient in enumerate(gradients):
            if t == cut:
                stored = optimizer.state_dict()
                optimizer = BertAdam([weight], lr=7.0)
                optimizer.load_state_dict(stored)
            weight.grad = gradient.clone()
            optimizer.step()
        return weight.detach()

    assert torch.equal(run(cut=99), run(cut=3))


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda p: BertAdam(p, lr=0.1), id="bert_adam"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=0.1), id="adamw"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), id="amsgrad"),
        pytest.param(lambda p: torch.optim.AdamW(p, lr=0.1, fused=True), id="adamw-fused"),
        pytest.param(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), id="sgd-momentum"),
    ],
)
def test_a_reset_optimizer_is_as_good_as_new(make: Any) -> None:
    torch.manual_seed(0)
    gradients = torch.randn(8, 3)
    start = torch.ones(3)

    def feed(optimizer: Any, weight: nn.Parameter, rows: torch.Tensor) -> None:
        for gradient in rows:
            weight.grad = gradient.clone()
            optimizer.step()

    weight = nn.Parameter(start.clone())
    optimizer = make([weight])
    feed(optimizer, weight, gradients[:5])
    pointers = {k: v.data_ptr() for k, v in optimizer.state[weight].items() if v is not None}
    with torch.no_grad():
        weight.copy_(start)
    reset_state(optimizer)
    assert all(v.abs().sum() == 0 for v in optimizer.state[weight].values() if v is not None)
    now = {k: v.data_ptr() for k, v in optimizer.state[weight].items() if v is not None}
    assert now == pointers  # in place: a captured graph keeps its addresses
    feed(optimizer, weight, gradients[5:])

    fresh = nn.Parameter(start.clone())
    feed(make([fresh]), fresh, gradients[5:])
    assert torch.equal(weight, fresh)
