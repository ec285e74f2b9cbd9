"""Fused passes of a training step against plain torch, bit for bit, on all instruction sets."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import tutelage
from helpers import inputs_of, make_batch, pair, same_bits
from tutelage.kernels import (
    _rows,
    dequantize,
    native,
    quantize,
    scaled_integer_linear,
    squared_error,
    squared_error_gradient,
)
from tutelage.quantizers import (
    BaseQuantizer,
    BinaryQuantizer,
    FourLevelQuantizer,
    Quantized,
    TernaryQuantizer,
    UniformQuantizer,
    UnsignedQuantizer,
)

pytestmark = pytest.mark.skipif(not native().active, reason=native().reason)
ISA = pytest.mark.parametrize("isa", range(len(native().isas)), ids=native().isas)
QUANTIZERS: dict[str, Callable[[], BaseQuantizer]] = {
    "ternary": TernaryQuantizer,
    "binary": BinaryQuantizer,
    "four-level": FourLevelQuantizer,
    "8-bit": lambda: UniformQuantizer(8),
    "4-bit": lambda: UniformQuantizer(4),
    "2-bit": lambda: UniformQuantizer(2),
    "unsigned-8-bit": lambda: UnsignedQuantizer(8),
    "unsigned-4-bit": lambda: UnsignedQuantizer(4),
}
KIND = pytest.mark.parametrize("kind", QUANTIZERS)
SHAPES = [(0, 5), (3, 0), (1, 1), (7, 16), (5, 33), (2, 3, 40), (2, 3, 5, 32), (70, 384)]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Chooses an instruction set."""
    return lambda isa: monkeypatch.setattr(_rows, "isa_index", lambda: isa)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], int]:
    """Counts calls of the compiled passes, so that no test passes on the plain form alone."""
    calls: dict[str, int] = {}

    def ask(*tensors: Tensor | None) -> bool:
        served = serves(*tensors)
        calls[str(served)] = calls.get(str(served), 0) + 1
        return served

    serves = _rows._serves
    monkeypatch.setattr(_rows, "_serves", ask)
    return lambda name: calls.get(name, 0)


def values(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Ordinary numbers among zeros, a row of zeros, a constant one and a tiny one."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=made) * (torch.rand(shape, generator=made) > 0.2)
    rows = x.reshape(-1, shape[-1]) if x.numel() else x
    if len(rows) > 4:
        rows[0], rows[1], rows[2] = 0.0, 0.25, rows[2] * 1e-39
    return x


def equal(found: Quantized, expected: Quantized) -> bool:
    return torch.equal(found.codes.float(), expected.codes) and same_bits(
        found.scale, expected.scale
    )


@ISA
@KIND
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes_and_scales_equal_the_plain_form(
    isa: int, kind: str, shape: tuple[int, ...], on: Callable[[int], None], counted: Callable
) -> None:
    on(isa)
    quantizer, x = QUANTIZERS[kind](), values(shape)
    for compact in (False, True):
        found = quantize(quantizer, x, compact=compact)
        assert equal(found, quantizer.quantize(x))
        assert found.codes.is_contiguous()
    assert counted("True") == 2
    assert counted("False") == 0


@KIND
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 40),
    width=st.integers(0, 70),
    size=st.sampled_from([1e-42, 1e-38, 1e-3, 1.0, 1e18, 1e37]),
    seed=st.integers(0, 999),
)
def test_any_shape_and_size(kind: str, rows: int, width: int, size: float, seed: int) -> None:
    quantizer, x = QUANTIZERS[kind](), values((rows, width), seed) * size
    assert equal(quantize(quantizer, x), quantizer.quantize(x))
    assert equal(quantize(quantizer, x, compact=True), quantizer.quantize(x))


@ISA
@pytest.mark.parametrize("kind", ["8-bit", "4-bit", "unsigned-8-bit"])
def test_halves_round_to_even(isa: int, kind: str, on: Callable[[int], None]) -> None:
    on(isa)
    quantizer = QUANTIZERS[kind]()
    top = float(quantizer.grid.hi)
    x = torch.cat([torch.arange(0.5, top, 1.0), torch.tensor([top])]).reshape(1, -1)
    assert equal(quantize(quantizer, x), quantizer.quantize(x))


