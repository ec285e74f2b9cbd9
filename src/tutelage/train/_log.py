"""What a training said as it went: ``training.json``, beside the model that came of it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import TrainerCallback

from ..artefacts import write_text
from ..errors import ArtefactError
from ..intervention import Schedule

__all__ = [
    "TRAINING_FILE",
    "Evaluated",
    "LogPoints",
    "Logged",
    "TrainingLog",
    "log_every",
    "read_training_log",
    "training_log",
    "write_training_log",
]

TRAINING_FILE = "training.json"

_MOST_STEPS = 10
_POINTS = 40


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Logged(_Record):
    """Means over the steps since the entry before.

    Attributes:
        step: Steps done.
        since: Steps done at the entry before; 0 at the first one.
        stages: Steps in between by stage of the intervention; empty for a teacher.
        learning_rate: Of the step that follows, ``None`` where it is not known.
        loss: Mean of the weighted sum of the terms.
        terms: Unweighted mean of every term, by name; empty for a teacher.
    """

    step: int
    since: int
    stages: dict[str, int]
    learning_rate: float | None
    loss: float
    terms: dict[str, float]


class Evaluated(_Record):
    """Figures on the evaluation data while training went on, with no intervention.

    Attributes:
        step: Steps done.
        loss: The task's own loss, ``None`` for data without labels.
        metrics: Every metric that fits, by name.
    """

    step: int
    loss: float | None
    metrics: dict[str, float]


class TrainingLog(_Record):
    """The course of one training, from its first step, however often it was resumed.

    Attributes:
        steps: Length of the training.
        schedule: Kind of the intervention's schedule; ``"none"`` for a teacher.
        schedule_steps: Steps under intervention.
        logged: Training figures, in order of their steps.
        evaluated: Evaluations, likewise.
    """

    steps: int
    schedule: str
    schedule_steps: int
    logged: tuple[Logged, ...]
    evaluated: tuple[Evaluated, ...]


class LogPoints(TrainerCallback):
    """Asks for an entry where a stage ends, where a checkpoint is due and at the last step.

    So none spans two stages, and the sums that a checkpoint does not hold are empty when it is
    written: the log of a resumed run is that of an uninterrupted one. It is to be told of a step
    after what asks for other checkpoints than those of ``save_steps``.

    Args:
        schedule: When the teacher intervenes; one that draws its stages is not followed.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks for an entry."""
        step, stage = state.global_step, self._schedule
        drawn = stage.kind == "stochastic" and step < stage.steps
        ends = step == state.max_steps or (not drawn and stage(step) != stage(step - 1))
        if ends or control.should_save or _saves(args, state):
            control.should_log = True


def _saves(args: Any, state: Any) -> bool:
    """Returns whether a checkpoint follows the step, even if nothing has asked for it yet."""
    every = state.save_steps
    return bool(args.save_strategy == "steps" and every > 0 and state.global_step % every == 0)


def log_every(steps: int) -> int:
    """Returns the steps between two entries: about forty entries, at most ten steps apart.

    Args:
        steps: Length of the training.
    """
    return max(1, min(_MOST_STEPS, steps // _POINTS))


def training_log(
    history: Iterable[Mapping[str, Any]], schedule: Schedule, steps: int
) -> TrainingLog:
    """Makes a log of what a trainer kept.

    Args:
        history: ``trainer.state.log_history``; a resumed trainer has it from its checkpoint.
        schedule: When the teacher intervened.
        steps: Length of the training.
    """
    logged: list[Logged] = []
    evaluated: list[Evaluated] = []
    for entry in history:
        step = int(entry["step"])
        if "loss" in entry:
            since = logged[-1].step if logged else 0
            logged.append(_logged(entry, schedule, since, step))
        elif "eval_loss" in entry or "eval_runtime" in entry:
            evaluated.append(_evaluated(entry, step))
    return TrainingLog(
        steps=steps,
        schedule=schedule.kind,
        schedule_steps=schedule.steps,
        logged=tuple(logged),
        evaluated=tuple(evaluated),
    )


def _logged(entry: Mapping[str, Any], schedule: Schedule, since: int, step: int) -> Logged:
    rate = entry.get("learning_rate")
    return Logged(
        step=step,
        since=since,
        stages=dict(Counter(schedule(s) for s in range(since, step))),
        learning_rate=None if rate is None else float(rate),
        loss=float(entry["loss"]),
        terms={
            key.removeprefix("loss_"): float(value)
            for key, value in entry.items()
            if key.startswith("loss_")
        },
    )


_COST = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def _evaluated(entry: Mapping[str, Any], step: int) -> Evaluated:
    found = {
        key.removeprefix("eval_"): float(value)
        for key, value in entry.items()
        if key.startswith("eval_") and math.isfinite(float(value))
    }
    loss = found.pop("loss", None)
    metrics = {name: value for name, value in found.items() if name not in _COST}
    return Evaluated(step=step, loss=loss, metrics=metrics)


def write_training_log(log: TrainingLog, folder: Path) -> None:
    """Writes ``training.json`` whole or not at all.

    Args:
        log: The log.
        folder: Where to.

    Raises:
        ArtefactError: Writing failed.
    """
    write_text(folder / TRAINING_FILE, log.model_dump_json(indent=1) + "\n")


def read_training_log(folder: Path) -> TrainingLog | None:
    """Reads the log of a training.

    Args:
        folder: Where ``training.json`` is.

    Returns:
        The log; ``None`` where the folder holds none, as those of earlier versions.

    Raises:
        ArtefactError: The file is damaged.
    """
    file = folder / TRAINING_FILE
    if not file.is_file():
        return None
    try:
        return TrainingLog.model_validate_json(file.read_bytes())
    except (ValidationError, OSError) as error:
        raise ArtefactError(
            f"{file} is damaged ({str(error).splitlines()[0]}); remove it, and the training is "
            "shown without curves."
        ) from None
