"""Codes and distances of latent weights against a loop in float64."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import make_student
from tutelage.quantizers import (
    BinaryQuantizer,
    FourLevelQuantizer,
    TernaryQuantizer,
    UniformQuantizer,
)
from tutelage.study._latents import EDGES, latent_weights, threshold_distance
from tutelage.study._oscillation import watched_layers

KINDS = {"ternary": TernaryQuantizer, "binary": BinaryQuantizer, "four": FourLevelQuantizer}


def thresholds(kind: str, mean: float) -> list[float]:
    if kind == "binary":
        return [0.0]
    if kind == "ternary":
        return [-0.7 * mean, 0.7 * mean]
    return [-1.248 * mean, 0.0, 1.248 * mean]


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_those_of_a_loop(kind: str, granularity: str) -> None:
    quantizer = KINDS[kind](granularity, clip=1.5 if granularity == "tensor" else None)
    rows = torch.randn(3, 7)
    found = threshold_distance(quantizer, rows)
    assert found is not None
    values = rows.double()
    if granularity == "tensor":
        values = values.clamp(-1.5, 1.5)
    scale = quantizer.quantize(rows).scale.double().expand(3, 1)
    for i, row in enumerate(values.tolist()):
        group = [row] if granularity == "row" else values.tolist()
        numbers = [abs(x) for r in group for x in r]
        limits = thresholds(kind, sum(numbers) / len(numbers))
        for j, x in enumerate(row):
            expected = min(abs(x - limit) for limit in limits) / float(scale[i, 0])
            assert float(found[i, j]) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_move_by_the_distance_changes_the_code(kind: str) -> None:
    """Where the row is long, a weight that moves past its threshold changes its code."""
    quantizer = KINDS[kind]()
    rows = torch.randn(1, 4001)
    distance = threshold_distance(quantizer, rows)
    assert distance is not None
    before = quantizer.quantize(rows)
    for place in range(0, 40):
        changed = 0
        for sign in (-1.0, 1.0):
            moved = rows.clone()
            moved[0, place] += sign * 1.02 * (float(distance[0, place]) + 0.01) * before.scale[0, 0]
            changed += int(quantizer.quantize(moved).codes[0, place] != before.codes[0, place])
        assert changed >= 1


def test_shares_of_a_student() -> None:
    student = make_student("bert", "ternary-a8")
    found = latent_weights(student)
    layers = watched_layers(student)
    assert [entry.layer for entry in found] == list(layers)
    for entry in found:
        layer = layers[entry.layer]
        codes = layer.quantized_weight().codes.flatten().tolist()
        for code in (-1, 0, 1):
            assert entry.codes[str(code)] == pytest.approx(codes.count(code) / len(codes))
        distance = threshold_distance(layer.weight_quantizer, layer.weight_rows())
        assert distance is not None
        counts = [0] * (len(EDGES) - 1)
        for value in distance.flatten().tolist():
            counts[min(int(value / 0.1 + 1e-7), len(counts) - 1)] += 1
        assert entry.distances == pytest.approx(
            [n / len(codes) for n in counts], abs=2 / len(codes)
        )
        assert math.fsum(entry.distances) == pytest.approx(1.0)


def test_rows_of_zeros_and_other_quantizers() -> None:
    found = threshold_distance(TernaryQuantizer(), torch.zeros(2, 3))
    assert found is not None
    assert not found.isfinite().any()
    assert threshold_distance(UniformQuantizer(), torch.ones(2, 3)) is None
