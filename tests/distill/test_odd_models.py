"""Models whose own code is unusual: products changed in place, attention maps out of reach."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from families import make_inputs, make_model, output_of
from helpers import same_bits
from tutelage import QATArguments, QATTrainer, Schedule
from tutelage.distill import Distiller
from tutelage.errors import SiteError
from tutelage.intervention import stages


def _pair(name: str) -> tuple[Any, Any]:
    model = make_model(name)
    scheme = tutelage.Scheme.preset("ternary-a8").without_attention()
    return tutelage.prepare(copy.deepcopy(model), scheme), model


@pytest.mark.parametrize("stage", stages())
def test_a_product_may_be_changed_in_place(stage: str) -> None:
    # The first DeBERTa divides what its Linear returned in place.
    student, teacher = _pair("deberta")
    Distiller(student, teacher).step(make_inputs("deberta"), stage).loss.backward()
    gradients = [p.grad for name, p in student.named_parameters() if "in_proj.weight" in name]
    assert len(gradients) == 2
    assert all(found is not None and found.isfinite().all() for found in gradients)


def test_a_stage_out_of_reach_is_refused_before_the_first_step(tmp_path: Path) -> None:
    # Falcon's softmax has no Dropout that its map could be seen in.
    student, teacher = _pair("falcon")
    distiller = Distiller(student, teacher)
    for stage in ("none", "attention_output", "context"):
        distiller.check(stage)
    with pytest.raises(SiteError, match="use the stages 'attention_output' and 'context'"):
        distiller.check("attention_map")

    inputs = make_inputs("falcon")
    rows = [{key: value[row] for key, value in inputs.items()} for row in range(3)]

    def train(schedule: Schedule) -> QATTrainer:
        arguments = QATArguments(str(tmp_path), max_steps=4, report_to="none", disable_tqdm=True)
        trainer = QATTrainer(student, teacher, arguments, schedule=schedule, train_dataset=rows)
        trainer.train()
        return trainer

    before = copy.deepcopy(student.state_dict())
    with pytest.raises(SiteError, match="use the stages 'attention_output' and 'context'"):
        train(Schedule.gradual(3))
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
    assert train(Schedule.constant("context", 2)).state.global_step == 4


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule.none(), ()),
        (Schedule.gradual(0), ()),
        (Schedule.gradual(6), ("attention_output", "context", "attention_map")),
        (Schedule.stochastic(6), ("attention_output", "context", "attention_map")),
        (Schedule.constant("context", 6), ("context",)),
    ],
)
def test_a_schedule_names_its_stages(schedule: Schedule, expected: tuple[str, ...]) -> None:
    assert schedule.stages == expected
    assert {schedule(step) for step in range(6)} <= {*expected, "none"}


@pytest.mark.parametrize("name", ["deberta", "falcon"])
def test_they_load_to_the_same_bits(name: str, tmp_path: Path) -> None:
    student, _ = _pair(name)
    tutelage.save(student.eval(), tmp_path / "out")
    with torch.no_grad():
        found = output_of(tutelage.load(tmp_path / "out"), make_inputs(name))
        assert same_bits(found, output_of(student, make_inputs(name)))
