"""QuantLinear: its numbers against numpy, its gradients against autograd."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tutelage
from helpers import hooks_of, same_bits, tiny
from tutelage.kernels import _integer
from tutelage.nn import QuantLinear, _linear
from tutelage.quantizers import (
    BinaryQuantizer,
    ClippedSTE,
    FourLevelQuantizer,
    TernaryQuantizer,
    UniformQuantizer,
)

F32 = np.float32
THRESHOLDS = {"ternary": F32(0.7), "binary": None, "four-level": F32(1.248)}
MAKERS: dict[str, Any] = {
    "ternary": TernaryQuantizer,
    "binary": BinaryQuantizer,
    "four-level": FourLevelQuantizer,
}
WEIGHTS = pytest.mark.parametrize("kind", list(MAKERS))
GRANULARITIES = pytest.mark.parametrize("granularity", ["row", "tensor"])


def lattice(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Multiples of 1/64 below 4: float32 adds them exactly in any order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-255, 256, shape, generator=generator).float() / 64


def weight_by_hand(w: np.ndarray, kind: str, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    rows = w if granularity == "row" else w.reshape(1, -1)
    codes, scales = np.zeros_like(rows), np.zeros((len(rows), 1), F32)
    for i, row in enumerate(rows):
        size = np.abs(row)
        mean = F32(size.astype(np.float64).sum()) / F32(len(row))
        if kind == "ternary":
            code = (size > mean * THRESHOLDS[kind]).astype(F32)
        elif kind == "binary":
            code = np.ones_like(size)
        else:
            code = np.where(size > mean * THRESHOLDS[kind], F32(3), F32(1))
        total = F32((size.astype(np.float64) * code).sum())
        square = F32((code.astype(np.float64) ** 2).sum())
        scales[i] = total / max(square, F32(1))
        codes[i] = code * np.where(row < 0, F32(-1), F32(1))
    return codes.reshape(w.shape), scales


def input_by_hand(x: np.ndarray, levels: int, granularity: str) -> tuple[np.ndarray, np.ndarray]:
    flat = x.reshape(-1, x.shape[-1]) if granularity == "row" else x.reshape(1, -1)
    codes, scales = np.zeros_like(flat), np.ones((len(flat), 1), F32)
    for i, row in enumerate(flat):
        step = np.abs(row).max(initial=F32(0)) / F32(levels)
        scales[i] = step if step > 0 else F32(1)
        codes[i] = np.rint(row / scales[i])
    shape = (*x.shape[:-1], 1) if granularity == "row" else (1,) * x.ndim
    return codes.reshape(x.shape), scales.reshape(shape)


def forward_by_hand(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, levels: int, granularity: str
) -> np.ndarray:
    """((acc * s_x) * s_w) + b, one float32 rounding after the other."""
    qx, sx = input_by_hand(x.numpy(), levels, granularity)
    qw, sw = weight_by_hand(weight.detach().numpy(), kind, granularity)
    acc = (qx.astype(np.int64) @ qw.astype(np.int64).T).astype(F32)
    y = (acc * sx).astype(F32)
    y = (y * sw.reshape(-1)).astype(F32)
    return y if bias is None else (y + bias.detach().numpy()).astype(F32)


def make(
    kind: str,
    shape: tuple[int, int],
    *,
    bias: bool = True,
    granularity: Any = "row",
    bits: int | None = 8,
    clip: float | None = None,
    arithmetic: Any = "integer",
) -> QuantLinear:
    inputs, outputs = shape
    module = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        module.weight.copy_(lattice((outputs, inputs)))
    weight = MAKERS[kind](granularity, clip=clip)
    input = None if bits is None else UniformQuantizer(bits, granularity, clip=clip)
    return QuantLinear.from_linear(module, weight, input, arithmetic)


@pytest.mark.parametrize("fast", [True, False], ids=["int8", "float32"])
@pytest.mark.parametrize("bits", [8, 4], ids=["a8", "a4"])
@GRANULARITIES
@WEIGHTS
class TestForward:
    @pytest.mark.parametrize("inputs", [2, 3, 5, 7, 33, 128])
    def test_bit_for_bit(
        self,
        kind: str,
        granularity: str,
        bits: int,
        inputs: int,
        fast: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(_integer, "_int8_is_fast", lambda: fast)
        module = make(kind, (inputs, 9), granularity=granularity, bits=bits)
        x = torch.randn(2, 5, inputs)
        x[0, 1] = 0.0
        want = forward_by_hand(
            x, module.weight, module.bias, kind, 2 ** (bits - 1) - 1, granularity
        )
        got = module(x)
        assert got.dtype == torch.float32
        assert np.array_equal(got.detach().numpy(), want)

    def test_without_bias(
        self,
        kind: str,
        granularity: str,
        bits: int,
        fast: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(_integer, "_int8_is_fast", lambda: fast)
        module = make(kind, (7, 3), granularity=granularity, bits=bits, bias=False)
        x = torch.randn(4, 7)
        want = forward_by_hand(x, module.weight, None, kind, 2 ** (bits - 1) - 1, granularity)
        assert np.array_equal(module(x).detach().numpy(), want)


@pytest.mark.parametrize(
    "fast",
    [
        pytest.param(True, id="int8"),
        pytest.param(False, id="float32"),
    ],
)
@WEIGHTS
def test_one_input(kind: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_integer, "_int8_is_fast", lambda: fast)
    module, x = make(kind, (1, 9)), torch.randn(2, 5, 1)
    want = forward_by_hand(x, module.weight, module.bias, kind, 127, "row")
    assert np.array_equal(module(x).detach().numpy(), want)


class TestShapes:
    @pytest.mark.parametrize("batch", [(), (1,), (0,), (3, 0), (2, 3, 4)], ids=str)
    def test_any_batch(self, batch: tuple[int, ...]) -> None:
        module = make("ternary", (5, 4))
        x = torch.randn(*batch, 5, requires_grad=True)
        y = module(x)
        assert y.shape == (*batch, 4)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert module.weight.grad is not None
        assert module.weight.grad.isfinite().all()

    def test_a_token_gets_the_same_bits_beside_any_other(self) -> None:
        module = make("ternary", (33, 7))
        x = torch.randn(4, 6, 33)
        other = torch.randn(4, 6, 33) * 50
        other[2, 3] = x[2, 3]
        assert same_bits(module(x)[2, 3], module(other)[2, 3])

    def test_zero_weights_give_the_bias(self) -> None:
        module = make("ternary", (5, 4))
        nn.init.zeros_(module.weight)
        assert torch.equal(module(torch.randn(3, 5)), module.bias.expand(3, 4))


class _Detached(nn.Module):
    """Fake quantization as x + (Q(x) - x).detach(), in float64, from the formulas above."""

    def __init__(self, kind: str, granularity: str, levels: int | None, clip: float | None) -> None:
        super().__init__()
        self.kind, self.granularity, self.levels, self.clip = kind, granularity, levels, clip

    def _clamp(self, x: Tensor) -> Tensor:
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        xc, wc = self._clamp(x), self._clamp(weight)
        qw, sw = weight_by_hand(wc.detach().float().numpy(), self.kind, self.granularity)
        weight = wc + (torch.from_numpy(qw.astype(np.float64) * sw) - wc).detach()
        if self.levels is not None:
            qx, sx = input_by_hand(xc.detach().float().numpy(), self.levels, self.granularity)
            xc = xc + (torch.from_numpy(qx.astype(np.float64) * sx) - xc).detach()
        return xc @ weight.T + bias


@pytest.mark.parametrize("arithmetic", ["integer", "float"])
@pytest.mark.parametrize("clip", [None, 2.5], ids=["no-clip", "clip-2.5"])
@pytest.mark.parametrize("bits", [8, 4, None], ids=["a8", "a4", "weight-only"])
@GRANULARITIES
@WEIGHTS
def test_gradients_are_those_of_detached_fake_quantization(
    kind: str, granularity: str, bits: int | None, clip: float | None, arithmetic: str
) -> None:
    module = make(
        kind, (33, 6), granularity=granularity, bits=bits, clip=clip, arithmetic=arithmetic
    )
    if clip is not None:
        # Clipped inputs and weights occur, and all of them lie on the lattice still.
        assert (module.weight.abs() > clip).any()
    x = (torch.randn(2, 4, 33) * 2).requires_grad_()
    assert (x.abs() > 2.5).any()
    upstream = torch.randn(2, 4, 6)
    y = module(x)
    y.backward(upstream)

    levels = None if bits is None else 2 ** (bits - 1) - 1
    # A weight-only layer has no input quantizer, hence no clamp of its input.
    plain = _Detached(kind, granularity, levels, clip)
    leaves = [t.detach().double().requires_grad_() for t in (x, module.weight, module.bias)]
    if bits is None and clip is not None:
        weight_only = _Detached(kind, granularity, None, None)
        weight = leaves[1].clamp(-clip, clip)
        want = weight_only(leaves[0], weight, leaves[2])
    else:
        want = plain(*leaves)
    want.backward(upstream.double())
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    for name, got, leaf in zip(
        ("x", "weight", "bias"), (x.grad, module.weight.grad, module.bias.grad), leaves, strict=True
    ):
        assert got is not None
        assert leaf.grad is not None
        worst = (got.double() - leaf.grad).abs().amax() / leaf.grad.abs().amax()
        assert worst < 1e-5, name
        if clip is not None and name == "weight":
            assert not got[module.weight.abs() >= clip].any()


class TestGradientPlumbing:
    def test_only_what_wants_a_gradient_gets_one(self) -> None:
        module = make("ternary", (5, 4))
        module.weight.requires_grad_(False)
        x = torch.randn(3, 5)
        module(x).sum().backward()
        assert module.weight.grad is None
        assert module.bias.grad is not None
        assert module.bias.grad.tolist() == [3.0] * 4

    def test_no_graph_without_gradients(self) -> None:
        module = make("ternary", (5, 4)).requires_grad_(False)
        assert not module(torch.randn(3, 5)).requires_grad

    def test_custom_estimators_of_both_operands_are_asked(self) -> None:
        module = make("ternary", (5, 4))
        module.input_quantizer.estimator = ClippedSTE(0.5)
        module.weight_quantizer.estimator = ClippedSTE(1.0)
        x = torch.randn(6, 5, requires_grad=True)
        module(x).sum().backward()
        assert x.grad is not None
        assert not x.grad[x.abs() >= 0.5].any()
        assert x.grad[x.abs() < 0.5].any()
        assert module.weight.grad is not None
        assert not module.weight.grad[module.weight.abs() >= 1.0].any()


class TestArithmetic:
    @GRANULARITIES
    def test_weight_only_is_a_float_product(self, granularity: str) -> None:
        module = make("binary", (7, 3), granularity=granularity, bits=None)
        x = torch.randn(2, 7)
        codes, scale = weight_by_hand(module.weight.detach().numpy(), "binary", granularity)
        want = nn.functional.linear(x, torch.from_numpy(codes * scale), module.bias)
        assert same_bits(module(x), want)

    @GRANULARITIES
    def test_float_scales_before_it_multiplies(self, granularity: str) -> None:
        module = make("ternary", (33, 5), granularity=granularity, arithmetic="float")
        x = torch.randn(4, 33)
        qx, sx = input_by_hand(x.numpy(), 127, granularity)
        qw, sw = weight_by_hand(module.weight.detach().numpy(), "ternary", granularity)
        want = nn.functional.linear(
            torch.from_numpy(qx * sx), torch.from_numpy(qw * sw), module.bias
        )
        assert same_bits(module(x), want)

    def test_the_two_arithmetics_differ_by_rounding_only(self) -> None:
        x = torch.randn(40, 129)
        one = make("ternary", (129, 40))
        other = make("ternary", (129, 40), arithmetic="float")
        other.load_state_dict(one.state_dict())
        assert not torch.equal(one(x), other(x))
        torch.testing.assert_close(one(x), other(x), rtol=1e-4, atol=1e-4)


class TestInPlace:
    def test_from_linear_keeps_the_object_its_parameters_and_hooks(self) -> None:
        module = nn.Linear(3, 2)
        weight, keys, calls = module.weight, list(module.state_dict()), []
        module.register_forward_hook(lambda *_: calls.append("after"))
        module.register_forward_pre_hook(lambda *_: calls.append("before"))
        made = QuantLinear.from_linear(module, TernaryQuantizer(), UniformQuantizer(8))
        assert made is module
        assert made.weight is weight
        assert list(made.state_dict()) == keys
        made(torch.randn(1, 3))
        assert calls == ["before", "after"]

    @pytest.mark.parametrize("preset", tutelage.Scheme.presets())
    def test_prepare_leaves_names_values_flags_and_random_state(self, preset: str) -> None:
        model = tiny("bert").train()
        model.bert.encoder.layer[0].intermediate.dense.weight.requires_grad_(False)
        calls: list[str] = []
        model.bert.encoder.layer[1].output.dense.register_forward_hook(
            lambda *_: calls.append("hook")
        )
        parameters = dict(model.named_parameters())
        values = {name: value.clone() for name, value in model.state_dict().items()}
        wanted = {name: p.requires_grad for name, p in parameters.items()}
        hooks, state = hooks_of(model), torch.get_rng_state()
        assert tutelage.prepare(model, tutelage.Scheme.preset(preset)) is model
        assert torch.equal(torch.get_rng_state(), state)
        calls.clear()  # the site trace runs the model once
        assert list(model.state_dict()) == list(values)
        assert all(same_bits(model.state_dict()[name], value) for name, value in values.items())
        after = dict(model.named_parameters())
        assert all(after[name] is parameter for name, parameter in parameters.items())
        assert {name: p.requires_grad for name, p in after.items()} == wanted
        assert all(module.training for module in model.modules())
        assert hooks_of(model).keys() == hooks.keys()
        model(input_ids=torch.tensor([[3, 4, 5]]))
        assert calls == ["hook"]

    def test_every_linear_of_the_base_model_and_no_other_is_quantized(self) -> None:
        model = tutelage.prepare(tiny("bert"), tutelage.Scheme.preset("ternary-a8"))
        quantized = {n for n, m in model.named_modules() if isinstance(m, QuantLinear)}
        linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        assert linears - quantized == {"classifier"}
        assert isinstance(model.bert.embeddings.word_embeddings, tutelage.nn.QuantEmbedding)
        assert type(model.bert.embeddings.position_embeddings) is nn.Embedding


def test_an_input_is_quantized_once_for_all_that_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    quantize = _linear.quantize

    def counted(quantizer: Any, x: Tensor, **settings: Any) -> Any:
        made.append(x)
        return quantize(quantizer, x, **settings)

    layers = [
        QuantLinear.from_linear(nn.Linear(32, 8), TernaryQuantizer(), UniformQuantizer(bits))
        for bits in (8, 8, 4)
    ]
    start = torch.randn(5, 32, requires_grad=True)
    expected = [layer(start) for layer in layers]
    monkeypatch.setattr(_linear, "quantize", counted)
    x = start * 1.0
    outputs = [layer(x) for layer in layers]
    for one, other in zip(outputs, expected, strict=True):
        assert torch.equal(one, other)
    assert sum(seen is x for seen in made) == 2  # of 8 bits, and of 4
    sum(y.sum() for y in outputs).backward()
    gradient, start.grad = start.grad, None
    sum(layer(start).sum() for layer in layers).backward()
    assert torch.equal(gradient, start.grad)
    with torch.no_grad():
        x.mul_(2.0)
    made.clear()
    layers[0](x)
    assert sum(seen is x for seen in made) == 1  # it changed
    made.clear()
    for layer in layers:
        layer(start)
    assert sum(seen is start for seen in made) == 3  # a model's own input may change unseen
