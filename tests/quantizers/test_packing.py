"""Codes as bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage.quantizers import (
    BINARY,
    FOUR_LEVEL,
    TERNARY,
    Grid,
    pack,
    packed_width,
    signed,
    unpack,
    unsigned,
)

GRIDS = pytest.mark.parametrize(
    "grid",
    [BINARY, TERNARY, FOUR_LEVEL, unsigned(1), unsigned(2)],
    ids=["binary", "ternary", "four-level", "unsigned-1", "unsigned-2"],
)


def random_codes(rows: int, width: int, grid: Grid, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, grid.levels, (rows, width), generator=generator)
    return (index * grid.step + grid.lo).float()


def packed_by_hand(codes: list[list[float]], grid: Grid) -> list[list[int]]:
    """The first code of a row into the lowest bits of its first byte, zeros at the end."""
    bits = 1 if grid.levels == 2 else 2
    rows = []
    for row in codes:
        packed = [0] * math.ceil(len(row) * bits / 8)
        for place, code in enumerate(row):
            index = int(code - grid.lo) // grid.step
            position = place * bits
            packed[position // 8] += index * 2 ** (position % 8)
        rows.append(packed)
    return rows


@GRIDS
@given(rows=st.integers(1, 5), width=st.integers(0, 40), seed=st.integers(0, 1000))
def test_layout_and_round_trip(grid: Grid, rows: int, width: int, seed: int) -> None:
    codes = random_codes(rows, width, grid, seed)
    packed = pack(codes, grid)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_width(width, grid))
    assert packed.tolist() == packed_by_hand(codes.tolist(), grid)
    back = unpack(packed, width, grid)
    assert back.dtype == torch.int8
    assert torch.equal(back.float(), codes)


@GRIDS
@pytest.mark.parametrize("width", [1, 3, 4, 5, 7, 8, 9, 33, 384])
def test_width_in_bytes(grid: Grid, width: int) -> None:
    bits = {2: 1, 3: 2, 4: 2}[grid.levels]
    assert packed_width(width, grid) == math.ceil(width * bits / 8)


@GRIDS
def test_every_row_starts_at_a_byte(grid: Grid) -> None:
    codes = random_codes(6, 13, grid)
    rows = torch.cat([pack(codes[i : i + 1], grid) for i in range(6)])
    assert torch.equal(pack(codes, grid), rows)


@GRIDS
def test_unused_bits_are_zero(grid: Grid) -> None:
    packed = pack(torch.full((3, 1), float(grid.hi)), grid)
    assert packed.tolist() == [[grid.levels - 1]] * 3


@GRIDS
def test_integer_codes_pack_alike(grid: Grid) -> None:
    codes = random_codes(3, 11, grid)
    assert torch.equal(pack(codes, grid), pack(codes.to(torch.int8), grid))


@GRIDS
def test_flattened_bytes_can_be_viewed_as_rows_again(grid: Grid) -> None:
    codes = random_codes(5, 9, grid)
    flat = pack(codes, grid).reshape(-1)
    assert torch.equal(unpack(flat.view(5, -1), 9, grid).float(), codes)


@pytest.mark.parametrize("grid", [signed(4), signed(8), unsigned(3)], ids=["s4", "s8", "u3"])
def test_refuses_more_than_four_levels(grid: Grid) -> None:
    codes = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="only 2 to 4 can be packed"):
        pack(codes, grid)
    with pytest.raises(ValueError, match="only 2 to 4 can be packed"):
        packed_width(4, grid)


@GRIDS
def test_no_rows(grid: Grid) -> None:
    packed = pack(torch.zeros(0, 5), grid)
    assert packed.shape == (0, packed_width(5, grid))
