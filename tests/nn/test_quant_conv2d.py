"""Patch embeddings: the numbers of a convolution with quantized weights and patches."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import tutelage
from helpers import PRESETS, same_bits
from tutelage.artefacts import pack_state_dict
from tutelage.nn import PackedConv2d, QuantConv2d, is_patch_embedding
from tutelage.quantizers import Quantized
from tutelage.scheme import ModuleSpec, WeightSpec

PRESET = pytest.mark.parametrize("preset", PRESETS)


def spec_of(preset: str, *, weight_only: bool = False) -> ModuleSpec:
    scheme = tutelage.Scheme.preset(preset)
    return ModuleSpec(
        kind="conv2d",
        weight=scheme.weight,
        input=None if weight_only else scheme.input,
        arithmetic=scheme.arithmetic,
    )


def pair(spec: ModuleSpec, kernel: Any = (2, 3), bias: bool = True) -> Any:
    plain = nn.Conv2d(3, 5, kernel, stride=kernel, bias=bias)
    weight: Any = spec.weight
    inputs = [None if spec.input is None else spec.input.build() for _ in range(2)]
    student = QuantConv2d.from_conv2d(
        copy.deepcopy(plain), weight.build(), inputs[0], spec.arithmetic
    )
    packed = PackedConv2d.from_conv2d(plain, weight.build(), inputs[1], spec.arithmetic)
    nn.Sequential(packed).load_state_dict(pack_state_dict(nn.Sequential(student), {"0": spec}))
    return student, packed


@PRESET
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 3, 5, 8), (3, 2, 3)], ids=str)
def test_by_an_independent_loop_over_patches(preset: str, shape: tuple[int, ...]) -> None:
    student, _ = pair(spec_of(preset))
    if len(shape) == 3:
        shape = (3, 2, 3)
    x = torch.randn(shape)
    weight = student.quantized_weight()
    flat = Quantized(weight.codes.double(), weight.scale.double()).dequantize()
    images = x if x.dim() == 4 else x[None]
    rows, columns = images.shape[-2] // 2, images.shape[-1] // 3
    cut = torch.stack(
        [
            images[:, :, 2 * i : 2 * i + 2, 3 * j : 3 * j + 3].flatten(1)
            for i in range(rows)
            for j in range(columns)
        ],
        1,
    )
    values = student.input_quantizer(cut if x.dim() == 4 else cut[0]).double()
    want = values @ flat.t() + student.bias.double()
    want = want.transpose(-1, -2).reshape(*x.shape[:-3], 5, rows, columns)
    got = student(x)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_convolution_of_quantized_values() -> None:
    spec = ModuleSpec(kind="conv2d", weight=WeightSpec(kind="ternary"))
    student, _ = pair(spec)
    x = torch.randn(2, 3, 4, 6)
    y = torch.randn(2, 5, 2, 2)
    (student(x) * y).sum().backward()
    values = student.weight_quantizer(student.weight.detach().flatten(1)).view(5, 3, 2, 3)
    values.requires_grad_()
    out = nn.functional.conv2d(x, values, student.bias.detach(), stride=(2, 3))
    torch.testing.assert_close(student(x).detach(), out.detach())
    (out * y).sum().backward()
    torch.testing.assert_close(student.weight.grad, values.grad)
    assert student.weight.grad.shape == (5, 3, 2, 3)


@PRESET
@pytest.mark.parametrize("weight_only", [False, True], ids=["a8", "weight-only"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_packed_bit_for_bit(preset: str, weight_only: bool, bias: bool) -> None:
    student, packed = pair(spec_of(preset, weight_only=weight_only), (4, 4), bias)
    for shape in [(2, 3, 8, 12), (1, 3, 9, 7), (3, 4, 4)]:
        x = torch.randn(shape)
        assert same_bits(packed(x).detach().contiguous(), student(x).detach().contiguous())


def test_one_scale_per_output_channel() -> None:
    student, packed = pair(spec_of("binary-a8"))
    want = student.weight.detach().abs().flatten(1).mean(1, keepdim=True)
    torch.testing.assert_close(packed.weight_scale, want)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(3, 4, 2, stride=2), True),
        (nn.Conv2d(3, 4, (2, 3), stride=(2, 3), padding="valid"), True),
        (nn.Conv2d(3, 4, 1), True),
        (nn.Conv2d(3, 4, 3, stride=2), False),
        (nn.Conv2d(3, 4, 2, stride=2, padding=1), False),
        (nn.Conv2d(4, 4, 2, stride=2, groups=2), False),
        (nn.Conv2d(3, 4, 2, stride=2, dilation=2), False),
        (nn.Conv2d(3, 4, 1, padding="same"), False),
        (nn.Conv1d(3, 4, 1), False),
        (nn.Linear(3, 4), False),
    ],
    ids=str,
)
def test_what_a_patch_embedding_is(module: nn.Module, expected: bool) -> None:
    assert is_patch_embedding(module) is expected
