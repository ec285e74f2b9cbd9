"""Packed modules that share one weight, and what they tell of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from helpers import same_bits
from tutelage.artefacts import pack_state_dict
from tutelage.errors import ArtefactError
from tutelage.nn import PackedEmbedding, PackedLinear, QuantEmbedding, QuantLinear
from tutelage.nn._subclass import looks_up_rows
from tutelage.scheme import ActivationSpec, ModuleSpec, WeightSpec

TERNARY = WeightSpec(kind="ternary")
A8 = ActivationSpec()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)
        self.head.weight = self.table.weight


def tied_pair() -> tuple[Any, Any]:
    """A student and the packed form, both with a head that shares the table."""
    student, packed = Tied(), Tied()
    QuantEmbedding.from_embedding(student.table, TERNARY.build())
    QuantLinear.from_linear(student.head, student.table.weight_quantizer, A8.build())
    PackedEmbedding.from_embedding(packed.table, TERNARY.build())
    PackedLinear.from_linear(packed.head, TERNARY.build(), A8.build(), owner=packed.table)
    specs = {
        "table": ModuleSpec(kind="embedding", weight=TERNARY),
        "head": ModuleSpec(kind="linear", weight=TERNARY, input=A8, shared_with="table"),
    }
    packed.load_state_dict(pack_state_dict(student, specs), strict=True)
    return student, packed


def test_one_copy_serves_lookup_and_product() -> None:
    student, packed = tied_pair()
    assert list(packed.state_dict()) == ["table.weight", "table.weight_scale", "head.bias"]
    x, ids = torch.randn(3, 6), torch.arange(11)
    assert same_bits(packed.head(x).detach(), student.head(x).detach())
    assert same_bits(packed.table(ids), student.table(ids).detach())
    assert packed.head.owner is packed.table


def test_a_copy_shares_within_itself() -> None:
    _, packed = tied_pair()
    other = copy.deepcopy(packed)
    assert other.head.owner is other.table is not packed.table
    with torch.no_grad():
        other.table.weight_scale.mul_(2.0)
    x = torch.randn(3, 6)
    assert not torch.equal(other.head(x), packed.head(x))


def test_a_table_of_another_shape_is_refused() -> None:
    table = PackedEmbedding.from_embedding(nn.Embedding(11, 6), TERNARY.build())
    with pytest.raises(ArtefactError, match="shared with one that does not fit"):
        PackedLinear.from_linear(nn.Linear(6, 12), TERNARY.build(), None, owner=table)
    with pytest.raises(ArtefactError, match="shared with one that does not fit"):
        PackedLinear.from_linear(nn.Linear(6, 11), TERNARY.build(), None, owner=nn.Embedding(11, 6))


class TestStandIn:
    def test_models_read_the_dtype_of_the_computation(self) -> None:
        _, packed = tied_pair()
        for module in (packed.table, packed.head):
            assert module.weight.dtype == torch.float32
            assert module.weight.device == torch.device("cpu")
            assert module.weight.isnan().all()
        assert packed.table.weight.shape == packed.state_dict()["table.weight"].shape
        assert packed.head.weight.shape == (11, 6)

    def test_it_cannot_be_taken_for_a_weight(self) -> None:
        _, packed = tied_pair()
        with pytest.raises(RuntimeError):
            nn.functional.linear(torch.randn(2, 6), packed.table.weight)
        with pytest.raises(RuntimeError):
            nn.functional.embedding(torch.tensor([1]), packed.table.weight)

    def test_tying_again_changes_nothing(self) -> None:
        _, packed = tied_pair()
        x = torch.randn(2, 6)
        want = packed.head(x)
        packed.head.weight = packed.table.weight
        assert same_bits(packed.head(x), want)
        with pytest.raises(AttributeError, match="packed"):
            packed.head.weight = torch.zeros(11, 6)

    def test_half_precision_leaves_the_bytes(self) -> None:
        _, packed = tied_pair()
        want = packed.state_dict()["table.weight"].clone()
        assert same_bits(packed.half().state_dict()["table.weight"], want)


def scaled(cls: Any) -> nn.Embedding:
    return cls(11, 6, 0, embed_scale=2.5)


SCALED = pytest.mark.parametrize("cls", [BartScaledWordEmbedding, Gemma3TextScaledWordEmbedding])


class TestSubclasses:
    @SCALED
    def test_scale_and_class_stay(self, cls: Any) -> None:
        plain = scaled(cls)
        student = QuantEmbedding.from_embedding(copy.deepcopy(plain), TERNARY.build())
        ids = torch.tensor([[1, 2], [3, 3]])
        assert isinstance(student, cls)
        values = TERNARY.build()(plain.weight.detach())
        assert same_bits(student(ids).detach(), values[ids] * 2.5)
        packed = PackedEmbedding.from_embedding(scaled(cls), TERNARY.build())
        spec = ModuleSpec(kind="embedding", weight=TERNARY)
        state = pack_state_dict(nn.Sequential(student), {"0": spec})
        nn.Sequential(packed).load_state_dict(state)
        assert isinstance(packed, cls)
        assert isinstance(packed, PackedEmbedding)
        assert same_bits(packed(ids), student(ids).detach())

    @SCALED
    def test_copied_and_pickled(self, cls: Any) -> None:
        student = QuantEmbedding.from_embedding(scaled(cls), TERNARY.build())
        for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
            assert type(other) is type(student)
            assert other.weight is not student.weight
            assert same_bits(other(torch.arange(11)), student(torch.arange(11)))
        assert type(student).__name__ == f"Quant{cls.__name__}"

    @SCALED
    def test_asking_leaves_no_trace(self, cls: Any) -> None:
        plain = scaled(cls)
        before, names = type(plain), set(plain.__dict__)
        assert looks_up_rows(plain)
        assert type(plain) is before
        assert set(plain.__dict__) == names

    def test_who_does_not_look_up_is_told(self) -> None:
        class Direct(nn.Embedding):
            def forward(self, input: torch.Tensor) -> torch.Tensor:
                return self.weight[input]

        class Other(nn.Embedding):
            def forward(self, ids: torch.Tensor, past: int) -> torch.Tensor:
                return super().forward(ids + past)

        assert looks_up_rows(nn.Embedding(3, 2))
        for cls in (Direct, Other):
            module = cls(3, 2)
            assert not looks_up_rows(module)
            assert type(module) is cls