@ISA
@pytest.mark.parametrize("kind", ["8-bit", "unsigned-8-bit"])
def test_views_and_factors(isa: int, kind: str, on: Callable[[int], None]) -> None:
    """Heads are views of the hidden states; the scales of V multiply the attention map."""
    on(isa)
    quantizer, x = QUANTIZERS[kind](), values((2, 5, 4, 16))
    factor = torch.rand(2, 1, 4, 16)
    for view in (x, x.transpose(1, 2), x.transpose(1, 3), x[:, ::2], x[..., ::2], x[:, 1:, :, 3:]):
        assert equal(quantize(quantizer, view), quantizer.quantize(view))
        f = factor[..., :1].expand(2, 1, 4, 16)[:, :, : view.shape[2], : view.shape[3]]
        if f.shape[2:] == view.shape[2:]:
            assert equal(quantize(quantizer, view, factor=f), quantizer.quantize(view * f))
    assert equal(quantize(quantizer, x, factor=factor), quantizer.quantize(x * factor))


@ISA
@KIND
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite_stays_so(
    isa: int, kind: str, bad: float, on: Callable[[int], None]
) -> None:
    on(isa)
    x = values((3, 20)).abs()
    x[1, 7] = bad
    for compact in (False, True):
        found = quantize(QUANTIZERS[kind](), x, compact=compact)
        products = dequantize(found)
        if not (kind.startswith("unsigned") and bad == -math.inf):
            assert not products[1].isfinite().any() or kind == "binary"
            assert not found.scale[1].isfinite()
        assert products[0].isfinite().all()
        assert products[2].isfinite().all()


@pytest.mark.parametrize(
    "quantizer",
    [
        TernaryQuantizer("tensor"),
        TernaryQuantizer(clip=0.5),
        UniformQuantizer(8, "tensor"),
        UniformQuantizer(8, clip=0.5),
        UniformQuantizer(8, reciprocal=True),
        UnsignedQuantizer(8, "tensor"),
    ],
    ids=repr,
)
def test_other_settings_take_the_plain_form(quantizer: BaseQuantizer) -> None:
    x = values((6, 20))
    assert equal(quantize(quantizer, x, compact=True), quantizer.quantize(x))
    factor = torch.rand(1, 20)
    assert equal(quantize(quantizer, x, factor=factor), quantizer.quantize(x * factor))


def test_a_subclass_keeps_its_own_rule() -> None:
    class Halved(TernaryQuantizer):
        def quantize(self, x: Tensor) -> Quantized:
            codes, scale = super().quantize(x)
            return Quantized(codes, scale / 2)

    x = values((6, 20))
    assert torch.equal(quantize(Halved(), x).scale, TernaryQuantizer().quantize(x).scale / 2)


@ISA
@pytest.mark.parametrize("compact", [False, True])
def test_dequantize(isa: int, compact: bool, on: Callable[[int], None]) -> None:
    on(isa)
    for shape in SHAPES:
        x = values(shape)
        codes, scale = quantize(UniformQuantizer(8), x, compact=compact)
        assert torch.equal(dequantize(Quantized(codes, scale)), codes.float() * scale)
        one = torch.tensor([[0.37]]).reshape([1] * x.dim())
        assert torch.equal(dequantize(Quantized(codes, one)), codes.float() * one)


