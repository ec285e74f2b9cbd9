from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import transformers
import yaml
from transformers import BertForTokenClassification

from helpers import make_tokenizer, redraw, tiny_config
from tutelage import cli
from tutelage.train._sections import TaskName
from tutelage.train.metrics import METRICS
from tutelage.train.recipe import load_recipe
from tutelage.train.tasks import TASKS, Task, task_of_model

TAGS = ("O", "B-X", "I-X")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tutelage", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capfd.readouterr()
        return int(stopped.value.code or 0), out, err

    before = transformers.logging.get_verbosity()
    yield call
    transformers.logging.set_verbosity(before)
    transformers.logging.enable_progress_bar()


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    config = tiny_config("bert")
    config.id2label, config.label2id = dict(enumerate(TAGS)), {t: i for i, t in enumerate(TAGS)}
    model = BertForTokenClassification(config)
    redraw(model)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    row = json.dumps({"tokens": ["w1", "w2", "w3"], "tags": ["O", "B-X", "I-X"]})
    for name in ("train", "dev"):
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n" * 6)
    values = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {
            "task": "token_classification",
            "train": str(tmp_path / "train.jsonl"),
            "eval": str(tmp_path / "dev.jsonl"),
            "max_length": 16,
        },
        "student": {"max_steps": 2, "batch_size": 4},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_train_evaluate_and_predict(
    run: Callable[..., tuple[int, str, str]], recipe: Path, tmp_path: Path
) -> None:
    code, out, err = run("train", recipe)
    assert (code, err) == (0, "")
    assert "entity f1" in out
    out_folder = tmp_path / "out"
    stored = json.loads((out_folder / "result.json").read_text())["student"]["metrics"]
    assert json.loads(run("evaluate", out_folder, "--json")[1])["metrics"] == stored
    code, out, _ = run("predict", out_folder, "w1 w2", "--json")
    found = json.loads(out)
    assert (found["text"], found["words"]) == ("w1 w2", ["w1", "w2"])
    assert set(found["labels"]) <= set(TAGS)
    code, out, _ = run("predict", out_folder, "w1 w2")
    assert out.strip() == " ".join(map("/".join, zip(found["words"], found["labels"], strict=True)))
    for arguments, message in (
        (("predict", out_folder, "w1", "--pair", "w2"), "leave out --pair"),
        (("evaluate", out_folder, "--task", "classification", "--text", "tokens"), "--task"),
        (("evaluate", out_folder, "--task", "regresion"), "Did you mean 'regression'"),
        (("evaluate", out_folder, "--metric", "accuracy"), "use entity_f1"),
    ):
        code, _, err = run(*arguments)
        assert code == 2, arguments
        assert message in err
        assert err.count("\n") == 1


def test_label_free_students_are_compared_in_training_only(
    run: Callable[..., tuple[int, str, str]], recipe: Path, tmp_path: Path
) -> None:
    code, out, _ = run("train", recipe, "data.label=null")
    assert code == 0
    assert "agreement" in out
    assert "entity" not in out
    code, _, err = run("evaluate", tmp_path / "out")
    assert code == 2
    assert "name a label column with --label" in err
    code, out, _ = run("evaluate", tmp_path / "out", "--label", "tags", "--json")
    assert code == 0
    assert "entity_f1" in json.loads(out)["metrics"]


ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda f: f.stem)
def test_the_recipes_that_ship_are_valid(file: Path) -> None:
    recipe = load_recipe(file)
    assert Path(recipe.output).name in (file.stem, f"glue-{file.stem}")
    assert recipe.data.task in TASKS


def test_every_task_of_a_recipe_has_a_home() -> None:
    assert set(TASKS) == set(get_args(TaskName))
    assert {kind for metric in METRICS.values() for kind in metric.kinds} == set(TASKS)
    for task in TASKS.values():
        assert issubclass(task, Task)
        assert hasattr(transformers, task.head.auto)


def test_the_task_of_a_model_is_that_of_its_head() -> None:
    assert (
        task_of_model(BertForTokenClassification(tiny_config("bert")))
        is TASKS["token_classification"]
    )
    assert task_of_model(transformers.BertModel(tiny_config("bert"))) is None
