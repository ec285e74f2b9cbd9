"""Exact integer products against int64, on both paths."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import same_bits
from tutelage.kernels import (
    _integer,
    active_path,
    integer_linear,
    integer_matmul,
    resident_codes,
)

PATHS = pytest.mark.parametrize("fast", [True, False], ids=["int8", "float32"])


@contextmanager
def path(fast: bool) -> Iterator[None]:
    """Pretends that this CPU multiplies int8 faster than float32, or that it does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_integer, "_int8_is_fast", lambda: fast)
        yield


def integers(shape: tuple[int, ...], largest: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def exact(a: Tensor, b: Tensor) -> np.ndarray:
    """The product in int64, rounded once to float32."""
    return (a.numpy().astype(np.int64) @ b.numpy().astype(np.int64)).astype(np.float32)


# Without VNNI an int8 instruction may saturate at magnitudes that no packed weight has.
LARGEST_WEIGHT = 127 if torch.cpu._is_vnni_supported() else 3


class TestLinear:
    @PATHS
    @pytest.mark.parametrize("batch", [(), (1,), (7,), (2, 5), (0,), (2, 0), (2, 3, 4)], ids=str)
    @pytest.mark.parametrize(
        ("inputs", "outputs"),
        [(1, 1), (2, 9), (3, 5), (7, 2), (33, 17), (384, 64), (130, 1), (5, 0)],
    )
    def test_equals_int64(
        self, batch: tuple[int, ...], inputs: int, outputs: int, fast: bool
    ) -> None:
        x, weight = integers((*batch, inputs), 127), integers((outputs, inputs), LARGEST_WEIGHT, 1)
        with path(fast):
            y = integer_linear(x, weight)
        assert y.dtype == torch.float32
        assert y.shape == (*batch, outputs)
        assert np.array_equal(y.numpy(), exact(x, weight.t()))

    @given(
        rows=st.integers(0, 9),
        inputs=st.integers(2, 70),  # one input: see test_one_input
        outputs=st.integers(0, 20),
        seed=st.integers(0, 999),
    )
    def test_both_paths_agree(self, rows: int, inputs: int, outputs: int, seed: int) -> None:
        x, weight = integers((rows, inputs), 127, seed), integers((outputs, inputs), 3, seed + 1)
        with path(True):
            one = integer_linear(x, weight)
        with path(False):
            other = integer_linear(x, weight)
        assert torch.equal(one, other)
        assert np.array_equal(one.numpy(), exact(x, weight.t()))

    @pytest.mark.parametrize(
        "fast", [pytest.param(True, id="int8"), pytest.param(False, id="float32")]
    )
    def test_one_input(self, fast: bool) -> None:
        x, weight = integers((7, 1), 127), torch.tensor([[1.0], [-3.0], [2.0]])
        with path(fast):
            y = integer_linear(x, weight)
        assert np.array_equal(y.numpy(), exact(x, weight.t()))

    @PATHS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
    def test_weights_may_be_float32_or_int8(self, fast: bool, dtype: torch.dtype) -> None:
        x, weight = integers((3, 9), 127), integers((4, 9), 3, 1)
        with path(fast):
            y = integer_linear(x, weight.to(dtype))
        assert np.array_equal(y.numpy(), exact(x, weight.t()))

    @PATHS
    def test_worst_sums_of_one_sign_stay_exact(self, fast: bool) -> None:
        # 4096 * 127 * 3 is 1.6 million, far below 2^24
        x, weight = torch.full((2, 4096), 127.0), torch.full((3, 4096), 3.0)
        with path(fast):
            assert (integer_linear(x, weight) == 4096 * 127 * 3).all()

    @PATHS
    def test_strided_operands(self, fast: bool) -> None:
        x, weight = integers((8, 3, 2), 127).transpose(0, 2), integers((8, 5), 3, 1).t()
        with path(fast):
            y = integer_linear(x, weight)
        assert np.array_equal(y.numpy(), exact(x, weight.t()))

    @PATHS
    def test_operands_stay_as_they_were(self, fast: bool) -> None:
        x, weight = integers((3, 5), 127), integers((2, 5), 3, 1)
        before = x.clone(), weight.clone()
        with path(fast):
            integer_linear(x, weight)
        assert same_bits(x, before[0])
        assert same_bits(weight, before[1])


class TestMatmul:
    @pytest.mark.parametrize("keys", [1, 2, 517, 518, 519, 1037, 3000])
    def test_the_largest_sums_of_one_sign(self, keys: int) -> None:
        a, b = torch.full((2, keys), 255.0), torch.full((keys, 3), 127.0)
        a[:, -1], b[-1] = 1.0, 1.0  # an odd sum, which float32 holds only below 2^24
        got = integer_matmul(a, b, 255 * 127)
        assert got.dtype == torch.float32
        assert np.array_equal(got.numpy(), exact(a, b))

    @pytest.mark.parametrize("keys", [519, 600, 2048])
    def test_random_sums_beyond_exact_float32(self, keys: int) -> None:
        generator = torch.Generator().manual_seed(keys)
        a = torch.randint(200, 256, (2, 3, 4, keys), generator=generator).float()
        b = torch.randint(90, 128, (2, 3, keys, 5), generator=generator).float()
        got = integer_matmul(a, b, 255 * 127)
        assert np.array_equal(got.numpy(), exact(a, b))

    def test_no_partial_sum_may_reach_2_to_24(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes: list[int] = []
        real = torch.matmul

        def watched(a: Tensor, b: Tensor) -> Tensor:
            sizes.append(a.shape[-1])
            return real(a, b)

        monkeypatch.setattr(torch, "matmul", watched)
        a, b = torch.full((1, 1300), 255.0), torch.full((1300, 1), 127.0)
        integer_matmul(a, b, 255 * 127)
        assert sum(sizes) == 1300
        assert max(sizes) * 255 * 127 < 2**24
        sizes.clear()
        integer_matmul(a[:, :518], b[:518], 255 * 127)
        assert sizes == [518]

    @given(
        left=st.integers(0, 4),
        inner=st.integers(0, 40),
        right=st.integers(0, 4),
        bound=st.sampled_from([1, 7 * 7, 127 * 127, 2**22, 2**24, 2**30]),
        seed=st.integers(0, 99),
    )
    def test_any_bound_and_shape(
        self, left: int, inner: int, right: int, bound: int, seed: int
    ) -> None:
        largest = min(int(bound**0.5), 127)
        a = integers((2, left, inner), largest, seed)
        b = integers((2, inner, right), largest, seed + 1)
        assert np.array_equal(integer_matmul(a, b, bound).numpy(), exact(a, b))

    def test_batches_in_chunks(self) -> None:
        a, b = integers((3, 4, 2, 1700), 127), integers((3, 4, 1700, 2), 127, 1)
        assert np.array_equal(integer_matmul(a, b, 255 * 127).numpy(), exact(a, b))


class TestPaths:
    @PATHS
    def test_name_and_resident_dtype(self, fast: bool) -> None:
        codes = torch.tensor([[1, -1, 0]], dtype=torch.int8)
        with path(fast):
            assert active_path(torch.device("cpu")) == ("int8" if fast else "float32")
            assert active_path(torch.device("cuda")) == "float32"
            resident = resident_codes(codes)
        assert resident.dtype == (torch.int8 if fast else torch.float32)
        assert torch.equal(resident.float(), codes.float())

    def test_asks_torch_once(self) -> None:
        assert _integer._int8_is_fast() == torch.cpu._is_vnni_supported()

    def test_a_nan_stays_a_nan_on_the_int8_path(self) -> None:
        x = torch.tensor([[float("nan"), 1.0]])
        with path(True):
            assert integer_linear(x, torch.ones(1, 2)).isnan().all()

    def test_a_nan_stays_a_nan_on_the_float_path(self) -> None:
        x = torch.tensor([[float("nan"), 1.0]])
        with path(False):
            assert integer_linear(x, torch.ones(1, 2)).isnan().all()
