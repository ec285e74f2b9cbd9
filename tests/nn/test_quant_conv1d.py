"""GPT-2's Conv1D: the numbers of a Linear with the transposed weight."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import tutelage
from helpers import PRESETS, same_bits
from tutelage.artefacts import pack_state_dict
from tutelage.kernels import _integer
from tutelage.nn import PackedLinear, QuantConv1D, QuantLinear, kind_of
from tutelage.scheme import ModuleSpec, WeightSpec

PRESET = pytest.mark.parametrize("preset", PRESETS)


def specs(preset: str) -> tuple[ModuleSpec, Any, Any]:
    spec = tutelage.Scheme.preset(preset).linear("any", "conv1d")
    assert spec is not None
    assert spec.weight is not None
    assert spec.input is not None
    return spec, spec.weight.build(), spec.input.build()


def conv1d(inputs: int, outputs: int) -> Conv1D:
    plain = Conv1D(outputs, inputs)
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    return plain


def quantized(preset: str, inputs: int, outputs: int) -> tuple[QuantConv1D, QuantLinear]:
    """A QuantConv1D and the QuantLinear with its transposed weight."""
    plain, linear = conv1d(inputs, outputs), nn.Linear(inputs, outputs)
    linear.load_state_dict({"weight": plain.weight.t(), "bias": plain.bias})
    spec, weight, input = specs(preset)
    return (
        QuantConv1D.from_conv1d(plain, weight, input, spec.arithmetic),
        QuantLinear.from_linear(linear, weight, input, spec.arithmetic),
    )


@PRESET
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (33, 17), (17, 64)], ids=str)
def test_forward_and_gradients_are_those_of_a_linear(
    preset: str, inputs: int, outputs: int
) -> None:
    conv, linear = quantized(preset, inputs, outputs)
    x = (torch.randn(2, 4, inputs) * 2).requires_grad_()
    y = torch.randn(2, 4, outputs)
    one, other = conv(x), linear(x)
    assert same_bits(one, other)
    (grad,) = torch.autograd.grad((one * y).sum(), x, retain_graph=True)
    (want,) = torch.autograd.grad((other * y).sum(), x, retain_graph=True)
    assert same_bits(grad, want)
    (one * y).sum().backward()
    (other * y).sum().backward()
    assert conv.weight.grad.shape == (inputs, outputs)
    assert torch.equal(conv.weight.grad, linear.weight.grad.t())
    assert torch.equal(conv.bias.grad, linear.bias.grad)


def test_one_scale_per_column_by_an_independent_loop() -> None:
    conv, _ = quantized("ternary-a8", 9, 4)
    weight, got = conv.weight.detach().double(), conv.quantized_weight()
    assert got.scale.shape == (4, 1)
    for column in range(4):
        values = weight[:, column].tolist()
        mean = sum(abs(v) for v in values) / 9
        kept = [abs(v) > 0.7 * mean for v in values]
        scale = sum(abs(v) for v, k in zip(values, kept, strict=True) if k) / sum(kept)
        assert got.scale[column].item() == pytest.approx(scale, rel=1e-6)
        codes = [(1 if v > 0 else -1) if k else 0 for v, k in zip(values, kept, strict=True)]
        assert got.codes[column].tolist() == codes


def test_name_shape_and_class_stay() -> None:
    plain = conv1d(6, 5)
    weight, state = plain.weight, copy.deepcopy(plain.state_dict())
    _, quantizer, input = specs("binary-a8")
    made = QuantConv1D.from_conv1d(plain, quantizer, input)
    assert made is plain
    assert isinstance(made, Conv1D)
    assert made.weight is weight
    assert weight.shape == (6, 5)
    assert made.state_dict().keys() == state.keys()
    assert kind_of(made) == "conv1d"
    assert "BinaryQuantizer" in repr(made)
    assert "nf=5, nx=6" in repr(made)


def test_weight_only() -> None:
    plain = conv1d(7, 3)
    made = QuantConv1D.from_conv1d(plain, WeightSpec(kind="ternary").build(), None)
    x = torch.randn(2, 7)
    values = made.weight_quantizer(made.weight.t().contiguous())
    torch.testing.assert_close(made(x), x @ values.t() + made.bias)


@PRESET
@pytest.mark.parametrize("fast", [True, False], ids=["int8", "float32"])
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 3), (33, 17), (17, 64)], ids=str)
def test_packed_bit_for_bit(
    preset: str, fast: bool, inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_integer, "_int8_is_fast", lambda: fast)
    conv, _ = quantized(preset, inputs, outputs)
    spec, weight, input = specs(preset)
    packed = PackedLinear.from_conv1d(conv1d(inputs, outputs), weight, input, spec.arithmetic)
    nn.Sequential(packed).load_state_dict(pack_state_dict(nn.Sequential(conv), {"0": spec}))
    for batch in [(4,), (2, 3), (1, 1), (2, 0)]:
        x = torch.randn(*batch, inputs) * 3
        assert same_bits(packed(x).detach(), conv(x).detach())


def test_codes_are_packed_row_by_row_of_output_features() -> None:
    conv, linear = quantized("w2-a8", 9, 6)
    spec, _, _ = specs("w2-a8")
    one, other = (pack_state_dict(nn.Sequential(m), {"0": spec}) for m in (conv, linear))
    assert one["0.weight"].shape == (6 * 3,)
    assert one["0.weight_scale"].shape == (6, 1)
    for name, tensor in other.items():
        assert same_bits(one[name], tensor)
