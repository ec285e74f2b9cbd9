from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.study._statistics import (
    Interval,
    area_over_rates,
    paired_bootstrap,
    steps_to,
    worst_within,
)


def positive(seeds: int, examples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(1.0, 0.1, (seeds, examples))


def test_a_method_is_as_good_as_itself() -> None:
    figures = positive(3, 40)
    assert paired_bootstrap(figures, figures) == Interval(0.0, 0.0, 0.0)


def test_a_constant_factor_has_no_spread() -> None:
    """Pairs share their draws: what is 20 % lower everywhere is so in every draw."""
    figures = positive(3, 40)
    found = paired_bootstrap(0.8 * figures, figures)
    assert found.value == pytest.approx(-0.2)
    assert found.low == pytest.approx(-0.2)
    assert found.high == pytest.approx(-0.2)
    assert found.excludes_zero


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_the_interval_is_that_of_a_loop(seeds: int) -> None:
    method, baseline = positive(seeds, 30, 1), positive(seeds, 30, 2)
    draw = np.random.default_rng(7)
    ratios = []
    for _ in range(4000):
        rows = draw.integers(0, seeds, seeds)
        columns = draw.integers(0, 30, 30)
        sums = [sum(a[i, j] for i in rows for j in columns) for a in (method, baseline)]
        ratios.append(sums[0] / sums[1] - 1)
    found = paired_bootstrap(method, baseline)
    low, high = np.quantile(ratios, [0.025, 0.975])
    assert found.low == pytest.approx(low, abs=0.04)
    assert found.high == pytest.approx(high, abs=0.04)
    assert found.value == pytest.approx(method.mean() / baseline.mean() - 1)


def test_draws_follow_the_seed() -> None:
    pair = positive(3, 20, 1), positive(3, 20, 2)
    assert paired_bootstrap(*pair) == paired_bootstrap(*pair)
    assert paired_bootstrap(*pair) != paired_bootstrap(*pair, seed=1)


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="give equal ones"):
        paired_bootstrap(positive(2, 3), positive(3, 2))
    with pytest.raises(ValueError, match="give equal ones"):
        paired_bootstrap(positive(0, 3), positive(0, 3))


@pytest.mark.parametrize(
    ("curve", "target", "steps"),
    [
        ([(10, 0.4), (20, 0.2)], 0.3, 15.0),
        ([(10, 0.4), (20, 0.2)], 0.4, 10.0),
        ([(10, 0.4), (20, 0.2)], 0.2, 20.0),
        ([(10, 0.4), (20, 0.2)], 0.1, None),
        ([(10, 0.4), (20, 0.5), (30, 0.1)], 0.3, 25.0),
        ([(10, 0.3)], 0.5, 10.0),
        ([], 0.5, None),
    ],
)
def test_steps_to_a_target(
    curve: list[tuple[int, float]], target: float, steps: float | None
) -> None:
    found = steps_to(curve, target)
    assert found is None if steps is None else found == pytest.approx(steps)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.floats(0.01, 1.0))
def test_a_target_is_reached_where_the_curve_first_is_below(
    values: list[float], target: float
) -> None:
    found = steps_to(list(enumerate(values, 1)), target)
    first = next((i for i, v in enumerate(values, 1) if v <= target), None)
    if first is None:
        assert found is None
    else:
        assert found is not None
        assert max(1, first - 1) <= found <= first + 1e-9


def test_area_is_a_mean_over_the_logarithm() -> None:
    assert area_over_rates({1e-4: 0.2, 1e-3: 0.2, 1e-2: 0.2}) == pytest.approx(0.2)
    uneven = area_over_rates({1e-4: 1.0, 3e-4: 0.0, 1e-2: 0.0})
    assert uneven == pytest.approx(0.5 * math.log(3) / math.log(100))
    assert area_over_rates({1e-4: 0.2}) is None


def test_robustness_needs_rates_on_both_sides() -> None:
    figures = {1e-4: 0.3, 3e-4: 0.2, 1e-3: 0.25, 1e-2: 9.0}
    assert worst_within(figures, 3e-4) == pytest.approx(0.5)
    assert worst_within(figures, 1e-4) is None
    assert worst_within({1e-4: 0.3, 2e-4: 0.2, 1e-3: 0.3}, 2e-4) is None
