from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, BertForQuestionAnswering

from helpers import make_tokenizer, redraw, save_tiny, tiny_config
from tutelage.errors import DataError, RecipeError
from tutelage.train._answers import exact_match, overlap_f1
from tutelage.train._squad import QuestionExamples, read_questions
from tutelage.train.evaluation import evaluate_folder, predict_texts
from tutelage.train.recipe import DataSection, Recipe, load_recipe, recipe_from_dict
from tutelage.train.run import run_recipe
from tutelage.train.tasks import QuestionTask

LENGTH, STRIDE = 16, 4


def make_rows(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Makes contexts of 20 words; the answer follows the word that the question asks for."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [f"w{draw.randrange(20)}" for _ in range(20)]
        at = draw.randrange(18)
        words[at] = "w40"
        start = len(" ".join(words[: at + 1])) + 1
        answer = {"text": [words[at + 1]], "answer_start": [start]}
        rows.append({"context": " ".join(words), "question": "w40 w41", "answers": answer})
    return rows


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def section(**values: Any) -> DataSection:
    given = {"task": "question_answering", "train": "a.jsonl", "eval": "b.jsonl"}
    return DataSection(**given | values)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = BertForQuestionAnswering(tiny_config("bert", labels=2))
    redraw(model)
    folder = tmp_path_factory.mktemp("m") / "reader"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path: Path, reader: Path) -> Callable[..., Recipe]:
    train = write(tmp_path / "train.jsonl", make_rows(12))
    dev = write(tmp_path / "dev.jsonl", make_rows(7, seed=1))

    def recipe(*overrides: str, model: Path = reader) -> Recipe:
        values = {
            "model": {"name_or_path": str(model)},
            "data": {
                "task": "question_answering",
                "train": str(train),
                "eval": str(dev),
                "max_length": LENGTH,
                "stride": STRIDE,
                "max_answer": 3,
            },
            "teacher": {"max_steps": 3, "batch_size": 8},
            "student": {"max_steps": 3, "batch_size": 8},
            "output": str(tmp_path / "out"),
        }
        return recipe_from_dict(values, overrides)

    return recipe


def answer_by_loop(model: Any, context: str, question: str) -> str:
    """Answers one question: windows of words, every span of at most three of them."""
    words, asked, best = context.split(), question.split(), (-math.inf, "")
    room = LENGTH - 3 - len(asked)
    for start in range(0, len(words), room - STRIDE):
        window = words[start : start + room]
        encoded = make_tokenizer()(question, " ".join(window), return_tensors="pt")
        with torch.no_grad():
            output = model(**encoded)
        skip = 2 + len(asked)
        for i in range(len(window)):
            for j in range(i, min(i + 3, len(window))):
                score = float(output.start_logits[0, skip + i] + output.end_logits[0, skip + j])
                best = max(best, (score, " ".join(window[i : j + 1])))
        if start + room >= len(words):
            break
    return best[1]


def test_from_recipe_to_answer(make: Callable[..., Recipe], reader: Path) -> None:
    result = run_recipe(make("student.eval_steps=3", "student.keep=best"))
    folder = Path(result.folder)
    assert (result.task, result.metric) == ("question_answering", "answer_f1")
    assert set(result.student.metrics) == {"exact_match", "answer_f1"}
    assert result.eval_examples == 7 * 3, "three windows a question"
    teacher = AutoModelForQuestionAnswering.from_pretrained(reader).eval()
    rows = make_rows(7, seed=1)
    answers = [answer_by_loop(teacher, row["context"], row["question"]) for row in rows]
    given = [row["answers"]["text"] for row in rows]
    assert result.teacher.metrics["answer_f1"] == overlap_f1(answers, given)
    assert result.teacher.metrics["exact_match"] == exact_match(answers, given)
    assert result.agreement is not None
    assert result.kl is not None
    assert result.kl > 0
    found = evaluate_folder(folder, load_recipe(folder / "recipe.yaml").data)
    assert found.metrics == result.student.metrics
    answer = predict_texts(folder, [rows[0]["context"]], ["w40 w41"])[0]
    assert rows[0]["context"][answer.start : answer.end] == answer.answer
    assert answer.line("") == f"{answer.answer}\t{answer.score:.4f}"
    with pytest.raises(DataError, match="needs a question; give it with --pair"):
        predict_texts(folder, ["w1"])