@ISA
@pytest.mark.parametrize("shape", [(0, 32), (1, 16), (5, 33), (2, 3, 40), (3, 9)], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_scaled_products(
    isa: int, shape: tuple[int, ...], rows: int, on: Callable[[int], None]
) -> None:
    """Of integers, so that a float64 product is exact; every rounding to float32 by hand."""
    on(isa)
    x = quantize(UniformQuantizer(8), values(shape), compact=True)
    for tensor_scale in (False, True):
        w = quantize(TernaryQuantizer(), values((rows, shape[-1]), 1), compact=True)
        if tensor_scale:
            w = Quantized(w.codes, w.scale[:1])
        for bias in (None, torch.randn(rows)):
            sums = (x.codes.double() @ w.codes.double().t()).float()
            expected = (sums * x.scale) * w.scale.reshape(-1)
            expected = expected if bias is None else expected + bias
            found = scaled_integer_linear(x, w, bias)
            assert same_bits(found, expected)
            assert found._base is None


@ISA
def test_squared_errors(isa: int, on: Callable[[int], None]) -> None:
    on(isa)
    made = torch.Generator().manual_seed(0)
    shape = (2, 3, 5, 18)
    own, other = (torch.randn(shape, generator=made) for _ in range(2))
    gain = torch.tensor(0.3)
    for mask_shape in (None, (2, 1, 5, 1), (2, 1, 5, 18), (1, 1, 1, 18), (1, 1, 1, 1)):
        mask = None if mask_shape is None else torch.rand(mask_shape, generator=made)
        factor = torch.ones(()) if mask is None else mask
        exact = ((own.double() - other.double()) * factor.double()).square().sum()
        torch.testing.assert_close(
            squared_error(own, other, mask).double(), exact, rtol=3e-7, atol=0
        )
        expected = ((own - other) * factor) * gain
        assert same_bits(squared_error_gradient(own, other, mask, gain), expected)
    view = own.transpose(1, 2)
    again = squared_error_gradient(view, other.transpose(1, 2), None, gain)
    assert same_bits(again, (view - other.transpose(1, 2)) * gain)


def test_sums_do_not_depend_on_the_number_of_threads() -> None:
    own, other = torch.randn(300, 384), torch.randn(300, 384)
    threads, found = torch.get_num_threads(), set()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.add(squared_error(own, other, None).item())
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


@pytest.mark.parametrize("preset", ["ternary-a8", "binary-a4", "w2-a8", "reference"])
def test_training_with_and_without_compiled_passes_is_the_same(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients and weights bit for bit; the loss, a sum in another order, within rounding."""
    student, teacher = pair("bert", preset)
    batch = inputs_of(make_batch())

    def train(model: torch.nn.Module) -> list[float]:
        distiller = tutelage.Distiller(model, teacher)
        step = tutelage.TrainStep(distiller, torch.optim.AdamW(model.parameters(), 1e-3))
        model.train()
        torch.manual_seed(0)
        order = ["attention_output", "context", "attention_map", "none", "none"]
        return [step(batch, stage)["loss"].item() for stage in order]

    plain = copy.deepcopy(student)
    losses = train(student)
    monkeypatch.setattr(_rows, "_serves", lambda *_: False)
    expected = train(plain)
    assert losses == pytest.approx(expected, rel=1e-6)
    for (name, own), other in zip(student.named_parameters(), plain.parameters(), strict=True):
        assert same_bits(own, other), name


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda op, x, c, s: op.quantize_uniform(x.double(), None, 7, True, c, s, 0), "float32"),
        (lambda op, x, c, s: op.quantize_uniform(x.t(), None, 7, True, c, s, 0), "contiguous"),
        (lambda op, x, c, s: op.quantize_uniform(x, None, 300, True, c, s, 0), "levels"),
        (lambda op, x, c, s: op.quantize_uniform(x, x[:2], 7, True, c, s, 0), "factor"),
        (lambda op, x, c, s: op.quantize_uniform(x, None, 7, True, c[:2], s, 0), "fit"),
        (lambda op, x, c, s: op.quantize_weight(x, 3, 0.7, c, s, 0), "kind"),
        (lambda op, x, c, s: op.quantize_weight(x, 0, 0.7, c, s[:2], 0), "fit"),
        (lambda op, x, c, s: op.quantize_weight(x, 0, 0.7, c, s, 99), "instruction"),
        (lambda op, x, c, s: op.scale_codes(c, s, x, 0), "int8"),
        (lambda op, x, c, s: op.scale_sums(c, s, s, None, 0), "int32"),
        (lambda op, x, c, s: op.squared_error(x, x[:2], None, s[0], 0), "shape"),
        (lambda op, x, c, s: op.squared_error(x, x, x[:2], s[0], 0), "mask"),
        (lambda op, x, c, s: op.squared_error_backward(x, x, None, s, x, 0), "gain"),
    ],
)
def test_operators_refuse_what_does_not_fit(call: Callable, message: str) -> None:
    x = torch.randn(4, 20)
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(torch.ops.tutelage, x, torch.empty(4, 20), torch.empty(4, 1))
