"""The average of the weights over the end of a training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import tutelage
from helpers import differing, trainer_for, weights_of
from tutelage.errors import CheckpointError, RecipeError
from tutelage.intervention import Schedule
from tutelage.train._average import averaged_steps

_EVERY_STEP = {"save_strategy": "steps", "save_steps": 1}


class _Weights(TrainerCallback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        found = kwargs["model"].named_parameters()
        self.seen.append({name: p.detach().double().clone() for name, p in found})


def _seen(folder: Path, **settings: Any) -> list[dict[str, Tensor]]:
    weights = _Weights()
    trainer_for(folder, callbacks=[weights], **settings).train()
    return weights.seen


@pytest.mark.parametrize("optimizer", ["adamw", "bert_adam", "sgd"])
@pytest.mark.parametrize(("average", "steps"), [(0.4, 4), (1.0, 9)])
def test_a_training_ends_at_the_mean_of_its_last_weights(
    tmp_path: Path, average: float, steps: int, optimizer: str
) -> None:
    chosen = {"optim": "sgd"} if optimizer == "sgd" else {"qat_optimizer": optimizer}
    settings: dict[str, Any] = {"schedule": Schedule.none(), **chosen}
    plain = _seen(tmp_path, **settings)
    averaged = _seen(tmp_path, average=average, **settings)
    for before, after in zip(plain[:-1], averaged[:-1], strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    moved = 0
    for name, found in averaged[-1].items():
        total = torch.zeros_like(found)
        for step in plain[-steps:]:
            total += step[name]
        torch.testing.assert_close(found, total / steps, rtol=1e-5, atol=1e-7)
        moved += not torch.equal(found, plain[-1][name])
    assert moved


def test_steps_with_intervention_are_left_out(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schedule": Schedule.gradual(6)}
    plain = _seen(tmp_path, **settings)
    averaged = _seen(tmp_path, average=1.0, **settings)
    for name, found in averaged[-1].items():
        mean = (plain[6][name] + plain[7][name] + plain[8][name]) / 3
        torch.testing.assert_close(found, mean, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("average", "length", "first", "expected"),
    [(0.0, 100, 0, 0), (0.1, 100, 0, 10), (0.5, 9, 0, 4), (1.0, 9, 7, 2), (1.0, 9, 9, 0)],
)
def test_averaged_steps(average: float, length: int, first: int, expected: int) -> None:
    assert averaged_steps(average, length, first) == expected


@pytest.mark.parametrize("average", [0.0, 0.1])
def test_one_step_is_its_own_mean(tmp_path: Path, average: float) -> None:
    trainer = trainer_for(tmp_path, average=average)
    trainer.train()
    states = trainer.optimizer.state_dict()["state"].values()
    assert not any("tutelage_average" in state for state in states)


def test_a_resumed_average_equals_that_of_training_through(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "schedule": Schedule.gradual(3),
        "average": 0.6,
        "ramp": 0.5,
        **_EVERY_STEP,
    }
    whole = trainer_for(tmp_path, **settings)
    whole.train()
    expected = weights_of(whole.model)
    for step in (2, 4, 6, 8):
        torch.manual_seed(step)
        resumed = trainer_for(tmp_path / "other", **{**settings, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert differing(weights_of(resumed.model), expected) == [], f"resumed at {step}"


def test_a_run_with_another_average_is_refused(tmp_path: Path) -> None:
    trainer_for(tmp_path, schedule=Schedule.none(), **_EVERY_STEP, max_steps=2).train()
    other = trainer_for(tmp_path, schedule=Schedule.none(), average=0.5, max_steps=2)
    with pytest.raises(CheckpointError, match=r"average = 0\.0, now it is 0\.5"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


@pytest.mark.parametrize("average", [-0.1, 1.5])
def test_what_is_no_part_of_a_training_is_refused(tmp_path: Path, average: float) -> None:
    with pytest.raises(RecipeError, match=r"average is .*, a part of the training; use 0 to 1"):
        tutelage.QATArguments(output_dir=str(tmp_path), average=average)