def test_fine_tunes_a_model_without_head(make: Callable[..., Recipe], tmp_path: Path) -> None:
    bare = save_tiny(tmp_path / "bare")
    assert run_recipe(make(model=bare)).teacher_fine_tuned


def test_without_answers(make: Callable[..., Recipe], tmp_path: Path) -> None:
    result = run_recipe(make("data.label=null"))
    assert (result.metric, result.student.metrics) == ("agreement", {})
    bare = save_tiny(tmp_path / "bare")
    with pytest.raises(DataError, match="no teacher can be fine-tuned"):
        run_recipe(make("data.label=null", f"output={tmp_path}/other", model=bare))


def encode(context: str, question: str, answer: str, **task: int) -> Any:
    labels = [[(answer, context.index(answer))]]
    examples = QuestionExamples([context], [question], labels, "memory")
    settings = {"stride": 1, "max_answer": 30} | task
    return QuestionTask("answer_f1", **settings).encode(examples, make_tokenizer(), 8)


def test_windows_share_the_stride_and_cover_the_context() -> None:
    context = " ".join(f"w{index}" for index in range(9))
    data = encode(context, "w40", "w4 w5")
    covered = [
        [context[start:end] for start, end in offsets if end > start] for offsets in data.offsets
    ]
    assert covered == [
        ["w0", "w1", "w2", "w3"],
        ["w3", "w4", "w5", "w6"],
        ["w6", "w7", "w8"],
    ]
    assert data.question == [0, 0, 0]
    assert [item["labels"] for item in data] == [[0, 0], [4, 5], [0, 0]]


def test_half_an_answer_is_none() -> None:
    data = encode("w0 w1 w2 w3 w4 w5", "w40", "w3 w4", stride=0)
    assert [item["labels"] for item in data] == [[0, 0], [0, 0]]


def test_the_best_span_of_all_windows_wins() -> None:
    data = encode("w0 w1 w2 w3 w4 w5 w6", "w40", "w1", max_answer=2)
    task = QuestionTask("answer_f1", 1, 2)
    logits = [np.full((10, 2), -50.0) for _ in range(2)]
    logits[0][0] = 100.0  # not of the context
    logits[0][9] = 100.0  # padding
    logits[0][3, 0], logits[0][6, 1] = 3.0, 3.0  # too long
    logits[1][6, 0], logits[1][5, 1] = 2.0, 2.0  # ends before it starts
    logits[1][4, 0] = 1.0
    found = task.answers(logits, data)[0]
    assert (found.answer, found.score) == ("w4 w5", 3.0)
    assert (found.start, found.end) == (12, 17)


def test_no_answer_where_the_least_first_token_beats_every_span() -> None:
    data = encode("w0 w1 w2 w3 w4 w5 w6", "w40", "w1", max_answer=2)
    logits = [np.zeros((10, 2)) for _ in range(2)]
    logits[0][4] = 2.0
    sure, may_be = QuestionTask("answer_f1", 1, 2), QuestionTask("answer_f1", 1, 2, True)
    for first, expected in (((3.0, 2.5), ""), ((3.0, 1.5), "w1"), ((1.0, 9.0), "w1")):
        for window, value in zip(logits, first, strict=True):
            window[0] = value
        found = may_be.answers(logits, data)[0]
        assert found.answer == expected
        assert found.score == (2 * min(first) if not expected else 4.0)
        assert sure.answers(logits, data)[0].answer == "w1"


