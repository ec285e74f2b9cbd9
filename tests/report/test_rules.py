"""Every rule speaks where it should, and is silent about a good run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tutelage._size import SizePart, SizeReport
from tutelage.bench._timing import Ratio
from tutelage.intervention import Schedule
from tutelage.report._answers import Answers
from tutelage.report._curves import training_blocks
from tutelage.report._facts import Facts
from tutelage.report._measures import Errors
from tutelage.report._page import Chart
from tutelage.report._rules import RULES, findings
from tutelage.report._rules_training import jump, still_falling
from tutelage.report._speed import QuickCase, QuickSpeed
from tutelage.train._log import TrainingLog, training_log
from tutelage.train._result import Figures, RunResult
from tutelage.train.recipe import recipe_from_dict

COUNT = 4000
LABELS = np.arange(COUNT) % 4


def spoilt(share: float, seed: int = 0) -> Any:
    """Returns the labels with a share of wrong ones."""
    random = np.random.default_rng(seed)
    wrong = random.random(COUNT) < share
    return np.where(wrong, (LABELS + 1) % 4, LABELS)


def entries(losses: list[float], schedule: Schedule) -> TrainingLog:
    history = [
        {"step": 2 * i + 2, "loss": loss, "learning_rate": 1e-3} for i, loss in enumerate(losses)
    ]
    return training_log(history, schedule, 2 * len(losses))


FLAT = [9.0, 8.0, 7.0, 5.0, 4.0, 3.0, 2.5, 2.2, *([2.0, 2.02, 1.99, 2.01] * 4)]


def make_answers(teacher: Any, student: Any, labels: Any = LABELS, **more: Any) -> Answers:
    values: dict[str, Any] = {
        "kind": "classes",
        "unit": "example",
        "names": ("a", "b", "c", "d"),
        "labels": labels,
        "teacher": teacher,
        "student": student,
        "same": teacher == student,
        "kl": np.zeros(len(teacher)),
        "metrics": ({"accuracy": 0.96}, {"accuracy": 0.955}),
        "errors": Errors(0.003, 0.003, 0.002),
        "examples": len(teacher),
        "limit": 32,
        "cut": 3,
        "inputs": len(teacher),
        "in_training": 0,
    }
    return Answers(**{**values, **more})


def make_size(head: int) -> SizeReport:
    parts = (
        SizePart("Linear codes", 3, 1000, 250),
        SizePart("scales", 3, 10, 40),
        SizePart("head", 1, head // 4, head),
    )
    return SizeReport("x", True, "ternary-a8", "bits", "float32", parts, 5000, {})


def quick(ratio: float) -> QuickSpeed:
    found = {"teacher": Ratio(1, 1, 1), "student": Ratio(ratio, ratio, ratio)}
    return QuickSpeed((QuickCase("1x8", {"teacher": 1.0, "student": 1 / ratio}, found),), 1, 5, "P")


def make_result(**more: Any) -> RunResult:
    values = {
        "folder": "x",
        "task": "classification",
        "metric": "accuracy",
        "scheme": "ternary-a8",
        "train_examples": 100,
        "eval_examples": COUNT,
        "teacher": Figures(metrics={"accuracy": 0.96}, bytes=5000, parameters=1250),
        "student": Figures(metrics={"accuracy": 0.955}, bytes=320, parameters=1250),
        "teacher_fine_tuned": True,
        "agreement": 0.97,
        "kl": 0.02,
        "seconds": {"student": 3.0},
        "seed": 0,
        "threads": 1,
        "versions": {},
    }
    return RunResult(**{**values, **more})


@pytest.fixture
def good() -> Facts:
    recipe = {
        "model": {"name_or_path": "m"},
        "data": {"train": "t.tsv", "eval": "e.tsv"},
        "student": {"max_steps": 48},
        "schedule": {"steps": 12},
        "output": "x",
    }
    return Facts(
        folder=Path("x"),
        result=make_result(),
        recipe=recipe_from_dict(recipe),
        log=entries(FLAT, Schedule.gradual(12)),
        teacher_log=None,
        size=make_size(30),
        answers=make_answers(spoilt(0.04), spoilt(0.045, 1)),
        bench=None,
        quick=quick(2.0),
        analyses=(),
        missing={},
    )


def of(student: float, metric: str = "accuracy", teacher: float = 0.96) -> dict[str, Any]:
    return {
        "metric": metric,
        "teacher": Figures(metrics={metric: teacher}, bytes=5000, parameters=1250),
        "student": Figures(metrics={metric: student}, bytes=320, parameters=1250),
    }


def changed(facts: Facts, part: str, **more: Any) -> Facts:
    return dataclasses.replace(facts, **{part: dataclasses.replace(getattr(facts, part), **more)})


def result(facts: Facts, **more: Any) -> Facts:
    return dataclasses.replace(facts, result=make_result(**more))


MOSTLY = np.where(np.arange(COUNT) % 10 == 0, 1, 0)
LOST = np.where(LABELS == 2, 1, spoilt(0.04))
CASES: dict[str, Callable[[Facts], Facts]] = {
    "worse": lambda f: result(f, **of(0.90)),
    "worse-perplexity": lambda f: result(f, **of(30.0, "perplexity", 20.0)),
    "constant": lambda f: changed(f, "answers", student=np.zeros(COUNT, dtype=int)),
    "lost_class": lambda f: changed(f, "answers", student=LOST),
    "weak_teacher": lambda f: changed(
        f, "answers", labels=MOSTLY, teacher=np.zeros(COUNT, dtype=int)
    ),
    "moved": lambda f: changed(f, "answers", metrics=({"accuracy": 0.96}, {"accuracy": 0.9})),
    "moved-count": lambda f: result(f, eval_examples=7),
    "no_log": lambda f: dataclasses.replace(f, log=None),
    "falling": lambda f: dataclasses.replace(
        f, log=entries([30.0 - i for i in range(24)], Schedule.none())
    ),
    "jumped": lambda f: dataclasses.replace(
        f, log=entries([*FLAT[:9], 6.0, *FLAT[10:]], Schedule.gradual(12))
    ),
    "long_intervention": lambda f: dataclasses.replace(
        f, recipe=f.recipe.model_copy(update={
            "schedule": f.recipe.schedule.model_copy(update={"steps": 30})})
    ),
    "overlap": lambda f: changed(f, "answers", in_training=12),
    "coarse": lambda f: changed(f, "answers", errors=Errors(0.01, 0.01, 0.01)),
    "imbalance": lambda f: changed(f, "answers", labels=MOSTLY, teacher=MOSTLY, student=MOSTLY),
    "far_in_kl": lambda f: result(f, kl=0.5),
    "no_labels": lambda f: result(
        f, metric="agreement",
        teacher=Figures(metrics={}, bytes=5000, parameters=1250),
        student=Figures(metrics={}, bytes=320, parameters=1250),
    ),
    "cut": lambda f: changed(f, "answers", cut=COUNT // 2),
    "heavy_rest": lambda f: dataclasses.replace(f, size=make_size(4000)),
    "no_bench": lambda f: dataclasses.replace(f, quick=None),
    "slow": lambda f: dataclasses.replace(f, quick=quick(0.5)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks(good: Facts, name: str) -> None:
    rule = name.partition("-")[0]
    before = {finding.rule: finding for finding in findings(good)}
    after = {finding.rule: finding for finding in findings(CASES[name](good))}
    assert rule in after
    assert rule not in before or before[rule] != after[rule]
    assert after[rule].text.endswith(".")
    assert after[rule].remedy.endswith(".")


def test_a_good_run_has_one_note(good: Facts) -> None:
    assert [finding.rule for finding in findings(good)] == ["no_bench"]


def test_every_rule_has_a_case() -> None:
    named = {name.partition("-")[0] for name in CASES} | {"old_bench", "peaked"}
    spoken = {rule.__name__ for rule in RULES}
    assert len(named) == len(spoken) + 1  # no_bench speaks of old ones as well


def test_the_metric_peaked(good: Facts) -> None:
    history = [
        {"step": step, "eval_loss": 1.0, "eval_accuracy": value}
        for step, value in ((10, 0.9), (20, 0.99), (30, 0.955))
    ]
    log = training_log(history, Schedule.none(), 30)
    facts = dataclasses.replace(good, log=log)
    (found,) = [f for f in findings(facts) if f.rule == "peaked"]
    assert "at step 20" in found.text
    student = good.recipe.student.model_copy(update={"keep": "best"})
    kept = dataclasses.replace(facts, recipe=good.recipe.model_copy(update={"student": student}))
    assert "peaked" not in {f.rule for f in findings(kept)}


def test_serious_ones_come_first(good: Facts) -> None:
    found = findings(CASES["constant"](CASES["coarse"](good)))
    serious = [finding.serious for finding in found]
    assert serious == sorted(serious, reverse=True)
    assert serious[0]
    assert not serious[-1]


def test_a_lost_class_is_named_with_its_recalls(good: Facts) -> None:
    (found,) = [f for f in findings(CASES["lost_class"](good)) if f.rule == "lost_class"]
    theirs = float(np.mean(good.answers.teacher[LABELS == 2] == 2))  # type: ignore[union-attr]
    assert f"'c' (recall 0\u00a0%, the teacher's {100 * theirs:.0f}\u00a0%)" in found.text


def test_nothing_is_asked_of_answers_that_are_not_there(good: Facts) -> None:
    facts = dataclasses.replace(good, answers=None)
    assert [finding.rule for finding in findings(facts)] == ["no_bench"]


def test_a_fall_must_stand_out_of_the_noise() -> None:
    noisy = [10.0, 4.0] * 12
    assert still_falling(entries(noisy, Schedule.none())) is None
    steady = entries([10.0] * 6 + [8.0] * 6, Schedule.none())
    assert still_falling(steady) is None  # it fell, and then stayed where it was
    falls = [10.0, 9.9, 9.8, 9.7] * 2 + [9.0, 8.9, 8.0, 7.9]
    # Quarters of three: means 9.0333 of (9.7, 9.0, 8.9) and so on, by hand below.
    before, last = falls[6:9], falls[9:]
    fall = still_falling(entries(falls, Schedule.none()))
    assert fall == pytest.approx((sum(before) - sum(last)) / sum(before))
    under = entries([10.0, 9.0, 8.0, 7.0, 6.0, 5.0], Schedule.gradual(12))
    assert still_falling(under) is None  # all of it under intervention


def test_a_jump_is_looked_for_within_a_stage() -> None:
    flat = [1.0] * 4
    log = entries([*flat, *[9.0] * 4], Schedule.constant("context", 8))
    assert jump(log) is None
    found = jump(entries([*flat, *flat, 1.4, 1.0, 2.0, 1.0], Schedule.none()))
    assert found is not None
    entry, factor, rate = found
    assert (entry.step, factor, rate) == (22, 2.0, 1e-3)


@pytest.mark.parametrize(
    ("losses", "rule"),
    [([0.01 * 1.6**i for i in range(12)] + [3.0] * 12, "jumped"),
     ([1.0] * 12 + [9.0, 8.9, 9.1] * 2 + [5.0, 4.9, 5.1] * 2, "falling")],
)  # fmt: skip
def test_the_ramp_is_left_out(good: Facts, losses: list[float], rule: str) -> None:
    student = good.recipe.student.model_copy(update={"max_steps": 48, "ramp": 0.75})
    ramped = good.recipe.model_copy(update={"student": student})
    plain = dataclasses.replace(good, log=entries(losses, Schedule.none()))
    assert rule in {finding.rule for finding in findings(plain)}
    assert rule not in {f.rule for f in findings(dataclasses.replace(plain, recipe=ramped))}


def test_what_follows_the_ramp_counts() -> None:
    log = entries([0.1, 0.2, 0.4, *[1.0] * 4, 2.0, 1.0], Schedule.none())
    found = jump(log, after=6)
    assert found is not None
    assert (found[0].step, found[1]) == (16, 2.0)
    assert jump(log, after=7) is not None  # the entry of steps 7 and 8 is left out
    assert jump(log, after=10) is None  # two entries remain before it


def test_the_caption_says_why_the_loss_rises_in_the_ramp(good: Facts) -> None:
    def caption(facts: Facts) -> str:
        return next(b.caption for b in training_blocks(facts) if isinstance(b, Chart))

    said = "Over the first 50\u00a0% of the steps weights and activations went from full precision"
    student = good.recipe.student.model_copy(update={"ramp": 0.5})
    ramped = good.recipe.model_copy(update={"student": student})
    assert said in caption(dataclasses.replace(good, recipe=ramped))
    assert "full precision" not in caption(good)


@pytest.mark.parametrize(
    ("majority", "wrong", "weak"),
    [(0.985, 0.0, False), (0.985, 0.005, False), (0.985, 0.014, True), (0.5, 0.45, True),
     (0.5, 0.35, False), (1.0, 0.0, False)],
)  # fmt: skip
def test_a_teacher_is_weak_by_its_errors(
    good: Facts, majority: float, wrong: float, weak: bool
) -> None:
    labels = np.where(np.arange(COUNT) < majority * COUNT, 0, 1)
    teacher = np.where(np.arange(COUNT) < wrong * COUNT, 1 - labels, labels)
    facts = changed(good, "answers", labels=labels, teacher=teacher)
    assert ("weak_teacher" in {finding.rule for finding in findings(facts)}) == weak
