"""Learning rates in proportion to the magnitude of quantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from helpers import differing, pair, trainer_for, weights_of
from tutelage import QATArguments
from tutelage.errors import CheckpointError, RecipeError
from tutelage.intervention import Schedule
from tutelage.nn import QuantWeight
from tutelage.train._rates import TYPICAL, cap_rates, rate_factor, scale_rates


@pytest.mark.parametrize("factor", [1e-9, 0.05, 0.3, 1.0, 4.0, 500.0])
def test_the_factor_is_the_mean_magnitude_over_the_typical_one(factor: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(7, 9)
    weight *= factor * TYPICAL / weight.abs().mean()
    mean = sum(abs(float(w)) for w in weight.flatten().double()) / weight.numel()
    assert rate_factor(weight) == pytest.approx(min(max(mean / 0.04, 0.1), 10.0), rel=1e-6)


def test_a_weight_of_zeros_is_trained_all_the_same() -> None:
    assert rate_factor(torch.zeros(3, 4)) == 0.1


def test_every_quantized_weight_has_its_own_rate_and_nothing_else_changes() -> None:
    student, _ = pair("bert", "binary-a8")
    names = {id(p): n for n, p in student.named_parameters()}
    quantized = {id(m.weight) for m in student.modules() if isinstance(m, QuantWeight)}
    decayed = [p for p in student.parameters() if p.dim() > 1]
    plain = [p for p in student.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=0.5
    )
    scale_rates(optimizer, student)
    seen: dict[str, tuple[float, float]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            assert names[id(parameter)] not in seen
            seen[names[id(parameter)]] = (group["lr"], group["weight_decay"])
    assert seen.keys() == set(names.values())
    for name, parameter in student.named_parameters():
        rate = 0.5 * rate_factor(parameter) if id(parameter) in quantized else 0.5
        assert seen[name] == (pytest.approx(rate), 0.1 if parameter.dim() > 1 else 0.0), name


def test_the_first_update_is_in_proportion(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, max_steps=1, schedule=None, rate_by_magnitude=True)
    with torch.no_grad():
        for module in trainer.model.modules():
            if isinstance(module, nn.Linear) and isinstance(module, QuantWeight):
                module.weight.mul_(3.0)
    before = weights_of(trainer.model)
    trainer.args.weight_decay = 0.0
    trainer.args.warmup_steps = 0
    trainer.train()
    after = weights_of(trainer.model)
    checked = 0
    for name, module in trainer.model.named_modules():
        if isinstance(module, nn.Linear) and isinstance(module, QuantWeight):
            key = f"{name}.weight"
            moved = (after[key] - before[key]).abs()
            # Adam's first step has the length of the rate, but where a gradient is nil.
            want = trainer.args.learning_rate * rate_factor(before[key])
            assert moved.max() == pytest.approx(want, rel=1e-3)
            checked += 1
    assert checked


def test_resuming_keeps_the_rates_of_the_start(tmp_path: Path) -> None:
    settings = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2}
    straight = trainer_for(tmp_path / "a", rate_by_magnitude=True, learning_rate=0.01, **settings)
    straight.train()
    for step in (2, 4):
        checkpoint = tmp_path / "a" / f"checkpoint-{step}"
        resumed = trainer_for(
            tmp_path / "b", rate_by_magnitude=True, learning_rate=0.01, **settings
        )
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert differing(weights_of(straight.model), weights_of(resumed.model)) == []
    other = trainer_for(tmp_path / "c", learning_rate=0.01, **settings)
    with pytest.raises(CheckpointError, match="rate_by_magnitude"):
        other.train(resume_from_checkpoint=str(checkpoint))


def _rates(rate: float, cap: float) -> list[float]:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr": f * rate} for f in (1.0, 0.3)])
    cap_rates(optimizer, rate, cap)
    return [group["lr"] for group in optimizer.param_groups]


def test_a_rate_above_the_cap_is_lowered_in_all_groups_and_says_so() -> None:
    with pytest.warns(UserWarning, match=r"0.001 is lowered to 0.0004: .* by 2.5% .* allows 1.0%"):
        assert _rates(1e-3, 0.01) == pytest.approx([4e-4, 1.2e-4])


@pytest.mark.parametrize(("rate", "cap"), [(1e-3, 0.025), (4e-4, 0.01), (1e-5, 0.01)])
def test_a_rate_up_to_the_cap_stays(rate: float, cap: float) -> None:
    assert _rates(rate, cap) == [rate, 0.3 * rate]


def test_above_the_cap_the_rate_makes_no_difference(tmp_path: Path) -> None:
    found = []
    for rate in (0.02, 0.05):
        trainer = trainer_for(
            tmp_path,
            max_steps=3,
            schedule=Schedule.none(),
            rate_by_magnitude=True,
            rate_cap=0.1,
            learning_rate=rate,
        )
        with pytest.warns(UserWarning, match="is lowered to 0.004"):
            trainer.train()
        assert max(group["initial_lr"] for group in trainer.optimizer.param_groups) < rate
        found.append(weights_of(trainer.model))
    # The rates differ by a rounding.
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rate_cap": -1.0, "rate_by_magnitude": True}, "rate_cap is -1.0; use a positive number"),
        ({"rate_cap": 0.1}, "rate_by_magnitude is off; set it, or leave rate_cap out"),
    ],
)
def test_a_cap_that_means_nothing_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        QATArguments(output_dir=str(tmp_path), **settings)
