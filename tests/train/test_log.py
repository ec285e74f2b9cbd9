"""The log that a training leaves beside its result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from helpers import tiny_run
from tutelage.errors import ArtefactError
from tutelage.intervention import Schedule
from tutelage.train import _phases
from tutelage.train._log import (
    LogPoints,
    log_every,
    read_training_log,
    training_log,
    write_training_log,
)
from tutelage.train.recipe import recipe_from_dict
from tutelage.train.run import run_recipe


def entry(step: int, **more: float) -> dict[str, Any]:
    return {"step": step, "epoch": 0.1, "loss": 2.0 / step, "learning_rate": 1e-3, **more}


def test_an_interval_knows_its_steps_by_stage() -> None:
    schedule = Schedule.gradual(6)  # output: step 0, context: 1, map: 2 to 5
    log = training_log([entry(2), entry(4), entry(8)], schedule, 8)
    assert [(e.since, e.step) for e in log.logged] == [(0, 2), (2, 4), (4, 8)]
    assert log.logged[0].stages == {"attention_output": 1, "context": 1}
    assert log.logged[1].stages == {"attention_map": 2}
    assert log.logged[2].stages == {"attention_map": 2, "none": 2}
    assert (log.steps, log.schedule, log.schedule_steps) == (8, "gradual", 6)


def test_terms_and_evaluations_are_told_from_the_rest() -> None:
    history = [
        entry(1, loss_logits=0.5, loss_hidden_states=1.0, grad_norm=3.0, intervention=1.0),
        {"step": 1, "eval_loss": 0.7, "eval_accuracy": 0.25, "eval_runtime": 1.5},
        {"step": 2, "eval_accuracy": 0.5, "eval_runtime": 1.5, "eval_nan": float("nan")},
        {"step": 2, "train_loss": 1.0, "train_runtime": 2.0},
    ]
    log = training_log(history, Schedule.none(), 2)
    assert log.logged[0].terms == {"logits": 0.5, "hidden_states": 1.0}
    assert [(e.step, e.loss, e.metrics) for e in log.evaluated] == [
        (1, 0.7, {"accuracy": 0.25}),
        (2, None, {"accuracy": 0.5}),
    ]


@pytest.mark.parametrize(
    ("steps", "every"), [(-1, 1), (1, 1), (40, 1), (100, 2), (400, 10), (9000, 10)]
)
def test_about_forty_entries(steps: int, every: int) -> None:
    assert log_every(steps) == every


class State:
    def __init__(self, step: int) -> None:
        self.global_step, self.max_steps, self.save_steps = step, 9, 4


class Control:
    should_log = should_save = False


class Arguments:
    save_strategy = "no"


@pytest.mark.parametrize(
    ("schedule", "asked"),
    [
        (Schedule.gradual(6), {1, 2, 6, 9}),
        (Schedule.none(), {9}),
        (Schedule.stochastic(6), {6, 9}),
    ],
)
def test_entries_where_a_stage_ends(schedule: Schedule, asked: set[int]) -> None:
    found = set()
    for step in range(1, 10):
        control = Control()
        LogPoints(schedule).on_step_end(Arguments(), State(step), control)
        if control.should_log:
            found.add(step)
    assert found == asked


def test_entries_where_a_checkpoint_is_due_whoever_asks_for_it() -> None:
    points, arguments, control = LogPoints(Schedule.none()), Arguments(), Control()
    control.should_save = True
    points.on_step_end(arguments, State(3), control)
    assert control.should_log
    arguments.save_strategy = "steps"
    for step, due in ((3, False), (4, True), (8, True)):
        control = Control()
        points.on_step_end(arguments, State(step), control)
        assert control.should_log == due


class StopError(Exception):
    """Ends a training from outside."""


class Killing(TrainerCallback):
    def attach(self, trainer: Any) -> None:
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.max_steps == 13 and state.global_step == 7:
            raise StopError

    def close(self) -> None:
        """Has nothing to close."""


def test_a_run_resumed_between_two_entries_has_the_log_of_a_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_phases, "log_every", lambda steps: 4)
    values = tiny_run(
        tmp_path,
        eval_rows=9,
        teacher_steps=2,
        student={"max_steps": 13, "batch_size": 8, "save_steps": 6},
        schedule={"steps": 0},
    )
    whole, cut = (
        recipe_from_dict(values | {"output": str(tmp_path / name)}) for name in ("whole", "cut")
    )
    run_recipe(whole)
    with pytest.raises(StopError):
        run_recipe(cut, progress=lambda phase: Killing())
    said: list[str] = []
    run_recipe(cut, resume=True, report=said.append)
    assert any(line.endswith("checkpoint-6") for line in said)
    expected, found = (read_training_log(tmp_path / name) for name in ("whole", "cut"))
    assert expected is not None
    assert found == expected
    steps = [(e.since, e.step) for e in expected.logged]
    assert steps == [(0, 4), (4, 6), (6, 8), (8, 12), (12, 13)]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert read_training_log(tmp_path) is None
    log = training_log([entry(1, loss_logits=0.5)], Schedule.gradual(1), 1)
    write_training_log(log, tmp_path)
    assert read_training_log(tmp_path) == log
    assert [file.name for file in tmp_path.iterdir()] == ["training.json"]
    (tmp_path / "training.json").write_text('{"steps": 3}')
    with pytest.raises(ArtefactError, match=r"training\.json is damaged .*; remove it"):
        read_training_log(tmp_path)


def test_a_run_keeps_both_trainings(tmp_path: Path) -> None:
    values = tiny_run(
        tmp_path,
        eval_rows=9,
        teacher_steps=3,
        student={"max_steps": 7, "batch_size": 8, "eval_steps": 3},
        schedule={"steps": 3},
    )
    run_recipe(recipe_from_dict(values))
    teacher = read_training_log(tmp_path / "out" / "teacher")
    student = read_training_log(tmp_path / "out")
    assert teacher is not None
    assert student is not None
    assert [e.step for e in teacher.logged] == [1, 2, 3]
    assert teacher.logged[0].terms == {}
    assert [e.step for e in student.logged] == [1, 2, 3, 4, 5, 6, 7]
    assert [e.stages for e in student.logged][:4] == [
        {"attention_output": 1},
        {"attention_map": 1},
        {"attention_map": 1},
        {"none": 1},
    ]
    assert "attention_output" in student.logged[-1].terms
    assert [e.step for e in student.evaluated] == [3, 6, 7]
    assert set(student.evaluated[0].metrics) == {"accuracy", "macro_f1", "matthews"}
    assert json.loads((tmp_path / "out/training.json").read_text())["schedule_steps"] == 3
