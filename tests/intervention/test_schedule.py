"""Schedules: pure functions of the global step."""

from __future__ import annotations

import random
from collections import Counter
from itertools import groupby

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tutelage import Schedule
from tutelage.errors import RecipeError

O, C, M, NONE = "attention_output", "context", "attention_map", "none"  # noqa: E741


def _runs(schedule: Schedule, steps: int) -> list[tuple[str, int]]:
    return [(stage, len(list(run))) for stage, run in groupby(map(schedule, range(steps)))]


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [
        pytest.param(60, (10, 10, 40), id="60-published"),
        pytest.param(120, (20, 20, 80), id="120-published"),
        pytest.param(6, (1, 1, 4), id="6"),
        # Real boundaries: t < s / 6 and t < s / 3, not whole parts.
        pytest.param(7, (2, 1, 4), id="7-ends-at-1.17-and-2.33"),
        pytest.param(8, (2, 1, 5), id="8-ends-at-1.33-and-2.67"),
        pytest.param(10, (2, 2, 6), id="10-ends-at-1.67-and-3.33"),
        pytest.param(11, (2, 2, 7), id="11-ends-at-1.83-and-3.67"),
        pytest.param(33, (6, 5, 22), id="33-ends-at-5.5-and-11"),
    ],
)
def test_gradual(steps: int, lengths: tuple[int, int, int]) -> None:
    expected = [*zip((O, C, M), lengths, strict=True), (NONE, 5)]
    assert _runs(Schedule.gradual(steps), steps + 5) == expected


def test_gradual_of_sixty_by_step() -> None:
    schedule = Schedule.gradual(60)
    assert [schedule(t) for t in (0, 9, 10, 19, 20, 59, 60, 10**9)] == [
        O, O, C, C, M, M, NONE, NONE,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "lengths"),
    [(60, (20, 20, 20)), (7, (3, 2, 2)), (8, (3, 3, 2)), (3, (1, 1, 1))],
    ids=lambda value: str(value),
)
def test_inverted(steps: int, lengths: tuple[int, int, int]) -> None:
    expected = [*zip((M, C, O), lengths, strict=True), (NONE, 5)]
    assert _runs(Schedule.inverted(steps), steps + 5) == expected


@given(steps=st.integers(1, 400), step=st.integers(0, 800))
def test_the_published_rules_hold_at_every_step(steps: int, step: int) -> None:
    gradual = O if 6 * step < steps else C if 3 * step < steps else M
    inverted = M if 3 * step < steps else C if 3 * step < 2 * steps else O
    over = step >= steps
    assert Schedule.gradual(steps)(step) == (NONE if over else gradual)
    assert Schedule.inverted(steps)(step) == (NONE if over else inverted)


@pytest.mark.parametrize("stage", [O, C, M])
def test_constant(stage: str) -> None:
    assert _runs(Schedule.constant(stage, 4), 9) == [(stage, 4), (NONE, 5)]


def test_none() -> None:
    assert _runs(Schedule.none(), 9) == [(NONE, 9)]
    assert Schedule.none().steps == 0


@pytest.mark.parametrize(
    "schedule",
    [Schedule.gradual(0), Schedule.inverted(0), Schedule.stochastic(0), Schedule.constant(M, 0)],
    ids=lambda schedule: schedule.kind,
)
def test_no_steps_is_no_intervention(schedule: Schedule) -> None:
    assert schedule(0) == NONE


@given(seed=st.integers(0, 2**40), order=st.permutations(range(12)))
def test_stochastic_is_a_function_of_seed_and_step(seed: int, order: list[int]) -> None:
    straight = [Schedule.stochastic(12, seed)(t) for t in range(12)]
    random.seed(seed + 1)
    torch.manual_seed(1)
    python, global_torch = random.getstate(), torch.get_rng_state()
    schedule = Schedule.stochastic(12, seed)
    shuffled = {t: schedule(t) for t in order}
    assert [shuffled[t] for t in range(12)] == straight
    assert random.getstate() == python
    assert torch.equal(torch.get_rng_state(), global_torch)
    assert set(straight) <= {O, C, M}
    assert schedule(12) == NONE


def test_stochastic_draws_are_uniform_and_depend_on_the_seed() -> None:
    draws = list(map(Schedule.stochastic(3000, seed=5), range(3000)))
    assert all(900 < count < 1100 for count in Counter(draws).values())
    assert len(Counter(draws)) == 3
    # A longer schedule continues the shorter one: only (seed, step) counts.
    assert list(map(Schedule.stochastic(10, seed=5), range(10))) == draws[:10]
    assert list(map(Schedule.stochastic(3000, seed=6), range(3000))) != draws


def test_stochastic_is_the_same_in_every_process() -> None:
    # Known values: a hash that is salted per process would not give them.
    assert [Schedule.stochastic(6, seed=0)(t) for t in range(6)] == [
        random.Random(f"0/{t}").choice((O, C, M)) for t in range(6)
    ]


@pytest.mark.parametrize(
    "make", [Schedule.gradual, Schedule.inverted, Schedule.stochastic], ids=lambda f: f.__name__
)
def test_a_negative_length_is_refused(make: object) -> None:
    with pytest.raises(RecipeError, match="schedule of -1 steps; use 0 or more"):
        make(-1)  # type: ignore[operator]


def test_an_unknown_stage_is_refused_with_a_hint() -> None:
    with pytest.raises(
        RecipeError, match=r"no stage 'attention_maps'.*Did you mean 'attention_map'\?"
    ):
        Schedule.constant("attention_maps", 3)


@pytest.mark.parametrize("step", [-1, -100])
def test_before_the_first_step_nothing_intervenes(step: int) -> None:
    assert Schedule.gradual(60)(step) == NONE


def test_equal_schedules_are_equal_and_print_what_they_do() -> None:
    assert Schedule.gradual(6) == Schedule.gradual(6)
    assert Schedule.gradual(6) != Schedule.gradual(7)
    assert Schedule.stochastic(6, 1) != Schedule.stochastic(6, 2)
    # Checkpoints compare this text.
    assert len({repr(Schedule.stochastic(6, seed)) for seed in (1, 2)}) == 2
