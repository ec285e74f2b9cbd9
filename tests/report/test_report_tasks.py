"""Reports of every kind of task; figures of answers against those of the run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_pages import read
from transformers import (
    BertForQuestionAnswering,
    BertForTokenClassification,
)

import tutelage
from helpers import make_tokenizer, redraw, save_tiny, tiny_config, tiny_llama, write_rows
from tutelage.report import Wanted, write_report
from tutelage.report._answers import answers_of, inputs_in_training
from tutelage.report._pair import load_pair
from tutelage.train._result import read_result
from tutelage.train.data import Examples
from tutelage.train.recipe import load_recipe, recipe_from_dict
from tutelage.train.run import run_recipe

TAGS = ("O", "B-X", "I-X", "B-Y")


def save(model: Any, folder: Path) -> str:
    redraw(model)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return str(path)


def classes(folder: Path) -> dict[str, Any]:
    train, dev = (write_rows(folder / n, seed=s) for s, n in enumerate(("a.tsv", "b.tsv")))
    model = save_tiny(folder / "m", head=("a", "b", "c"))
    return {"model": str(model), "data": {"train": str(train), "eval": str(dev)}}


def unlabelled(folder: Path) -> dict[str, Any]:
    made = classes(folder)
    return made | {"data": made["data"] | {"label": None}}


def regression(folder: Path) -> dict[str, Any]:
    rows = "\n".join(f"w{i} w{i % 3}\t{i / 7}" for i in range(30))
    (folder / "a.tsv").write_text(f"text\tlabel\n{rows}\n")
    data = {"task": "regression", "train": str(folder / "a.tsv"), "eval_split": 9}
    return {"model": str(save_tiny(folder / "m")), "data": data}


def words(folder: Path) -> dict[str, Any]:
    config = tiny_config("bert", labels=4)
    config.id2label, config.label2id = dict(enumerate(TAGS)), {t: i for i, t in enumerate(TAGS)}
    row = {"tokens": ["w1", "w2", "w3", "w4"], "tags": ["O", "B-X", "I-X", "B-Y"]}
    other = {"tokens": ["w5", "w2"], "tags": ["B-Y", "O"]}
    data = {
        "task": "token_classification",
        "train": lines(folder / "a.jsonl", [row, other] * 4),
        "eval": lines(folder / "b.jsonl", [row, other, row]),
    }
    return {"model": save(BertForTokenClassification(config), folder / "m"), "data": data}


def questions(folder: Path) -> dict[str, Any]:
    draw = random.Random(0)
    rows = []
    for _ in range(10):
        context = [f"w{draw.randrange(20)}" for _ in range(12)]
        answer = {"text": [context[0]], "answer_start": [0]}
        rows.append({"context": " ".join(context), "question": "w40 w41", "answers": answer})
    data = {
        "task": "question_answering",
        "train": lines(folder / "a.jsonl", rows),
        "eval": lines(folder / "b.jsonl", rows[:4]),
        "stride": 4,
        "max_answer": 3,
    }
    model = BertForQuestionAnswering(tiny_config("bert", labels=2))
    return {"model": save(model, folder / "m"), "data": data}


def text(folder: Path) -> dict[str, Any]:
    draw = random.Random(0)
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(" ".join(f"w{draw.randrange(44)}" for _ in range(90)))
    data = {"task": "causal_lm", "train": str(folder / "a.txt"), "eval": str(folder / "b.txt")}
    return {"model": save(tiny_llama(), folder / "m"), "data": data}


SAID = {
    classes: ("Who is right", "precision", "teacher \\ student"),
    unlabelled: ("given by the teacher", "teacher \\ student"),
    regression: ("correlation", "student: answer", "label"),
    words: ("Entities by type", "token accuracy", "Who is right, word by word"),
    questions: ("same answer, letter for letter", "exact match"),
    text: ("perplexity", "loss of a token in a block"),
}


@pytest.mark.parametrize("make", SAID, ids=lambda make: make.__name__)
def test_a_report_of_every_task(make: Callable[[Path], dict[str, Any]], tmp_path: Path) -> None:
    made = make(tmp_path)
    values = {
        "model": {"name_or_path": made["model"]},
        "data": {"max_length": 16, **made["data"]},
        "teacher": {"max_steps": 2, "batch_size": 4},
        "student": {"max_steps": 2, "batch_size": 4},
        "output": str(tmp_path / "out"),
    }
    run_recipe(recipe_from_dict(values))
    folder = tmp_path / "out"
    written = write_report(folder, wanted=Wanted(speed=False, analysis=False))
    page = read(written.file.read_text(encoding="utf-8"))
    for said in SAID[make]:
        assert said in page.texts["comparison"]
    assert "moved" not in {finding.rule for finding in written.findings}
    _answers_are_those_of_the_run(folder)


def _answers_are_those_of_the_run(folder: Path) -> None:
    result, recipe = read_result(folder), load_recipe(folder / "recipe.yaml")
    assert result is not None
    found = answers_of(load_pair(folder, recipe, tutelage.load(folder)))
    assert found.metrics[0] == pytest.approx(result.teacher.metrics)
    assert found.metrics[1] == pytest.approx(result.student.metrics)
    assert found.examples == result.eval_examples
    if found.kind == "classes":
        assert found.same is not None
        assert found.same.mean() == pytest.approx(result.agreement)
    if found.unit == "example" and result.kl is not None:
        assert found.kl.mean() == pytest.approx(result.kl)
    if found.labels is not None and found.kind == "classes":
        right = float(np.mean(found.student == found.labels))
        assert right == pytest.approx(
            result.student.metrics.get("accuracy", result.student.metrics.get("token_accuracy"))
        )
    for theirs, ours in found.entities.values():
        assert theirs.support == ours.support > 0
    if found.entities:
        total = sum(ours.support for _, ours in found.entities.values())
        right = sum(ours.recall * ours.support for _, ours in found.entities.values())
        assert right / total == pytest.approx(result.student.metrics["entity_recall"])
    assert (found.errors is None) == (result.metric == "agreement")


def test_inputs_in_training_are_counted() -> None:
    def of(*texts: str, pairs: list[str] | None = None) -> Examples:
        return Examples(list(texts), pairs, None, "x")

    assert inputs_in_training(of("a", "b"), of("b", "c", "b")) == 2
    assert inputs_in_training(of("a", pairs=["x"]), of("a", "a", pairs=["x", "y"])) == 1
    assert inputs_in_training(object(), object()) is None
