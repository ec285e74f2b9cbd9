"""The trainer with its steps recorded: the same run, and a reason where that cannot be."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from helpers import Again, differing, enable_checkpointing, trainer_for, weights_of
from tutelage.errors import DataError, NonFiniteLossError, RecipeError

SETTINGS = {"logging_strategy": "steps", "logging_steps": 1, "save_strategy": "steps"}


class Tensors(tutelage.QATTrainer):
    """Trains without graphs, with the learning rates as tensors, as a graph reads them."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        made = super().create_optimizer(model)
        rates: list[float] = []

        def before(optimizer: Any, *_: Any) -> None:
            rates[:] = [group["lr"] for group in optimizer.param_groups]
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = torch.tensor(rate)

        def after(optimizer: Any, *_: Any) -> None:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

        made.register_step_pre_hook(before)
        made.register_step_post_hook(after)
        return made


def trainer(folder: Path, graphed: bool, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Any:
    if not graphed:
        monkeypatch.setattr(tutelage, "QATTrainer", Tensors)
    schedule = settings.pop("schedule", tutelage.Schedule.gradual(6))
    made = trainer_for(folder, schedule=schedule, **{**SETTINGS, **settings})
    monkeypatch.undo()
    if graphed:
        made._graphs.recorder = Again()
    return made


def logged(trainer: Any) -> list[dict[str, float]]:
    return [
        {key: value for key, value in entry.items() if "runtime" not in key and "_per_" not in key}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bf16": True},
        {"qat_optimizer": "bert_adam"},
        {"max_grad_norm": 0.0},
        {"ramp": 0.75, "rate_by_magnitude": True},
    ],
    ids=["adamw", "bf16", "bert_adam", "unclipped", "ramp"],
)
def test_the_run_is_the_same(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [trainer(tmp_path / str(on), on, monkeypatch, **settings) for on in (False, True)]
    for run in runs:
        torch.manual_seed(4)
        run.train()
    plain, graphed = runs
    assert graphed._graphs.recorder.recorded >= 4  # a graph for every stage
    assert differing(weights_of(plain.model), weights_of(graphed.model)) == []
    unclipped = {"grad_norm"} if settings.keys() & {"max_grad_norm", "qat_optimizer"} else set()
    for one, other in zip(logged(plain), logged(graphed), strict=True):
        assert one.keys() - unclipped == other.keys()
        for key in other:
            assert one[key] == pytest.approx(other[key], rel=1e-6), key
    rates = [group["lr"] for group in graphed.optimizer.param_groups]
    assert not any(isinstance(rate, torch.Tensor) for rate in rates)


def test_resuming_equals_training_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trainer(tmp_path / "a", True, monkeypatch, save_steps=4)
    whole.train()
    again = trainer(tmp_path / "a", True, monkeypatch, save_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert again._graphs.recorder.recorded
    assert differing(weights_of(whole.model), weights_of(again.model)) == []


def test_a_second_training_records_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, True, monkeypatch, save_strategy="no")
    run.train()
    first, before = run._graphs._step, weights_of(run.model)
    run.train()
    assert run._graphs._step is not first
    assert differing(before, weights_of(run.model))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"gradient_accumulation_steps": 2}, "micro-batches"),
        ({"optim": "sgd"}, "SGD cannot be captured"),
    ],
    ids=["accumulation", "optimizer"],
)
def test_what_cannot_be_recorded_is_refused_or_told(
    tmp_path: Path, settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 2, "schedule": None, **settings}
    run = trainer(tmp_path, True, monkeypatch, **settings)
    with pytest.warns(RuntimeWarning, match=reason):
        run.train()
    assert run.state.global_step == 2
    assert not run._graphs.recorder.recorded
    run = trainer(tmp_path, True, monkeypatch, **settings)
    run._graphs._wanted = True
    with pytest.raises(RecipeError, match=reason):
        run.train()
    assert run.state.global_step == 0


def test_recomputed_activations_are_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer(tmp_path, True, monkeypatch, max_steps=2, schedule=None)
    enable_checkpointing(run.distiller.student, {"use_reentrant": False})
    with pytest.warns(RuntimeWarning, match="gradient checkpointing"):
        run.train()
    assert not run._graphs.recorder.recorded


def test_a_cpu_says_nothing_unless_asked(tmp_path: Path) -> None:
    made = trainer_for(tmp_path, max_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.train()
    asked = tutelage.QATTrainer(
        made.distiller.student,
        made.distiller.teacher,
        args=made.args,
        graph=True,
        train_dataset=made.train_dataset,
    )
    with pytest.raises(RecipeError, match="no CUDA device; leave graph out"):
        asked.train()


def test_shapes_beyond_the_limit_run_without_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def limited(insist: bool) -> Any:
        run = trainer(tmp_path, True, monkeypatch, save_strategy="no")
        run._graphs._wanted = insist or None
        ready = run._graphs._ready

        def few() -> Any:
            step = ready()
            step.max_graphs = 2
            return step

        run._graphs._ready = few
        torch.manual_seed(4)
        return run

    run = limited(insist=False)
    with pytest.warns(RuntimeWarning, match=r"some steps run without a graph.*more than 2 shapes"):
        run.train()
    assert run._graphs.recorder.recorded == 2
    plain = trainer(tmp_path, False, monkeypatch, save_strategy="no")
    torch.manual_seed(4)
    plain.train()
    for one, other in zip(logged(plain)[:-1], logged(run)[:-1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)
    with pytest.raises(DataError, match="more than 2 shapes"):
        limited(insist=True).train()


def test_a_recording_that_fails_is_told_and_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Again):
        def record(self, function: Callable[[], None]) -> Callable[[], None]:
            raise RuntimeError("operation not permitted when stream is capturing")

    run = trainer(tmp_path, True, monkeypatch, save_strategy="no")
    run._graphs.recorder = Broken()
    torch.manual_seed(4)
    with pytest.warns(RuntimeWarning, match="recording a step failed: operation not permitted"):
        run.train()
    plain = trainer(tmp_path, False, monkeypatch, save_strategy="no")
    torch.manual_seed(4)
    plain.train()
    assert logged(run)[0]["loss"] == logged(plain)[0]["loss"]
    insisting = trainer(tmp_path, True, monkeypatch, save_strategy="no")
    insisting._graphs.recorder, insisting._graphs._wanted = Broken(), True
    with pytest.raises(RuntimeError, match="operation not permitted"):
        insisting.train()


def test_nan_stops_a_recorded_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, True, monkeypatch, save_strategy="no")
    with torch.no_grad():
        next(run.distiller.teacher.model.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteLossError):
        run.train()