def test_unanswerable_questions(make: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = make_rows(12)
    for row in rows[::2]:
        row["answers"] = {"text": [], "answer_start": []}
    both = [
        f"data.{split}={write(tmp_path / f'{split}2.jsonl', rows)}" for split in ("train", "eval")
    ]
    with pytest.raises(DataError, match=r"row 1 of .* set data\.unanswerable=true"):
        run_recipe(make(*both))
    result = run_recipe(make("data.unanswerable=true", *both))
    task = QuestionTask("answer_f1", STRIDE, 3, True)
    given = read_questions(str(tmp_path / "train2.jsonl"), section(unanswerable=True))
    data = task.encode(given, make_tokenizer(), LENGTH)
    empty = [number for number, accepted in enumerate(given.labels or []) if not accepted]
    assert empty == list(range(0, 12, 2))
    for row, number in enumerate(data.question):
        assert number not in empty or data[row]["labels"] == [0, 0]
    folder = Path(result.folder)
    found = [predict_texts(folder, [row["context"]], [row["question"]])[0].answer for row in rows]
    texts = [row["answers"]["text"] or [""] for row in rows]
    assert result.student.metrics["exact_match"] == exact_match(found, texts)
    with pytest.raises(RecipeError, match="'unanswerable' does not fit the task 'classification'"):
        make("data.task=classification", "data.unanswerable=true", "data.text_pair=null")


def test_padding_is_no_class_of_the_comparison() -> None:
    data = encode("w0 w1 w2 w3 w4 w5", "w40", "w1")
    values = torch.randn(2, 12)
    assert QuestionTask("answer_f1", 1, 30).compared(values, data, 0).shape == (2, 8)


def test_answers_are_compared_without_articles_case_and_punctuation() -> None:
    assert exact_match(["The  Cat!", "dog"], [["cat"], ["a cat", "Dogs"]]) == 0.5
    # Shares 2 of 3 and 4 words: F1 = 4 / 7; the better of two accepted answers counts.
    assert overlap_f1(["big red cat"], [["dog", "red cat of mine"]]) == pytest.approx(4 / 7)
    assert overlap_f1(["the", "x"], [["an"], ["the"]]) == 0.5


def test_reads_squad_and_lists_alike(tmp_path: Path) -> None:
    row = make_rows(1)[0]
    text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
    asked = {"question": "w40 w41", "answers": [{"text": text, "answer_start": start}]}
    tree = {"data": [{"paragraphs": [{"context": row["context"], "qas": [asked]}]}]}
    (tmp_path / "squad.json").write_text(json.dumps(tree))
    (tmp_path / "list.json").write_text(json.dumps([row]))
    write(tmp_path / "rows.jsonl", [row])
    found = [
        read_questions(str(tmp_path / name), section())
        for name in ("squad.json", "list.json", "rows.jsonl")
    ]
    assert {(e.contexts[0], e.questions[0]) for e in found} == {(row["context"], "w40 w41")}
    assert [e.labels for e in found] == [[[(text, start)]]] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"answers": {"text": [], "answer_start": []}}, "unanswerable=true", id="none"),
        pytest.param({"answers": {"text": ["w9"], "answer_start": [1]}}, "does not stand", id="at"),
        pytest.param({"answers": {"text": ["w0"]}}, "not text with answer_start", id="no-start"),
        pytest.param({"answers": "w0"}, "not text with answer_start", id="text"),
        pytest.param({"answers": None}, "not text with answer_start", id="null"),
        pytest.param({"context": " "}, "row 1 of .* has no context", id="empty"),
        pytest.param({"question": None}, "row 1 of .* has no question", id="no-question"),
    ],
)
def test_refuses_a_row(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    row = {"context": "w0 w9", "question": "w1", "answers": {"text": ["w0"], "answer_start": [0]}}
    path = write(tmp_path / "a.jsonl", [row | change])
    with pytest.raises(DataError, match=message):
        read_questions(str(path), section())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param('{"data": [{"paragraphs": [{}]}]}', "not laid out as SQuAD", id="layout"),
        pytest.param('{"data": []}', "holds no examples", id="empty"),
        pytest.param("{", "is not valid JSON", id="json"),
    ],
)
def test_refuses_a_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read_questions(str(tmp_path / "a.json"), section())


def test_refuses_windows_without_room(make: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError, match=r"question 1 of .* lower data\.stride"):
        run_recipe(make("data.stride=11"))


def test_refuses_metrics_of_other_tasks(make: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="use exact_match, answer_f1"):
        make("data.metric=accuracy")
    assert section().max_length == 384
