"""Grids of codes."""

from __future__ import annotations

import pytest
import torch

from tutelage.quantizers import BINARY, FOUR_LEVEL, TERNARY, Grid, Quantized, signed, unsigned


@pytest.mark.parametrize(
    ("grid", "levels", "bits"),
    [
        pytest.param(BINARY, [-1, 1], 1, id="binary"),
        pytest.param(TERNARY, [-1, 0, 1], 2, id="ternary"),
        pytest.param(FOUR_LEVEL, [-3, -1, 1, 3], 2, id="four-level"),
        pytest.param(signed(2), [-1, 0, 1], 2, id="signed-2"),
        pytest.param(signed(4), list(range(-7, 8)), 4, id="signed-4"),
        pytest.param(signed(8), list(range(-127, 128)), 8, id="signed-8"),
        pytest.param(unsigned(1), [0, 1], 1, id="unsigned-1"),
        pytest.param(unsigned(8), list(range(256)), 8, id="unsigned-8"),
    ],
)
def test_levels_and_bits(grid: Grid, levels: list[int], bits: int) -> None:
    assert list(range(grid.lo, grid.hi + 1, grid.step)) == levels
    assert grid.levels == len(levels)
    assert grid.bits == bits


@pytest.mark.parametrize(
    ("lo", "hi", "step"),
    [
        pytest.param(0, 0, 1, id="one-level"),
        pytest.param(1, -1, 1, id="backwards"),
        pytest.param(-1, 2, 2, id="no-whole-steps"),
        pytest.param(-1, 1, 0, id="no-step"),
        pytest.param(-1, 1, -2, id="negative-step"),
    ],
)
def test_refuses_what_is_no_grid(lo: int, hi: int, step: int) -> None:
    with pytest.raises(ValueError, match="is no grid"):
        Grid(lo, hi, step)


def test_dequantize_is_codes_times_scale() -> None:
    quantized = Quantized(torch.tensor([[1.0, -1.0], [0.0, 1.0]]), torch.tensor([[0.5], [3.0]]))
    assert quantized.dequantize().tolist() == [[0.5, -0.5], [0.0, 3.0]]
