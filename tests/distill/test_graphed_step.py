"""A recorded step does what the step does; the plumbing is tried without a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tutelage
from helpers import Again, make_batch, tiny
from tutelage.distill import SAMPLE_IDS, CudaRecorder
from tutelage.distill._capturable import make_capturable
from tutelage.errors import DataError, RecipeError, UnsupportedModelError
from tutelage.intervention import stages
from tutelage.train._optim import BertAdam, reset_state

STEPS = 100


def make_student(teacher: nn.Module) -> nn.Module:
    student = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset("ternary-a8"))
    return student.requires_grad_(True).train()


def adamw(student: nn.Module, rate: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(student.parameters(), lr=torch.tensor(rate), foreach=False)


def run(
    teacher: Any, start: nn.Module, make: Any, graphed: bool, steps: int = STEPS
) -> tuple[Tensor, nn.Module, torch.optim.Optimizer, Any]:
    student = copy.deepcopy(start)
    optimizer = make(student)
    step: Any = tutelage.TrainStep(tutelage.Distiller(student, teacher), optimizer)
    if graphed:
        step = tutelage.GraphedTrainStep(step, recorder=Again())
    first = steps * 2 // 3
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 / (1 + i))
    schedule, lost = tutelage.Schedule.gradual(first), []
    for index in range(steps):
        if index == first:
            reset_state(optimizer)
        batch = make_batch(3, 5 + index % 2, seed=index % 5)
        batch[SAMPLE_IDS] = torch.arange(3) + 3 * (index % 10)
        progress = torch.tensor(index / steps)
        lost.append(step(batch, schedule(index), progress=progress)["loss"])
        rates.step()
    return torch.stack(lost), student, optimizer, step


@pytest.mark.parametrize("make", [adamw, lambda s: BertAdam(s.parameters(), torch.tensor(1e-3))])
def test_losses_and_weights_are_those_of_the_plain_step(make: Any) -> None:
    teacher = tiny("bert")
    start = make_student(teacher)
    torch.manual_seed(3)
    plain = run(teacher, start, make, graphed=False)
    torch.manual_seed(3)
    graphed = run(teacher, start, make, graphed=True)
    assert torch.equal(plain[0], graphed[0])
    for one, other in zip(plain[1].parameters(), graphed[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert len(graphed[3]) == 8  # four stages, two lengths


def test_a_stage_leaves_alone_what_has_no_gradient() -> None:
    teacher = tiny("bert")
    student = make_student(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.5)
    losses = tutelage.losses.default(local="code")
    step = tutelage.TrainStep(tutelage.Distiller(student, teacher, losses), optimizer)
    graphed = tutelage.GraphedTrainStep(step, recorder=Again())
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    graphed(make_batch(3, 6), "attention_output")
    moved = {n for n, p in student.named_parameters() if not torch.equal(p, before[n])}
    assert not [n for n in moved if ".value." in n or "attention.output.dense" in n]
    assert [n for n in moved if ".query." in n]


def test_recording_leaves_no_trace() -> None:
    teacher = tiny("bert")
    student = make_student(teacher)
    optimizer = adamw(student)

    class Stop(Again):
        def record(self, function: Callable[[], None]) -> Callable[[], None]:
            return lambda: None

    step = tutelage.TrainStep(tutelage.Distiller(student, teacher), optimizer)
    step(make_batch(3, 6), "none")
    before = copy.deepcopy((student.state_dict(), optimizer.state_dict()))
    torch.manual_seed(9)
    drawn = torch.rand(3)
    torch.manual_seed(9)
    tutelage.GraphedTrainStep(step, recorder=Stop())(make_batch(3, 5), "attention_map")
    assert torch.equal(torch.rand(3), drawn)
    after = student.state_dict(), optimizer.state_dict()
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    for index, state in before[1]["state"].items():
        for name, value in state.items():
            assert torch.equal(after[1]["state"][index][name], value)
    assert all(p.grad is None for p in student.parameters())


def test_a_stored_teacher_answers_outside_the_graph(tmp_path: Path) -> None:
    teacher = tiny("bert")
    start = make_student(teacher)
    batches = []
    for index in range(10):
        batch = make_batch(3, 5 + index % 2, seed=index % 5)
        batches.append({**batch, SAMPLE_IDS: torch.arange(3) + 3 * index})
    cached = tutelage.CachedTeacher.build(
        tmp_path / "c", tutelage.Distiller(start, teacher), batches, stages=stages()
    )
    torch.manual_seed(4)
    live = run(teacher, start, adamw, graphed=False, steps=20)
    torch.manual_seed(4)
    stored = run(cached, start, adamw, graphed=True, steps=20)
    assert torch.equal(live[0], stored[0])


def test_a_rate_set_by_hand_is_followed() -> None:
    teacher = tiny("bert")
    student = make_student(teacher)
    optimizer = adamw(student)
    step = tutelage.TrainStep(tutelage.Distiller(student, teacher), optimizer)
    graphed = tutelage.GraphedTrainStep(step, recorder=Again())
    graphed(make_batch(3, 6))
    held = optimizer.param_groups[0]["lr"]
    for rate in (0.0, torch.tensor(0.0)):
        optimizer.param_groups[0]["lr"] = rate
        before = [p.detach().clone() for p in student.parameters()]
        graphed(make_batch(3, 6))
        assert optimizer.param_groups[0]["lr"] is held
        assert held == 0
        assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_what_cannot_be_captured_is_refused() -> None:
    teacher = tiny("bert")
    student = make_student(teacher)
    distiller = tutelage.Distiller(student, teacher)
    sgd = torch.optim.Rprop(student.parameters())
    with pytest.raises(RecipeError, match=r"Rprop cannot be captured.*AdamW"):
        tutelage.GraphedTrainStep(tutelage.TrainStep(distiller, sgd), recorder=Again())
    with pytest.raises(ValueError, match="no optimizer"):
        tutelage.GraphedTrainStep(tutelage.TrainStep(distiller, None), recorder=Again())
    step = tutelage.TrainStep(distiller, adamw(student))
    graphed = tutelage.GraphedTrainStep(step, recorder=Again(), max_graphs=1)
    with pytest.raises(DataError, match="'length' is no tensor"):
        graphed({**make_batch(3, 6), "length": 6})
    graphed(make_batch(3, 6))
    with pytest.raises(DataError, match="more than 1 shapes"):
        graphed(make_batch(3, 5))
    graphed.forget()
    graphed(make_batch(3, 5))
    assert len(graphed) == 1
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedModelError, match="need a CUDA device"):
            CudaRecorder()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_equal_eager_on_a_gpu() -> None:
    teacher = tiny("bert").cuda()
    start = make_student(teacher).eval()
    found = []
    for graphed in (False, True):
        student = copy.deepcopy(start)
        optimizer = torch.optim.AdamW(
            student.parameters(), lr=torch.tensor(1e-3, device="cuda"), capturable=True
        )
        step: Any = tutelage.TrainStep(tutelage.Distiller(student, teacher), optimizer)
        if graphed:
            step = tutelage.GraphedTrainStep(step)
        schedule = tutelage.Schedule.gradual(60)
        lost = []
        for index in range(STEPS):
            batch = {k: v.cuda() for k, v in make_batch(3, 6, seed=index % 5).items()}
            lost.append(step(batch, schedule(index))["loss"])
        found.append(torch.stack(lost))
    assert torch.equal(found[0], found[1])


def test_a_group_without_parameters_is_set_as_the_others_are() -> None:
    weight = torch.nn.Parameter(torch.ones(2, device="meta"))
    optimizer = torch.optim.AdamW([{"params": [weight]}], lr=0.1)
    optimizer.param_groups.insert(0, {**optimizer.param_groups[0], "params": []})
    rates = make_capturable(optimizer)
    assert [rate.device.type for rate in rates] == ["meta", "meta"]
