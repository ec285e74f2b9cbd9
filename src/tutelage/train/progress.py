"""How far training is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

__all__ = ["Progress"]


class Progress(TrainerCallback):
    """Shows steps, rate, remaining time, the last logged loss and the name of the phase.

    Use it with ``attach``, which removes the callbacks of transformers that print, and ``close`` it
    at the end, also after an error.

    Examples:
        >>> shown = Progress("student")
        >>> shown.attach(trainer)  # doctest: +SKIP
    """

    def __init__(self, phase: str, console: Console | None = None, every: int = 25) -> None:
        """Sets up the display; it appears when training begins.

        Args:
            phase: Name of what is trained.
            console: Where to show it; standard output by default.
            every: Steps between two lines where the console is no terminal.
        """
        self.phase = phase
        self.every = every
        self._console = console if console is not None else Console()
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._loss = ""
        self._stage = ""
        self._start, self._first = 0.0, 0

    def attach(self, trainer: Trainer) -> None:
        """Adds the display to a trainer in place of those of transformers.

        Args:
            trainer: The trainer.
        """
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(self)

    def close(self) -> None:
        """Takes the bar from the terminal's control; idempotent."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows the bar."""
        self._start, self._first = time.monotonic(), state.global_step
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                TextColumn("{task.fields[loss]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(
                self.phase, total=state.max_steps, completed=state.global_step, loss="", rate=""
            )

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Keeps the loss that was logged."""
        if logs and "loss" in logs:
            self._loss = f"loss {float(logs['loss']):.4f}"
            self._stage = "teacher intervenes" if logs.get("intervention") else ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves on by one step."""
        step, total = state.global_step, state.max_steps
        rate = (step - self._first) / max(time.monotonic() - self._start, 1e-9)
        shown = ", ".join(part for part in (self._loss, self._stage) if part)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=shown, rate=f"{rate:.2f} steps/s")
        elif step % self.every == 0 or step == total:
            text = f"{self.phase}: step {step} of {total}, {rate:.2f} steps/s"
            left = f"{_clock((total - step) / rate)} left"
            self._console.print(", ".join(p for p in (text, left, shown) if p), highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops the bar."""
        self.close()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
