"""Scales with a learned factor: values, gradients, and the bits that are packed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tutelage
from helpers import make_batch, pair
from tutelage.errors import SchemeError
from tutelage.kernels import quantize
from tutelage.nn import QuantLinear
from tutelage.quantizers import (
    BinaryQuantizer,
    FourLevelQuantizer,
    Quantized,
    TernaryQuantizer,
    UniformQuantizer,
)
from tutelage.scheme import WeightSpec

KINDS = [BinaryQuantizer, TernaryQuantizer, FourLevelQuantizer]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@given(
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(1, 9),
    st.sampled_from([0.0, 1e-38, 1.0, 1e30]),
)
def test_the_scale_is_multiplied_and_the_codes_stay(
    kind: Any, granularity: Any, seed: int, rows: int, width: int, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, width, generator=generator) * size
    weight[0] = 0.0
    plain, learned = kind(granularity), kind(granularity)
    learned.learn_scale(weight)
    assert torch.equal(learned(weight), plain(weight))
    gains = torch.randn(learned.log_gain.shape, generator=generator)
    learned.log_gain.data.copy_(gains)
    one, other = plain.quantize(weight), learned.quantize(weight)
    assert torch.equal(one.codes, other.codes)
    assert torch.isfinite(other.scale).all()
    for base, found, gain in zip(
        one.scale.flatten().tolist(), other.scale.flatten().tolist(), gains.flatten(), strict=True
    ):
        want = base * math.exp(float(gain))
        assert found == pytest.approx(want, rel=1e-6, abs=1e-44)
    fused = quantize(learned, weight)
    assert torch.equal(fused.codes.float(), other.codes)
    assert torch.equal(fused.scale, other.scale)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("arithmetic", ["integer", "float"])
@pytest.mark.parametrize("weight_only", [False, True])
def test_the_gradient_is_that_of_the_product(
    kind: Any, granularity: Any, arithmetic: Any, weight_only: bool
) -> None:
    torch.manual_seed(3)
    layer = nn.Linear(6, 4)
    x, upstream = torch.randn(5, 6), torch.randn(5, 4)
    weight, read = kind(granularity), None if weight_only else UniformQuantizer(8)
    made = QuantLinear.from_linear(layer, weight, read, arithmetic)
    weight.learn_scale(layer.weight)
    gains = torch.randn_like(weight.log_gain) * 0.3
    weight.log_gain.data.copy_(gains)
    made(x).backward(upstream)
    codes, scale = (t.double() for t in kind(granularity).quantize(layer.weight))
    seen = (x if read is None else read(x)).double()
    want = torch.zeros(gains.shape, dtype=torch.float64)
    for token in range(5):
        for row in range(4):
            at = row if granularity == "row" else 0
            dot = sum(float(seen[token, k] * codes[row, k]) for k in range(6))
            grown = float(scale.reshape(-1)[at]) * math.exp(float(gains[at]))
            want[at] += float(upstream[token, row]) * dot * grown
    torch.testing.assert_close(weight.log_gain.grad.double(), want, rtol=1e-4, atol=1e-6)
    # Straight through: the latent weights' gradient is that of the values, whatever the scale.
    outer = torch.einsum("tr,tk->rk", upstream.double(), seen)
    torch.testing.assert_close(layer.weight.grad.double(), outer, rtol=1e-4, atol=1e-5)


def test_a_student_with_learned_scales_trains_saves_and_loads(tmp_path: Path) -> None:
    scheme = tutelage.Scheme.preset("binary-a8").with_learned_scales()
    _, teacher = pair("bert", "binary-a8")
    student = tutelage.prepare(copy.deepcopy(teacher).requires_grad_(True), scheme)
    gains = [p for n, p in student.named_parameters() if n.endswith("log_gain")]
    linear = [m for m in student.modules() if isinstance(m, QuantLinear)]
    assert len(gains) == len(linear)
    distiller = tutelage.Distiller(student, teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.05)
    step = tutelage.TrainStep(distiller, optimizer)
    for stage in ("attention_output", "none"):
        step(make_batch(), stage)
    assert all(bool((gain != 0).any()) for gain in gains)
    student.eval()
    batch = make_batch()
    batch.pop("labels", None)
    with torch.no_grad():
        want = student(**batch).logits
    tutelage.save(student, tmp_path / "out")
    loaded = tutelage.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, want)


def test_a_quantizer_that_ignores_the_gain_is_refused() -> None:
    class Own(BinaryQuantizer):
        def quantize(self, x: torch.Tensor) -> Quantized:
            return Quantized(torch.ones_like(x), x.abs().mean(-1, keepdim=True))

    with pytest.raises(SchemeError, match=r"Own has no learned scale.*with_gain"):
        Own("row").learn_scale(torch.ones(3, 4))


def test_the_gain_lies_beside_the_weight() -> None:
    quantizer = BinaryQuantizer("row")
    quantizer.learn_scale(torch.ones(3, 4, device="meta"))
    assert quantizer.log_gain is not None
    assert quantizer.log_gain.device.type == "meta"


def test_a_table_of_embeddings_has_none() -> None:
    weight = WeightSpec(kind="binary", learned_scale=True)
    scheme = tutelage.Scheme.preset("binary-a8").model_copy(update={"embedding": weight})
    _, teacher = pair("bert", "binary-a8")
    with pytest.raises(SchemeError, match="not for a table"):
        tutelage.prepare(teacher, scheme)
