"""QuantEmbedding: gathered rows are the rows of the quantized table."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from helpers import same_bits
from tutelage.nn import QuantEmbedding
from tutelage.quantizers import BinaryQuantizer, FourLevelQuantizer, TernaryQuantizer

QUANTIZERS = pytest.mark.parametrize(
    "quantizer",
    [TernaryQuantizer, BinaryQuantizer, FourLevelQuantizer],
    ids=["ternary", "binary", "four-level"],
)
GRANULARITIES = pytest.mark.parametrize("granularity", ["row", "tensor"])


def make(quantizer: Any, granularity: Any = "row", rows: int = 11, width: int = 7, **more: Any):
    return QuantEmbedding.from_embedding(
        nn.Embedding(rows, width, **more), quantizer(granularity, clip=more.pop("clip", None))
    )


@QUANTIZERS
@GRANULARITIES
class TestForward:
    @given(
        width=st.integers(1, 70),
        ids=st.lists(st.integers(0, 10), max_size=30),
        dims=st.sampled_from([1, 2, 3]),
    )
    def test_rows_are_those_of_the_whole_table(
        self, quantizer: Any, granularity: str, width: int, ids: list[int], dims: int
    ) -> None:
        module = make(quantizer, granularity, width=width)
        table = module.weight_quantizer.quantize(module.weight).dequantize()
        index = torch.tensor(ids, dtype=torch.long).reshape([1] * (dims - 1) + [-1])
        got = module(index)
        assert got.shape == (*index.shape, width)
        assert same_bits(got, table[index])

    def test_gradient_reaches_used_rows_alone_and_counts_repeats(
        self, quantizer: Any, granularity: str
    ) -> None:
        module = make(quantizer, granularity)
        upstream = torch.randn(2, 3, 7)
        index = torch.tensor([[2, 5, 2], [9, 2, 5]])
        module(index).backward(upstream)
        want = torch.zeros(11, 7).index_add(0, index.reshape(-1), upstream.reshape(-1, 7))
        assert module.weight.grad is not None
        torch.testing.assert_close(module.weight.grad, want)
        unused = [row for row in range(11) if row not in (2, 5, 9)]
        assert not module.weight.grad[unused].any()

    def test_padding_row_is_looked_up_but_not_trained(
        self, quantizer: Any, granularity: str
    ) -> None:
        module = make(quantizer, granularity, padding_idx=0)
        assert not module.weight[0].any()  # torch starts it at zero: no NaN may come of it
        out = module(torch.tensor([[0, 3, 0]]))
        assert out.isfinite().all()
        out.sum().backward()
        assert module.weight.grad is not None
        assert not module.weight.grad[0].any()
        assert module.weight.grad[3].any()


@QUANTIZERS
def test_clip_stops_the_gradient_of_clipped_entries(quantizer: Any) -> None:
    module = QuantEmbedding.from_embedding(nn.Embedding(4, 9), quantizer("row", clip=0.5))
    module(torch.arange(4)).sum().backward()
    assert module.weight.grad is not None
    assert torch.equal(module.weight.grad, (module.weight.abs() < 0.5).float())


def test_a_row_does_not_see_the_others() -> None:
    module = make(TernaryQuantizer)
    before = module(torch.tensor([4]))
    with torch.no_grad():
        module.weight[:4] *= 100
        module.weight[5:] = 0
    assert same_bits(module(torch.tensor([4])), before)


def test_from_embedding_is_in_place() -> None:
    module = nn.Embedding(5, 3)
    weight, calls = module.weight, []
    module.register_forward_hook(lambda *_: calls.append(1))
    made = QuantEmbedding.from_embedding(module, TernaryQuantizer())
    assert made is module
    assert made.weight is weight
    assert list(made.state_dict()) == ["weight"]
    made(torch.tensor([1]))
    assert calls == [1]


@GRANULARITIES
@pytest.mark.parametrize("bad", [-1, 5])
def test_an_index_out_of_range_is_an_error(granularity: str, bad: int) -> None:
    module = make(TernaryQuantizer, granularity, rows=5)
    with pytest.raises(IndexError):
        module(torch.tensor([bad]))
