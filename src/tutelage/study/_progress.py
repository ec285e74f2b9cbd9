"""How long a study will still take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from ._grid import Cell
from ._records import Record

__all__ = ["Estimate"]


class Estimate:
    """Tells the time left from the runs that are over.

    Attributes:
        start: When the first run began.
    """

    def __init__(self, cells: Sequence[Cell], workers: int) -> None:
        """Counts what is to be done.

        Args:
            cells: The runs to be made.
            workers: How many run at a time.
        """
        self.start = time.monotonic()
        self._all, self._workers = len(cells), workers
        self._left: dict[str, int] = defaultdict(int)
        for cell in cells:
            self._left[cell.task] += cell.steps + 1
        self._spent: dict[str, tuple[float, int]] = {}
        self._done = 0

    def line(self, cell: Cell, record: Record) -> str:
        """Returns a line about a run that is over.

        Args:
            cell: The run.
            record: Its figures.
        """
        self._done += 1
        self._left[cell.task] -= cell.steps + 1
        seconds, steps = self._spent.get(cell.task, (0.0, 0))
        self._spent[cell.task] = (seconds + record.seconds, steps + cell.steps + 1)
        rate = "" if cell.learning_rate is None else f" lr {cell.learning_rate:g}"
        what = f"{cell.task} {cell.scheme} {cell.method} {cell.steps} steps{rate} seed {cell.seed}"
        return f"[{self._done}/{self._all}] {what}: {_figures(record)}; {self._time_left()}"

    def _time_left(self) -> str:
        pace = {task: seconds / steps for task, (seconds, steps) in self._spent.items()}
        usual = sum(pace.values()) / len(pace)
        left = sum(steps * pace.get(task, usual) for task, steps in self._left.items())
        minutes = left / self._workers / 60
        return f"about {minutes:.0f} min left" if minutes >= 1 else "under a minute left"


def _figures(record: Record) -> str:
    if record.failed is not None:
        return f"failed ({record.failed})"
    last = record.points[-1]
    parts = [] if last.metric is None else [f"{record.metric} {last.metric:.4f}"]
    if last.kl is not None:
        parts.append(f"KL {last.kl:.4f}")
    return ", ".join(parts)
