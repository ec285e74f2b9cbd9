"""Reports of studies."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_pages import read

from helpers import save_tiny, write_rows
from tutelage.errors import StudyError, TutelageError
from tutelage.report import write_report
from tutelage.report._study_page import gather_study
from tutelage.report._study_rules import STUDY_RULES, StudyFacts, study_findings
from tutelage.study import Summary, run_study, summary_of
from tutelage.study._load import study_from_dict
from tutelage.study._statistics import Interval


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    values = {
        "tasks": {
            "toy": {
                "model": {"name_or_path": str(save_tiny(folder / "model"))},
                "data": {
                    "train": str(write_rows(folder / "train.tsv", rows=24)),
                    "eval": str(write_rows(folder / "dev.tsv", rows=20, seed=1)),
                    "max_length": 16,
                },
                "teacher": {"max_steps": 6, "learning_rate": 1e-3, "batch_size": 8},
                "student": {"batch_size": 8},
            }
        },
        "methods": ["full-kd", "ti-g"],
        "budgets": [4],
        "learning_rates": [1e-4, 3e-3],
        "seeds": [0],
        "baseline": "full-kd",
        "points": 2,
        "output": str(folder / "my <study>"),
    }
    run_study(study_from_dict(values), workers=1)
    return folder / "my <study>"


@pytest.fixture
def study(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "my <study>"))


@pytest.fixture
def facts(whole: Path) -> StudyFacts:
    return gather_study(whole)


def test_what_was_written_is_read(whole: Path) -> None:
    written = json.loads((whole / "summary.json").read_text())
    assert Summary.from_dict(written) == summary_of(whole)


def test_tables_and_curves_are_on_one_page(study: Path) -> None:
    png = next((study / "plots").glob("*.png")).read_bytes()
    (study / "plots" / "mine.png").write_bytes(png)
    page = read(write_report(study).file.read_text(encoding="utf-8"))
    assert "my <study>" in page.texts[""]
    summary = summary_of(study)
    (ti,) = [c for c in summary.comparisons if c.best.method == "ti-g"]
    assert f"{ti.best.kl:.4f}" in page.texts["place-0"]
    assert page.texts["place-0"].count("baseline") >= 2
    assert "95 % bootstrap intervals" in page.texts["methods"]
    assert "Convergence" in page.texts["place-0"]
    assert "How much the learning rate matters" in page.texts["place-0"]
    assert page.texts["rates"].count("ti-g") == 2
    assert len(page.all("img")) == 1  # the others are drawn anew
    assert "full-kd, ti-g" in page.texts["done"]
    assert "learning_rates: - 0.0001" in page.texts["done"]


def replaced(facts: StudyFacts, **changes: Any) -> StudyFacts:
    return dataclasses.replace(facts, summary=dataclasses.replace(facts.summary, **changes))


def variants(facts: StudyFacts, **changes: Any) -> StudyFacts:
    first, *rest = facts.summary.variants
    return replaced(facts, variants=(dataclasses.replace(first, **changes), *rest))


def comparisons(facts: StudyFacts, **changes: Any) -> StudyFacts:
    made = tuple(dataclasses.replace(c, **changes) for c in facts.summary.comparisons)
    return replaced(facts, comparisons=made)


def asked(facts: StudyFacts, **changes: Any) -> StudyFacts:
    return dataclasses.replace(facts, study=facts.study.model_copy(update=changes))


METHODS = {name: {"base": "ti-g"} for name in "abcde"}
CASES: dict[str, Callable[[StudyFacts], StudyFacts]] = {
    "failed": lambda f: variants(f, failed=1, seeds=()),
    "no_figures": lambda f: replaced(f, comparisons=f.summary.comparisons[:1]),
    "at_edge": lambda f: comparisons(f, at_edge=True),
    "one_seed": lambda f: f,
    "incomplete": lambda f: asked(f, seeds=[0, 1]),
    "one_rate": lambda f: asked(f, learning_rates=[1e-3]),
    "undecided": lambda f: comparisons(f, change=Interval(-0.1, -0.3, 0.1)),
    "sensitive": lambda f: comparisons(f, off_by_three=0.9),
    "flattered": lambda f: asked(f, methods=METHODS),
    "machines": lambda f: replaced(f, machines=({"device": "a"}, {"device": "b"})),
}


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_speaks(facts: StudyFacts, rule: str) -> None:
    found = {finding.rule: finding for finding in study_findings(CASES[rule](facts))}
    assert rule in found
    assert found[rule].text.endswith(".")
    assert found[rule].remedy.endswith(".")


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == {rule.__name__ for rule in STUDY_RULES}


def test_a_good_study_has_no_warning(facts: StudyFacts) -> None:
    seeds = (0, 1)
    good = comparisons(facts, at_edge=False, change=Interval(-0.3, -0.4, -0.2), off_by_three=0.1)
    good = replaced(
        good,
        variants=tuple(dataclasses.replace(v, seeds=seeds) for v in good.summary.variants),
    )
    assert study_findings(asked(good, seeds=list(seeds))) == ()


def test_the_grid_is_to_grow_beyond_its_edge(facts: StudyFacts) -> None:
    best = facts.summary.comparisons[0].best
    edge = comparisons(facts, at_edge=True, best=dataclasses.replace(best, learning_rate=3e-3))
    (found,) = [f for f in study_findings(edge) if f.rule == "at_edge"]
    assert "Add 0.009 to learning_rates" in found.remedy
    assert "missing" not in found.remedy


def test_rates_of_the_study_beyond_the_edge_are_missing_runs(facts: StudyFacts) -> None:
    best = dataclasses.replace(facts.summary.comparisons[0].best, learning_rate=3e-3)
    only = dataclasses.replace(facts.summary.comparisons[0], best=best, at_edge=True)
    edge = asked(replaced(facts, comparisons=(only,)), learning_rates=[1e-5, 1e-4, 3e-3, 0.01])
    (found,) = [f for f in study_findings(edge) if f.rule == "at_edge"]
    assert found.remedy == (
        "Run tutelage compare again, which goes on with what is missing: "
        f"{best.method} (toy, ternary-a8) at 0.01."
    )
    low = dataclasses.replace(only, best=dataclasses.replace(best, learning_rate=1e-4))
    (found,) = [
        f for f in study_findings(replaced(edge, comparisons=(low,))) if f.rule == "at_edge"
    ]
    assert "(toy, ternary-a8) at 1e-05." in found.remedy
    assert "Add" not in found.remedy


def test_the_ends_are_those_of_the_method(facts: StudyFacts) -> None:
    first, second = facts.summary.comparisons
    lower = [  # the second method was run at other rates, as a study that grew has it
        dataclasses.replace(v, learning_rate=float(v.learning_rate or 0) / 100)
        if v.method == second.best.method
        else v
        for v in facts.summary.variants
    ]
    best = dataclasses.replace(second.best, learning_rate=3e-5)
    made = (
        dataclasses.replace(first, at_edge=False),
        dataclasses.replace(second, best=best, at_edge=True),
    )
    edge = replaced(facts, variants=tuple(lower), comparisons=made)
    (found,) = [f for f in study_findings(edge) if f.rule == "at_edge"]
    assert f"{best.method} (toy, ternary-a8) at 0.0001, 0.003." in found.remedy


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", None, "without results"),
        ("summary.json", "{", r"summary\.json is damaged"),
        ("summary.json", '{"baseline": "x"}', r"summary\.json is damaged"),
        ("plots/mine.png", "GIF", "no PNG image"),
        ("study.yaml", "- 1", "holds a list"),
    ],
)
def test_a_damaged_study_is_one_error(
    study: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (study / name).unlink()
    else:
        (study / name).write_text(content)
    with pytest.raises(StudyError, match=message) as caught:
        write_report(study)
    assert isinstance(caught.value, TutelageError)
    assert "\n" not in str(caught.value)
    assert not (study / "report.html").exists()
