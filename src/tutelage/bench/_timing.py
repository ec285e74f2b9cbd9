"""Paired timing: in every round each engine has its turn, so that a busy machine hits all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Ratio", "paired_rounds", "ratio", "timed"]

_ENOUGH = 0.05
"""Seconds of calls after which a turn ends."""

_CALLS = 25
_SETTLE = 0.01
"""Seconds of calls, not counted, with which a turn begins."""


def timed(call: Callable[[], object]) -> float:
    """Returns the median seconds of some calls, after others that do not count.

    Args:
        call: What is timed.
    """
    begun = time.perf_counter()
    call()
    while time.perf_counter() - begun < _SETTLE:
        call()
    taken: list[float] = []
    while not taken or (sum(taken) < _ENOUGH and len(taken) < _CALLS):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def paired_rounds(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    pause: float,
    measure: Callable[[Callable[[], object]], float] = timed,
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Times calls in turns; the order moves by one from round to round.

    Args:
        calls: What is timed, by name.
        rounds: How often each has its turn.
        pause: Seconds before a turn, in which threads of the one before stop spinning.
        measure: From a call to its seconds.

    Returns:
        Seconds of every round by name, and the exceptions of those that failed.
    """
    left, failed = list(calls), dict[str, Exception]()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        shift = turn % max(len(left), 1)
        for name in left[shift:] + left[:shift]:
            time.sleep(pause)
            try:
                times[name].append(measure(calls[name]))
            except Exception as error:  # one engine's failure is a row, not the end
                failed[name] = error
        left = [name for name in left if name not in failed]
    return {name: times[name] for name in left}, failed


@dataclass(frozen=True)
class Ratio:
    """How many times faster, over rounds.

    Attributes:
        median: Half of the rounds are above.
        low: A quarter of the rounds are below.
        high: A quarter of the rounds are above.
    """

    median: float
    low: float
    high: float


def ratio(base: Sequence[float], own: Sequence[float]) -> Ratio:
    """Returns how many times faster ``own`` is than ``base``, from the ratios of each round.

    Args:
        base: Seconds of every round.
        own: Likewise, of the same rounds.
    """
    each = [b / o for b, o in zip(base, own, strict=True)]
    if len(each) == 1:
        return Ratio(each[0], each[0], each[0])
    low, median, high = statistics.quantiles(each, n=4, method="inclusive")
    return Ratio(median, low, high)
