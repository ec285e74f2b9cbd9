"""Figures as a reader takes them in."""

from __future__ import annotations

import math

from ..train.metrics import METRICS

__all__ = ["change", "count", "duration", "mib", "named", "percent", "shown", "significant"]

_SHARES = ("agreement",)


def _fraction(metric: str) -> bool:
    return metric in _SHARES or (metric in METRICS and METRICS[metric].fraction)


def shown(metric: str, value: float | None) -> str:
    """Returns a metric's value: fractions in per cent, the rest as it is, a dash for none.

    Args:
        metric: Its name.
        value: Its value.
    """
    if value is None:
        return "-"
    return percent(value) if _fraction(metric) else significant(value)


def change(metric: str, value: float) -> str:
    """Returns a difference of a metric with its sign: points for fractions.

    Args:
        metric: Its name.
        value: The difference.
    """
    if _fraction(metric):
        return f"{100 * value:+.1f} points"
    return f"{'+' if value >= 0 else '-'}{significant(abs(value))}"


def percent(value: float, digits: int = 1) -> str:
    """Returns a fraction in per cent.

    Args:
        value: The fraction.
        digits: Behind the point.
    """
    return f"{100 * value:.{digits}f} %"


def significant(value: float, digits: int = 3) -> str:
    """Returns a number with so many digits that count, without an exponent where it is of use.

    Args:
        value: The number.
        digits: How many count.
    """
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    size = math.floor(math.log10(abs(value)))
    if -4 <= size < 7:
        return f"{value:,.{max(0, digits - 1 - size)}f}"
    return f"{value:.{digits - 1}e}"


def count(number: int, one: str, many: str | None = None) -> str:
    """Returns a number with its noun.

    Args:
        number: The number.
        one: The noun for one.
        many: For several; by default with an s.
    """
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def mib(size: int) -> str:
    """Returns bytes in MiB.

    Args:
        size: The bytes.
    """
    return f"{significant(size / 2**20)} MiB"


def duration(seconds: float) -> str:
    """Returns seconds as hours, minutes and seconds.

    Args:
        seconds: How many.
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def named(name: str) -> str:
    """Returns a name from the code as words.

    Args:
        name: Such as ``"macro_f1"``.
    """
    return name.replace("_", " ").replace("f1", "F1")
