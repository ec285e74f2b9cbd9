"""Packed modules give the bits of the modules they were packed from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tutelage
from helpers import PRESETS, same_bits
from tutelage.artefacts import pack_state_dict
from tutelage.kernels import _integer
from tutelage.nn import PackedEmbedding, PackedLinear, QuantEmbedding, QuantLinear
from tutelage.scheme import ActivationSpec, ModuleSpec, WeightSpec

PRESET = pytest.mark.parametrize("preset", PRESETS)
FAST = pytest.mark.parametrize("fast", [True, False], ids=["int8", "float32"])
SHAPES = [(3, 7), (5, 1), (7, 3), (33, 17), (64, 32), (129, 5), (2, 9)]


def linear_pair(spec: ModuleSpec, inputs: int, outputs: int, *, bias: bool = True) -> Any:
    """A QuantLinear and the PackedLinear that holds what ``save`` would write of it."""
    plain = nn.Linear(inputs, outputs, bias=bias)
    assert spec.weight is not None
    input = None if spec.input is None else spec.input.build()
    student = nn.Sequential(
        QuantLinear.from_linear(copy.deepcopy(plain), spec.weight.build(), input, spec.arithmetic)
    )
    packed = PackedLinear.from_linear(
        plain,
        spec.weight.build(),
        None if spec.input is None else spec.input.build(),
        spec.arithmetic,
    )
    holder = nn.Sequential(packed)
    holder.load_state_dict(pack_state_dict(student, {"0": spec}))
    return student[0], packed


def embedding_pair(spec: ModuleSpec, rows: int, width: int, **more: Any) -> Any:
    plain = nn.Embedding(rows, width, **more)
    assert spec.weight is not None
    student = nn.Sequential(
        QuantEmbedding.from_embedding(copy.deepcopy(plain), spec.weight.build())
    )
    packed = PackedEmbedding.from_embedding(plain, spec.weight.build())
    nn.Sequential(packed).load_state_dict(pack_state_dict(student, {"0": spec}))
    return student[0], packed


def linear_spec(preset: str) -> ModuleSpec:
    spec = tutelage.Scheme.preset(preset).linear("any")
    assert spec is not None
    return spec


def inputs_of_shape(batch: tuple[int, ...], width: int) -> Tensor:
    x = torch.randn(*batch, width) * 3
    if x.dim() > 1 and len(x):
        x[0] = 0.0
    return x


@FAST
@PRESET
class TestLinear:
    @pytest.mark.parametrize(("inputs", "outputs"), SHAPES, ids=str)
    def test_bit_for_bit(
        self, preset: str, inputs: int, outputs: int, fast: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_integer, "_int8_is_fast", lambda: fast)
        student, packed = linear_pair(linear_spec(preset), inputs, outputs)
        for batch in [(4,), (2, 3), (), (1, 1)]:
            x = inputs_of_shape(batch, inputs)
            assert same_bits(student(x).detach(), packed(x).detach())

    def test_without_bias(self, preset: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_integer, "_int8_is_fast", lambda: fast)
        student, packed = linear_pair(linear_spec(preset), 13, 6, bias=False)
        x = torch.randn(3, 13)
        assert packed.bias is None
        assert same_bits(student(x).detach(), packed(x))

    def test_empty_batch(self, preset: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_integer, "_int8_is_fast", lambda: fast)
        _, packed = linear_pair(linear_spec(preset), 5, 4)
        assert packed(torch.zeros(2, 0, 5)).shape == (2, 0, 4)

    def test_zero_and_constant_rows(
        self, preset: str, fast: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(_integer, "_int8_is_fast", lambda: fast)
        spec = linear_spec(preset)
        student, packed = linear_pair(spec, 9, 4)
        with torch.no_grad():
            student.weight[0], student.weight[1] = 0.0, -0.25
        nn.Sequential(packed).load_state_dict(pack_state_dict(nn.Sequential(student), {"0": spec}))
        x = torch.randn(3, 9)
        assert same_bits(student(x).detach(), packed(x).detach())
        assert packed(x).isfinite().all()


@PRESET
def test_one_input_on_the_float_path(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On the int8 path torch._int_mm fails for one input, see tests/kernels/test_integer.py.
    monkeypatch.setattr(_integer, "_int8_is_fast", lambda: False)
    student, packed = linear_pair(linear_spec(preset), 1, 6)
    x = torch.randn(5, 1)
    assert same_bits(student(x).detach(), packed(x).detach())


@pytest.mark.parametrize("kind", ["ternary", "binary", "four-level"])
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("arithmetic", ["integer", "float"])
@pytest.mark.parametrize("bits", [None, 8, 4, 2], ids=["weight-only", "a8", "a4", "a2"])
def test_linear_of_every_spec(
    kind: str, granularity: Any, arithmetic: Any, bits: int | None
) -> None:
    spec = ModuleSpec(
        kind="linear",
        weight=WeightSpec(kind=kind, granularity=granularity),
        input=None if bits is None else ActivationSpec(bits=bits, granularity=granularity),
        arithmetic=arithmetic,
    )
    student, packed = linear_pair(spec, 19, 7)
    x = torch.randn(2, 5, 19)
    assert same_bits(student(x).detach(), packed(x).detach())


@PRESET
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 3), (11, 7), (48, 33)], ids=str)
def test_embedding_bit_for_bit(preset: str, rows: int, width: int) -> None:
    spec = tutelage.Scheme.preset(preset).word_embedding("any")
    assert spec is not None
    student, packed = embedding_pair(spec, rows, width)
    for shape in [(4,), (2, 3), (), (0,), (2, 0)]:
        index = torch.randint(0, rows, shape)
        assert torch.equal(student(index), packed(index))


@pytest.mark.parametrize("kind", ["ternary", "binary", "four-level"])
def test_embedding_with_one_scale(kind: str) -> None:
    spec = ModuleSpec(kind="embedding", weight=WeightSpec(kind=kind, granularity="tensor"))
    student, packed = embedding_pair(spec, 9, 5)
    index = torch.tensor([[0, 8], [3, 3]])
    assert packed.weight_scale.shape == (1, 1)
    assert torch.equal(student(index), packed(index))


def test_embedding_keeps_its_zero_padding_row() -> None:
    spec = ModuleSpec(kind="embedding", weight=WeightSpec(kind="ternary"))
    student, packed = embedding_pair(spec, 6, 5, padding_idx=2)
    index = torch.tensor([2, 3])
    assert torch.equal(student(index), packed(index))
    assert not packed(index)[0].any()


@pytest.mark.parametrize(
    "bad",
    [-1, 6],
)
def test_an_index_out_of_range_is_an_error(bad: int) -> None:
    spec = ModuleSpec(kind="embedding", weight=WeightSpec(kind="ternary"))
    _, packed = embedding_pair(spec, 6, 5)
    with pytest.raises(IndexError):
        packed(torch.tensor([bad]))


def test_zeros_have_the_same_sign() -> None:
    spec = ModuleSpec(kind="embedding", weight=WeightSpec(kind="ternary"))
    student, packed = embedding_pair(spec, 9, 33)
    index = torch.arange(9)
    assert same_bits(student(index).detach(), packed(index))


class TestStorage:
    def test_linear_holds_bytes_under_the_name_of_the_weight(self) -> None:
        _, packed = linear_pair(linear_spec("ternary-a8"), 33, 4)
        state = packed.state_dict()
        assert list(state) == ["bias", "weight", "weight_scale"]
        assert state["weight"].dtype == torch.uint8
        assert state["weight"].shape == (4 * 9,)
        assert state["weight_scale"].shape == (4, 1)
        assert not list(packed.parameters(recurse=False))[1:]  # the bias alone

    def test_codes_are_unpacked_once_in_the_dtype_of_the_path(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for fast, dtype in ((True, torch.int8), (False, torch.float32)):
            monkeypatch.setattr(_integer, "_int8_is_fast", lambda fast=fast: fast)
            student, packed = linear_pair(linear_spec("w2-a8"), 6, 5)
            assert packed._codes is None
            codes = packed.codes()
            assert codes.dtype == dtype
            assert packed.codes() is codes
            assert torch.equal(
                codes.float(), student.weight_quantizer.quantize(student.weight).codes
            )

    def test_made_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            plain, table = nn.Linear(7, 3), nn.Embedding(5, 9)
        weight = WeightSpec(kind="binary").build()
        assert PackedLinear.from_linear(plain, weight, None).weight.is_meta
        assert PackedEmbedding.from_embedding(table, weight).weight_scale.is_meta

    def test_shows_shape_and_bits(self) -> None:
        _, packed = linear_pair(linear_spec("binary-a8"), 6, 5)
        assert packed.extra_repr() == "6, 5, bits=1"
        spec = ModuleSpec(kind="embedding", weight=WeightSpec(kind="ternary"))
        assert embedding_pair(spec, 6, 5)[1].extra_repr() == "6, 5, bits=2"
