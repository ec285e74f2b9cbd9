"""Statistics of paired runs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

__all__ = ["Interval", "area_over_rates", "paired_bootstrap", "steps_to", "worst_within"]

_Array = np.ndarray

_SLACK = 1.15
"""So that 1, 3, 10 counts as a grid by threes."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether all of the interval is on one side of zero."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    method: Float[_Array, "seeds examples"],
    baseline: Float[_Array, "seeds examples"],
    *,
    draws: int = 4000,
    seed: int = 0,
) -> Interval:
    """Returns the relative change of a mean, mean(method) / mean(baseline) - 1.

    Seeds and examples are drawn anew with replacement, the same ones for both methods, and
    independently of each other (Owen's pigeonhole bootstrap, arXiv 0712.1111); the interval is the
    2.5 to 97.5 % range. With one seed it holds for that seed's order of the data.

    Args:
        method: A figure of every example under every seed, positive.
        baseline: The same of the baseline, for the same seeds and examples.
        draws: Number of draws.
        seed: Seed of the draws.

    Raises:
        ValueError: The shapes differ or are empty.
    """
    if method.shape != baseline.shape or method.size == 0:
        raise ValueError(f"pairs of shapes {method.shape} and {baseline.shape}; give equal ones.")
    seeds, examples = method.shape
    generator = np.random.default_rng(seed)
    rows = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws)
    ratios = np.empty(draws)
    for first in range(0, draws, 500):
        some = rows[first : first + 500]
        columns = generator.multinomial(
            examples, np.full(examples, 1 / examples), size=len(some)
        ).astype(np.float64)
        ours, theirs = (((some @ a) * columns).sum(1) for a in (method, baseline))
        ratios[first : first + 500] = ours / np.maximum(theirs, np.finfo(np.float64).tiny)
    low, high = np.quantile(ratios, [0.025, 0.975]) - 1
    value = float(method.mean(dtype=np.float64) / baseline.mean(dtype=np.float64)) - 1
    return Interval(value, float(low), float(high))


def steps_to(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Returns after how many steps a curve first reaches a target from above.

    Args:
        curve: (step, figure) in the order of steps; lower is better.
        target: The figure to be reached.

    Returns:
        The step, interpolated between two evaluations; ``None`` where it is not reached.
    """
    if curve and curve[0][1] <= target:
        return float(curve[0][0])
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return None


def area_over_rates(figures: Mapping[float, float]) -> float | None:
    """Returns the mean of a figure over the logarithm of the learning rate (trapezoids).

    Args:
        figures: From learning rate to figure.

    Returns:
        The mean, ``None`` for fewer than two rates.
    """
    if len(figures) < 2:
        return None
    rates = sorted(figures)
    area = sum(
        (figures[a] + figures[b]) / 2 * math.log(b / a) for a, b in itertools.pairwise(rates)
    )
    return area / math.log(rates[-1] / rates[0])


def worst_within(figures: Mapping[float, float], rate: float, factor: float = 3.0) -> float | None:
    """Returns how much a figure rises where the learning rate is off by up to a factor.

    Args:
        figures: From learning rate to figure, lower is better.
        rate: The rate that is compared with.
        factor: How far a rate may be off in either direction, give or take 15 %.

    Returns:
        The largest of them relative to that at ``rate``, less 1; ``None`` where the grid does not
        reach that far on both sides.
    """
    near = {
        r: v for r, v in figures.items() if 1 / (factor * _SLACK) <= r / rate <= factor * _SLACK
    }
    enough = min(near) <= rate / factor * _SLACK and max(near) >= rate * factor / _SLACK
    return max(near.values()) / figures[rate] - 1 if enough else None
