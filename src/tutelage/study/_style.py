"""What the figures share: colours, markers, size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

__all__ = [
    "COLOURS",
    "MARKERS",
    "Data",
    "figure_of",
    "histogram_bins",
    "short_names",
    "whole_numbers",
]

Data = Mapping[str, Any]
"""Plain data, as an analysis writes them as JSON."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
"""Okabe and Ito's, told apart with every kind of colour vision."""

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def figure_of(width: float, height: float) -> Any:
    """Makes an empty figure.

    Args:
        width: In inches.
        height: In inches.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def histogram_bins(count: int) -> int:
    """Returns the number of bins of a histogram: few where there are few values.

    Args:
        count: Number of values.
    """
    return max(6, min(30, round(2 * count**0.5)))


def short_names(names: Sequence[str]) -> list[str]:
    """Returns names of modules without what all of them begin with.

    Args:
        names: Qualified names.
    """
    parts = [name.split(".") for name in names]
    shared = 0
    shortest = min(map(len, parts), default=0)
    while shared < shortest - 1 and len({tuple(p[: shared + 1]) for p in parts}) == 1:
        shared += 1
    return [".".join(part[shared:]) for part in parts]


def whole_numbers(axis: Any, count: int, which: Literal["x", "y"] = "x") -> None:
    """Puts marks at whole numbers alone.

    Args:
        axis: Matplotlib axes, one of whose directions counts something.
        count: How many there are.
        which: The direction.
    """
    from matplotlib.ticker import MaxNLocator

    locator = MaxNLocator(nbins=min(count, 12), integer=True)
    (axis.xaxis if which == "x" else axis.yaxis).set_major_locator(locator)
