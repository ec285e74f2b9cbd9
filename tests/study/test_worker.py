"""A study's run that is watched, and evaluated while the teacher steps in."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from helpers import save_tiny, write_rows
from tutelage.distill import Distiller
from tutelage.study._evaluation import AssistedCurve, Curve
from tutelage.study._grid import cells
from tutelage.study._load import study_from_dict
from tutelage.study._worker import run_cell, task_of, train_cell
from tutelage.train._plan import make_schedule


def test_a_watched_run_is_the_run_and_assisted_figures_come_from_the_stage(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    data = {
        "train": str(write_rows(tmp_path / "train.tsv")),
        "eval": str(write_rows(tmp_path / "dev.tsv", rows=20, seed=1)),
        "max_length": 16,
    }
    study = study_from_dict(
        {
            "tasks": {
                "toy": {
                    "model": {"name_or_path": str(tmp_path / "model")},
                    "data": data,
                    "teacher": {"max_steps": 6, "learning_rate": 1e-3, "batch_size": 8},
                    "student": {"batch_size": 8},
                }
            },
            "schemes": ["binary-a8"],
            "methods": {"on": {"base": "ti-o", "schedule": {"steps": 4}}},
            "budgets": [4],
            "seeds": [0],
            "baseline": "on",
            "points": 2,
            "output": str(tmp_path / "study"),
        }
    )
    (cell,) = cells(study)
    task = task_of(cell)
    schedule = make_schedule(cell.recipe)
    plain = Curve(task.evaluator, (2, 4))
    assisted = AssistedCurve(task.evaluator, (2, 4), task.teacher, schedule)
    student = train_cell(cell, [plain, assisted])
    assert run_cell(cell)[0].points == tuple(plain.points)
    assert [point.step for point in assisted.points] == [2, 4]
    assert not student.training
    distiller = Distiller(student, task.teacher)
    total, count = 0.0, 0
    for batch in task.evaluator._batches:
        with torch.no_grad():
            step = distiller.step(batch.inputs, "attention_output")
        for own, other in zip(step.student_logits, step.teacher_logits, strict=True):
            p, q = (x.double().softmax(0).tolist() for x in (other, own))
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            count += 1
    assert assisted.points[-1].kl == pytest.approx(total / count, rel=1e-4)
    assert assisted.points[-1].kl != plain.points[-1].kl
