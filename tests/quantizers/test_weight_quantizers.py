"""What the ternary, the binary and the four-level quantizer have in common."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from quantizer_loops import (
    FEW,
    SUBNORMAL,
    binary,
    check_weights,
    four_level,
    moderate,
    tensors,
    ternary,
)
from torch import Tensor

from tutelage.quantizers import (
    BINARY,
    FOUR_LEVEL,
    TERNARY,
    BaseQuantizer,
    BinaryQuantizer,
    ClippedSTE,
    FourLevelQuantizer,
    Granularity,
    Quantizer,
    StraightThrough,
    TernaryQuantizer,
)

KINDS = {
    "ternary": (TernaryQuantizer, ternary, TERNARY, (-1, 0, 1)),
    "binary": (BinaryQuantizer, binary, BINARY, (-1, 1)),
    "four-level": (FourLevelQuantizer, four_level, FOUR_LEVEL, (-3, -1, 1, 3)),
}
CLASSES = pytest.mark.parametrize("make", [k[0] for k in KINDS.values()], ids=list(KINDS))
GRANULARITIES = pytest.mark.parametrize("granularity", ["row", "tensor"])
CLIPS = pytest.mark.parametrize("clip", [None, 2.5, 0.01], ids=["no-clip", "clip-2.5", "clip-0.01"])


@CLIPS
@GRANULARITIES
@pytest.mark.parametrize("kind", list(KINDS))
class TestAgainstLoop:
    @FEW
    @given(x=tensors())
    def test_codes_and_scale(
        self, kind: str, granularity: Granularity, clip: float | None, x: Tensor
    ) -> None:
        make, loop, _, _ = KINDS[kind]
        check_weights(make(granularity, clip=clip).quantize(x), x, granularity, clip, loop)

    @pytest.mark.parametrize("shape", [(64, 384), (3, 1), (1, 1), (1, 1000), (2, 3, 33)])
    def test_codes_and_scale_of_gaussian_weights(
        self, kind: str, granularity: Granularity, clip: float | None, shape: tuple[int, ...]
    ) -> None:
        make, loop, _, _ = KINDS[kind]
        x = torch.randn(shape)
        check_weights(make(granularity, clip=clip).quantize(x), x, granularity, clip, loop)


@GRANULARITIES
@pytest.mark.parametrize("kind", list(KINDS))
class TestGrid:
    @FEW
    @given(x=tensors(1e35))
    def test_codes_are_levels_and_nothing_is_nan_up_to_huge_magnitudes(
        self, kind: str, granularity: Granularity, x: Tensor
    ) -> None:
        make, _, grid, levels = KINDS[kind]
        quantizer = make(granularity)
        quantized = quantizer.quantize(x)
        assert quantizer.grid == grid
        assert set(quantized.codes.reshape(-1).tolist()) <= set(levels)
        assert not quantized.dequantize().isnan().any()

    def test_every_level_is_reached(self, kind: str, granularity: Granularity) -> None:
        make, _, _, levels = KINDS[kind]
        codes = make(granularity).quantize(torch.randn(8, 64)).codes
        assert set(codes.reshape(-1).tolist()) == set(levels)


@GRANULARITIES
@CLASSES
class TestEdges:
    def test_zeros_give_zeros(self, make: type[BaseQuantizer], granularity: Granularity) -> None:
        quantized = make(granularity).quantize(torch.zeros(3, 5))
        assert torch.equal(quantized.scale, torch.zeros_like(quantized.scale))
        assert torch.equal(quantized.dequantize(), torch.zeros(3, 5))

    @pytest.mark.parametrize("value", [1.0, -0.3, 1e-38, 1e-42, 1e30])
    def test_constants_are_exact(
        self, make: type[BaseQuantizer], granularity: Granularity, value: float
    ) -> None:
        x = torch.full((4, 4), value)
        torch.testing.assert_close(make(granularity)(x), x, rtol=1e-6, atol=SUBNORMAL)

    @pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 4), (0, 0)], ids=str)
    def test_empty(
        self, make: type[BaseQuantizer], granularity: Granularity, shape: tuple[int, ...]
    ) -> None:
        x = torch.zeros(shape, requires_grad=True)
        y = make(granularity)(x)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == shape

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
    def test_other_float_dtypes_are_quantized_as_float32(
        self, make: type[BaseQuantizer], granularity: Granularity, dtype: torch.dtype
    ) -> None:
        x = torch.randn(4, 7).to(dtype)
        low, full = make(granularity).quantize(x), make(granularity).quantize(x.float())
        assert torch.equal(low.codes, full.codes)
        assert torch.equal(low.scale, full.scale)

    def test_latent_weights_and_random_state_stay_as_they_were(
        self, make: type[BaseQuantizer], granularity: Granularity
    ) -> None:
        x = torch.randn(4, 7)
        before, state = x.clone(), torch.get_rng_state()
        make(granularity, clip=1.0).quantize(x)
        assert torch.equal(x, before)
        assert torch.equal(torch.get_rng_state(), state)

    @pytest.mark.parametrize("exponent", [-20, -3, 1, 17])
    def test_power_of_two_moves_the_scale_alone(
        self, make: type[BaseQuantizer], granularity: Granularity, exponent: int
    ) -> None:
        x = torch.randn(6, 33)
        one, other = make(granularity).quantize(x), make(granularity).quantize(x * 2.0**exponent)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale * 2.0**exponent, other.scale)


@CLASSES
class TestProperties:
    @FEW
    @given(x=moderate(), exponent=st.integers(-40, 40))
    def test_power_of_two_equivariance(
        self, make: type[BaseQuantizer], x: Tensor, exponent: int
    ) -> None:
        one, other = make().quantize(x), make().quantize(x * 2.0**exponent)
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.scale * 2.0**exponent, other.scale)

    @given(x=tensors())
    def test_negation_mirrors_all_but_zeros(self, make: type[BaseQuantizer], x: Tensor) -> None:
        one, other = make().quantize(x), make().quantize(-x)
        off = x != 0
        assert torch.equal(one.scale, other.scale)
        assert torch.equal(one.codes[off], -other.codes[off])
        zeros = other.codes[~off]
        assert torch.equal(one.codes[~off], zeros)  # sign(0) = +1, or the code 0

    @given(x=moderate(min_dims=2, max_dims=2))
    def test_scale_is_the_best_for_the_codes(self, make: type[BaseQuantizer], x: Tensor) -> None:
        codes, scale = (t.double() for t in make().quantize(x))
        x = x.double()

        def error(factor: float) -> Tensor:
            return (x - codes * scale * factor).square().sum(-1)

        best = error(1.0)
        slack = 1e-9 * x.square().sum(-1)
        for factor in (0.99, 1.01, 0.5, 2.0):
            assert (error(factor) >= best - slack).all()

    @FEW
    @given(x=tensors(min_dims=2, max_dims=2, min_side=1), data=st.data())
    def test_a_row_does_not_see_the_others(
        self, make: type[BaseQuantizer], x: Tensor, data: st.DataObject
    ) -> None:
        kept = data.draw(st.integers(0, len(x) - 1))
        changed = torch.randn_like(x)
        changed[kept] = x[kept]
        one, other = make().quantize(x), make().quantize(changed)
        assert torch.equal(one.codes[kept], other.codes[kept])
        assert torch.equal(one.scale[kept], other.scale[kept])

    def test_per_tensor_is_per_row_of_all_values(self, make: type[BaseQuantizer]) -> None:
        x = torch.randn(5, 6)
        whole, row = make("tensor").quantize(x), make("row").quantize(x.reshape(1, -1))
        assert torch.equal(whole.codes.reshape(1, -1), row.codes)
        assert torch.allclose(whole.scale, row.scale, rtol=1e-6)


@CLASSES
class TestConstruction:
    def test_refuses_an_unknown_granularity(self, make: type[BaseQuantizer]) -> None:
        # The type check of the tests may come before the library's own.
        with pytest.raises((ValueError, TypeCheckError), match=r"'tensor'(,| or) 'row'"):
            make("column")  # type: ignore[arg-type]

    @pytest.mark.parametrize("clip", [0.0, -1.0, float("nan")])
    def test_refuses_a_clip_that_is_not_positive(
        self, make: type[BaseQuantizer], clip: float
    ) -> None:
        with pytest.raises(ValueError, match="use a positive number"):
            make(clip=clip)

    def test_default_estimator_follows_the_clip(self, make: type[BaseQuantizer]) -> None:
        assert isinstance(make().estimator, StraightThrough)
        clipped = make(clip=2.5).estimator
        assert isinstance(clipped, ClippedSTE)
        assert clipped.clip == 2.5

    def test_has_no_state(self, make: type[BaseQuantizer]) -> None:
        assert not make(clip=1.0).state_dict()
        assert isinstance(make(), Quantizer)

    def test_shows_its_settings(self, make: type[BaseQuantizer]) -> None:
        assert (
            repr(make(clip=2.5)) == f"{make.__name__}('row', clip=2.5, estimator=ClippedSTE(2.5))"
        )
        assert repr(make("tensor")) == f"{make.__name__}('tensor', estimator=StraightThrough())"


def test_base_quantizer_is_abstract() -> None:
    with pytest.raises(NotImplementedError):
        BaseQuantizer().quantize(torch.ones(2))


@CLASSES
def test_a_single_number_per_row(make: type[BaseQuantizer]) -> None:
    assert make("row")(torch.tensor(0.5)).shape == ()


@pytest.mark.parametrize("row", [[3e38] * 4, [1.0, math.inf, 2.0], [1.0, math.nan, 2.0]], ids=str)
@pytest.mark.parametrize("make", [BinaryQuantizer, FourLevelQuantizer, TernaryQuantizer])
def test_a_row_that_has_no_sum_never_passes_for_a_number(
    make: type[BaseQuantizer], row: list[float]
) -> None:
    assert not make().quantize(torch.tensor([row])).scale.isfinite().any()
