"""Codes as bytes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage.quantizers import (
    BINARY,
    ENCODINGS,
    FOUR_LEVEL,
    TERNARY,
    Grid,
    are_codes,
    pack,
    packed_width,
    recode,
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


def digits_by_hand(codes: list[list[float]]) -> list[list[int]]:
    """The first ternary code of a row is the lowest digit of its first byte."""
    rows = []
    for row in codes:
        packed = []
        for start in range(0, len(row), 5):
            value = 0
            for code in reversed(row[start : start + 5]):
                value = 3 * value + int(code) + 1
            packed.append(value)
        rows.append(packed)
    return rows


@given(rows=st.integers(1, 5), width=st.integers(0, 40), seed=st.integers(0, 1000))
def test_base_3_layout_and_round_trip(rows: int, width: int, seed: int) -> None:
    codes = random_codes(rows, width, TERNARY, seed)
    packed = pack(codes, TERNARY, "base3")
    assert packed.shape == (rows, packed_width(width, TERNARY, "base3"))
    assert packed.tolist() == digits_by_hand(codes.tolist())
    assert are_codes(packed, width, TERNARY, "base3")
    assert torch.equal(unpack(packed, width, TERNARY, "base3").float(), codes)


def test_base_3_takes_five_codes_a_byte() -> None:
    assert [packed_width(w, TERNARY, "base3") for w in (1, 5, 6, 768, 3072)] == [1, 1, 2, 154, 615]
    assert pack(torch.ones(1, 5), TERNARY, "base3").tolist() == [[242]]
    assert pack(torch.tensor([[1.0, -1, -1, -1, -1]]), TERNARY, "base3").tolist() == [[2]]


@pytest.mark.parametrize("grid", [BINARY, FOUR_LEVEL], ids=["binary", "four-level"])
def test_grids_that_fill_their_bits_are_stored_alike(grid: Grid) -> None:
    codes = random_codes(3, 13, grid)
    packed = pack(codes, grid, "base3")
    assert torch.equal(packed, pack(codes, grid))
    assert torch.equal(unpack(packed, 13, grid, "base3").float(), codes)


@GRIDS
@given(rows=st.integers(1, 7), width=st.integers(0, 40), seed=st.integers(0, 1000))
def test_recoded_bytes_are_those_of_the_other_encoding(
    grid: Grid, rows: int, width: int, seed: int
) -> None:
    codes = random_codes(rows, width, grid, seed)
    for before in ENCODINGS:
        for after in ENCODINGS:
            made = recode(pack(codes, grid, before), width, grid, before, after)
            assert torch.equal(made, pack(codes, grid, after))


def test_recoding_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tutelage.quantizers._packing._CHUNK", 20)
    codes = random_codes(11, 7, TERNARY)
    made = recode(pack(codes, TERNARY), 7, TERNARY, "bits", "base3")
    assert torch.equal(made, pack(codes, TERNARY, "base3"))


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("grid", [BINARY, TERNARY, FOUR_LEVEL], ids=["b", "t", "f"])
@pytest.mark.parametrize("width", [1, 3, 5, 9])
def test_only_bytes_that_pack_makes_are_codes(grid: Grid, encoding: Any, width: int) -> None:
    """Every value of the last byte, against packing what it unpacks to."""
    size = packed_width(width, grid, encoding)
    accepted = 0
    for value in range(256):
        packed = torch.zeros(2, size, dtype=torch.uint8)
        packed[1, -1] = value
        index = (unpack(packed, width, grid, encoding) - grid.lo) // grid.step
        again = pack(index.clamp(max=grid.levels - 1) * grid.step + grid.lo, grid, encoding)
        found = are_codes(packed, width, grid, encoding)
        assert found == torch.equal(again, packed)
        accepted += found
    per_byte = 5 if encoding == "base3" and grid is TERNARY else 8 // grid.bits
    assert accepted == grid.levels ** (width - (size - 1) * per_byte)


def test_bytes_that_are_no_codes_before_the_last() -> None:
    for encoding, value in (("base3", 243), ("bits", 0b11), ("bits", 0b11000000)):
        packed = torch.zeros(3, packed_width(20, TERNARY, encoding), dtype=torch.uint8)
        assert are_codes(packed, 20, TERNARY, encoding)
        packed[1, 0] = value
        assert not are_codes(packed, 20, TERNARY, encoding)


def test_an_unknown_encoding() -> None:
    with pytest.raises(Exception, match="base7"):  # a ValueError where nobody checks annotations
        packed_width(4, TERNARY, "base7")
