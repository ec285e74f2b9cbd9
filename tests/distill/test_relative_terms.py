"""Errors relative to the teacher's variance, against float64 loops, and where they cannot be."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import FAMILIES, make_batch, pair
from tutelage import Distiller, losses
from tutelage.distill import SignalMSE, StepContext
from tutelage.distill.losses import Losses

_NEW = (
    "relative_hidden_states",
    "relative_attention_output",
    "relative_context",
    "relative_projection",
)


def _context(own: Tensor, other: Tensor, mask: Tensor | None = None) -> StepContext:
    batch = own.shape[0]
    logits = torch.zeros(batch, 2)
    student: Any = {"context": (own,)}
    teacher: Any = {"context": (other,)}
    return StepContext(
        student=student,
        teacher=teacher,
        student_logits=logits,
        teacher_logits=logits,
        has_logits=True,
        token_mask=mask,
        labels=None,
        stage="none",
        progress=None,
    )


def _mean(term: SignalMSE, context: StepContext) -> float:
    value = term(context)
    return float(value.sum) / float(value.count)


def _loop(own: Tensor, other: Tensor, mask: Tensor | None, relative: str) -> float:
    """Mean over tokens and channels of (s - t)^2 over the variance, in float64."""
    width = own.shape[-1]
    real = [True] * (own.numel() // width) if mask is None else mask.reshape(-1).tolist()
    pairs = zip(
        own.double().reshape(-1, width).tolist(),
        other.double().reshape(-1, width).tolist(),
        real,
        strict=True,
    )
    rows = [(s, t) for s, t, counts in pairs if counts]
    variances = []
    square = sum(x * x for _, t in rows for x in t) / (len(rows) * width)
    for c in range(width):
        mean = sum(t[c] for _, t in rows) / len(rows)
        variances.append(sum((t[c] - mean) ** 2 for _, t in rows) / len(rows))
    average = sum(variances) / width
    total = 0.0
    for s, t in rows:
        for c in range(width):
            spread = variances[c] if relative == "channel" else average
            spread = max(spread + 0.01 * average + 1e-4 * square, 1e-8)
            total += (s[c] - t[c]) ** 2 / spread
    return total / (len(rows) * width)


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6)),
    seed=st.integers(0, 2**31),
    relative=st.sampled_from(["channel", "layer"]),
    masked=st.booleans(),
    kind=st.sampled_from(["normal", "zero", "constant", "denormal", "one-channel"]),
)
def test_relative_error(
    shape: tuple[int, int, int],
    seed: int,
    relative: Literal["channel", "layer"],
    masked: bool,
    kind: str,
) -> None:
    made = torch.Generator().manual_seed(seed)
    own, other = torch.randn(shape, generator=made), torch.randn(shape, generator=made)
    if kind == "zero":
        other = torch.zeros(shape)
    elif kind == "constant":
        other = torch.full(shape, 3.0)
    elif kind == "denormal":
        own, other = own * 1e-40, other * 1e-40
    elif kind == "one-channel":
        other[..., 1:] = 0.0
    mask = None
    if masked:
        mask = torch.rand(shape[:2], generator=made) < 0.5
        mask[:, 0] = True
    term = SignalMSE("x", "context", relative=relative)
    found = _mean(term, _context(own, other, mask))
    # Flushed denormals lose all their digits.
    least = 1e-30 if kind == "denormal" else 0.0
    assert found == pytest.approx(_loop(own, other, mask, relative), rel=1e-3, abs=least)


@pytest.mark.parametrize("relative", ["channel", "layer"])
def test_a_signal_of_any_size_weighs_the_same(relative: Literal["channel", "layer"]) -> None:
    made = torch.Generator().manual_seed(0)
    own, other = (torch.randn(4, 8, 16, generator=made) for _ in range(2))
    term = SignalMSE("x", "context", relative=relative)
    one = _mean(term, _context(own, other))
    assert _mean(term, _context(1000 * own, 1000 * other)) == pytest.approx(one, rel=1e-4)
    if relative == "channel":
        size = torch.logspace(-0.5, 0.5, 16)
        assert _mean(term, _context(own * size, other * size)) == pytest.approx(one, rel=0.2)


@pytest.mark.parametrize("relative", ["channel", "layer"])
def test_gradient_equals_the_numerical_one(relative: Literal["channel", "layer"]) -> None:
    made = torch.Generator().manual_seed(0)
    own, other = (torch.randn(2, 3, 4, generator=made, dtype=torch.float64) for _ in range(2))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    term = SignalMSE("x", "context", relative=relative)

    def loss(x: Tensor) -> Tensor:
        return term(_context(x, other, mask)).sum

    assert torch.autograd.gradcheck(loss, (own.requires_grad_(),))


def test_the_teacher_gets_no_gradient() -> None:
    own, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4).requires_grad_()
    value = SignalMSE("x", "context", relative="channel")(_context(own.requires_grad_(), other))
    value.sum.backward()
    assert other.grad is None


def test_another_relation_is_refused() -> None:
    wrong: Any = "token"
    with pytest.raises(ValueError, match="relative is 'token'; use 'channel', 'layer' or None"):
        SignalMSE("x", "context", relative=wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_set_trains_every_family(family: str) -> None:
    student, teacher = pair(family, "binary-a8")
    distiller = Distiller(student, teacher, losses.relative())
    out = distiller.step(make_batch(), stage="none")
    assert set(_NEW) < out.terms.keys()
    assert all(torch.isfinite(value) and value > 0 for value in out.terms.values())
    out.loss.backward()
    unreached = [
        name for name, p in student.named_parameters() if p.requires_grad and p.grad is None
    ]
    assert unreached == []


def test_terms_and_weights_of_the_set() -> None:
    weights = {w.term.name: w.weight for w in losses.relative().terms}
    assert weights == {"logits": 1.0, "attention_scores": 10.0, **dict.fromkeys(_NEW, 3.0)}
    assert losses.relative().automatic
    assert losses.relative(local="code").local == "code"
    made = Losses.of({"relative_context": 2.0})
    assert made.terms[0].term.requires == ("context",)
