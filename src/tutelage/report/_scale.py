"""Axes: from figures to places, and where the ticks are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Scale", "fit"]

_STEPS = (1, 2, 2.5, 5, 10)
_EDGE = 1e-9


@dataclass(frozen=True)
class Scale:
    """An axis.

    Attributes:
        low: The figure at its start.
        high: The figure at its end.
        start: Place of ``low``.
        end: Place of ``high``.
        log: Whether it is logarithmic.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Returns the place of a figure.

        Args:
            value: The figure; more than 0 on a logarithmic axis.
        """
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, wanted: int = 5) -> list[float]:
        """Returns round figures within the axis.

        Args:
            wanted: About how many.
        """
        if not self.log:
            return _linear(self.low, self.high, wanted)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        for factors in ((1,), (1, 3), (1, 2, 5)):
            found = [f * 10.0**e for e in range(first, last + 1) for f in factors]
            inside = [t for t in found if self.low * (1 - _EDGE) <= t <= self.high * (1 + _EDGE)]
            if len(inside) >= min(wanted, 4):
                break
        if len(inside) < 2:
            return _linear(self.low, self.high, wanted)
        return inside[:: math.ceil(len(inside) / (wanted + 2))]


def _linear(low: float, high: float, wanted: int) -> list[float]:
    raw = (high - low) / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(s * size for s in _STEPS if s * size >= raw * (1 - _EDGE))
    first = math.ceil(low / step - _EDGE)
    ticks = itertools.takewhile(
        lambda tick: tick <= high + _EDGE * step, (i * step for i in itertools.count(first))
    )
    return [round(tick, 12) for tick in ticks]


def fit(
    values: Iterable[float], start: float, end: float, *, log: bool = False, zero: bool = False
) -> Scale:
    """Returns an axis that holds figures.

    Args:
        values: The figures; those that are not finite, or not above 0 on a logarithmic axis, are
            passed over.
        start: Place of the axis's start.
        end: Place of its end.
        log: Whether it is logarithmic.
        zero: Whether it begins at 0, or below.
    """
    found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not found:
        return Scale(1.0 if log else 0.0, 10.0 if log else 1.0, start, end, log)
    low, high = min(found), max(found)
    if log:
        margin = max((high / low) ** 0.05, 1.05)
        return Scale(low / margin, high * margin, start, end, log)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Scale(low if zero and low == 0 else low - margin, high + margin, start, end, log)
