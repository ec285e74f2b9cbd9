from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, pipeline

import tutelage
from helpers import VOCAB, make_tokenizer, redraw, save_tiny, tiny_llama
from tutelage.errors import DataError, RecipeError, UnsupportedModelError
from tutelage.train._corpus import Corpus, read_corpora, read_corpus
from tutelage.train.evaluation import evaluate_folder, predict_texts
from tutelage.train.recipe import DataSection, Recipe, load_recipe, recipe_from_dict
from tutelage.train.run import run_recipe
from tutelage.train.tasks import CausalLM

BLOCK = 8


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    rows = [" ".join(f"w{draw.randrange(44)}" for _ in range(10)) for _ in range(count // 10)]
    return "\n".join(rows) + "\n"


def section(**values: Any) -> DataSection:
    return DataSection(**{"task": "causal_lm", "train": "a.txt", "eval": "b.txt"} | values)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama()
    redraw(model)
    folder = tmp_path_factory.mktemp("m") / "llama"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path: Path, llama: Path) -> Callable[..., Recipe]:
    (tmp_path / "train.txt").write_text(words(400))
    (tmp_path / "dev.txt.gz").write_bytes(gzip.compress(words(110, seed=1).encode()))

    def recipe(*overrides: str, model: Path = llama) -> Recipe:
        values = {
            "model": {"name_or_path": str(model)},
            "data": {
                "task": "causal_lm",
                "train": str(tmp_path / "train.txt"),
                "eval": str(tmp_path / "dev.txt.gz"),
                "max_length": BLOCK,
            },
            "teacher": {"max_steps": 2, "batch_size": 8},
            "student": {"max_steps": 4, "batch_size": 8},
            "output": str(tmp_path / "out"),
        }
        return recipe_from_dict(values, overrides)

    return recipe


def perplexity_by_loop(model: Any, text: str) -> float:
    """Computes perplexity one token at a time, in float64."""
    ids = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK]
        for position in range(1, len(block)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([block[:position]])).logits[0, -1].double()
            total -= float(torch.log_softmax(logits, -1)[block[position]])
            count += 1
    return math.exp(total / count)


def test_from_recipe_to_perplexity(make: Callable[..., Recipe], llama: Path) -> None:
    result = run_recipe(make("student.eval_steps=2", "student.keep=best"))
    folder = Path(result.folder)
    assert (result.task, result.metric) == ("causal_lm", "perplexity")
    assert (result.train_examples, result.eval_examples) == (50, 14)
    teacher = AutoModelForCausalLM.from_pretrained(llama).eval()
    wanted = perplexity_by_loop(teacher, words(110, seed=1))
    assert result.teacher.metrics["perplexity"] == pytest.approx(wanted, rel=1e-5)
    assert result.student.metrics["loss"] == pytest.approx(
        math.log(result.student.metrics["perplexity"])
    )
    student = perplexity_by_loop(tutelage.load(folder), words(110, seed=1))
    assert result.student.metrics["perplexity"] == pytest.approx(student, rel=1e-4)
    found = evaluate_folder(folder, load_recipe(folder / "recipe.yaml").data)
    assert found.metrics == result.student.metrics
    assert pipeline("text-generation", str(folder))("w1 w2", max_new_tokens=2)


def test_continues_a_text_with_the_likeliest_tokens(llama: Path, tmp_path: Path) -> None:
    student = tutelage.prepare(
        AutoModelForCausalLM.from_pretrained(llama), tutelage.Scheme.preset("ternary-a8")
    )
    tutelage.save(student, tmp_path / "out", processor=make_tokenizer())
    student.eval()
    tokenizer, ids = make_tokenizer(), make_tokenizer()("w1 w2")["input_ids"]
    while len(ids) < 42 and ids[-1] != student.config.eos_token_id:
        with torch.no_grad():
            ids.append(int(student(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    (found, _) = predict_texts(tmp_path / "out", ["w1 w2", "w5"])
    assert f"w1 w2{found.continuation}" == tokenizer.decode(ids, skip_special_tokens=True)
    assert found.line("w1 w2").startswith("w1 w2 w")
    with pytest.raises(DataError, match="takes no second text"):
        predict_texts(tmp_path / "out", ["w1"], ["w2"])
    with pytest.raises(DataError, match="has 72 tokens and the model takes 64"):
        predict_texts(tmp_path / "out", ["w1 " * 70])


def test_keeps_the_lowest_perplexity(make: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make(
        "student.eval_steps=1",
        "student.keep=best",
        "student.learning_rate=0.3",
        "student.rate_cap=0",
    )
    result = run_recipe(recipe)
    states = (tmp_path / "out" / "checkpoints").glob("*/trainer_state.json")
    log = max((json.loads(s.read_text())["log_history"] for s in states), key=len)
    values = [entry["eval_perplexity"] for entry in log if "eval_perplexity" in entry]
    assert len(values) == 4
    assert result.student.metrics["perplexity"] == pytest.approx(min(values), rel=1e-3)
    assert max(values) > 1.01 * min(values)


def test_fine_tunes_a_model_without_head(
    make: Callable[..., Recipe], llama: Path, tmp_path: Path
) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(llama)
    base.model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    said: list[str] = []
    assert run_recipe(make(model=tmp_path / "base"), report=said.append).teacher_fine_tuned
    assert any("has no language modelling head" in line for line in said)


def task() -> CausalLM:
    return CausalLM("perplexity", VOCAB, BLOCK)


def test_blocks_cover_the_text_once() -> None:
    text = words(50)
    data = task().encode(Corpus([text], "memory"), make_tokenizer(), BLOCK)
    ids = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert [len(item["input_ids"]) for item in data] == [8] * 6 + [2]  # type: ignore[attr-defined]
    assert torch.cat([data[i]["input_ids"] for i in range(len(data))]).tolist() == ids
    one_more = task().encode(Corpus([text + "w1"], "memory"), make_tokenizer(), 10)
    assert len(one_more) == 5, "a block of one token predicts nothing"


def test_files_are_joined_by_the_end_of_text() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "[SEP]"
    data = task().encode(Corpus(["w0 w1", "w2"], "memory"), tokenizer, BLOCK)
    assert data[0]["input_ids"].tolist() == [4, 5, 3, 6]


def test_padding_changes_no_figure(llama: Path) -> None:
    data = task().encode(Corpus([words(50)], "memory"), make_tokenizer(), BLOCK)
    batch = task().collator(make_tokenizer())([data[0], data[6]])
    assert batch["labels"][1, 2:].unique().tolist() == [-100]
    assert batch["attention_mask"].sum(1).tolist() == [8, 2]
    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    labels = batch.pop("labels")
    with torch.no_grad():
        both = task().reduce(model(**batch).logits, labels)
        alone = task().reduce(
            model(input_ids=data[6]["input_ids"][None]).logits, data[6]["labels"][None]
        )
    assert both[:, 1].tolist() == [7, 1]
    assert both[1, 0].item() == pytest.approx(alone[0, 0].item(), rel=1e-5)


def test_metrics_weigh_tokens_not_blocks() -> None:
    found = task().metrics([np.array([6.0, 3.0]), np.array([1.0, 1.0])], None)
    assert found == pytest.approx({"loss": 7 / 4, "perplexity": math.exp(7 / 4)})


def test_the_batch_of_evaluation_keeps_logits_small() -> None:
    large = CausalLM("loss", 50_000, 512)
    assert large.eval_batch_size == 1
    assert task().eval_batch_size == 64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "holds no examples", id="empty"),
        pytest.param(" \n\n", "holds no examples", id="blank"),
        pytest.param("w1", "has 1 tokens, too few to predict one", id="one-token"),
    ],
)
def test_refuses_text(make: Callable[..., Recipe], tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        run_recipe(make())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.txt", b"a\n\xff", r"line 2 of '.*a\.txt' is not valid utf-8", id="bytes"),
        pytest.param("a.txt.gz", b"text", "cannot be read", id="gzip"),
        pytest.param("a.tsv", b"text\tlabel", "is a table, not plain text", id="table"),
        pytest.param("b.txt", b"b", r"there is no file or folder '.*a\.txt'", id="missing"),
    ],
)
def test_refuses_a_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_corpus(str(tmp_path / name.replace("b.", "a.")), section())


def test_reads_a_folder_in_order(tmp_path: Path) -> None:
    (tmp_path / "2.txt").write_text("two")
    (tmp_path / "1.txt.gz").write_bytes(gzip.compress(b"one"))
    assert read_corpus(str(tmp_path), section()).texts == ["one", "two"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no text files"):
        read_corpus(str(tmp_path / "none"), section())


def test_the_end_of_one_text_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {number}\n" for number in range(10)))
    train, held_out = read_corpora(section(train=str(path), eval=None, eval_split=0.25))
    assert train.texts[0] + held_out.texts[0] == path.read_text()
    assert held_out.texts[0] == "line 7\nline 8\nline 9\n"
    with pytest.raises(DataError, match="give a share"):
        read_corpora(section(train=str(path), eval=None, eval_split=2))
    with pytest.raises(DataError, match=r"set data\.eval_split"):
        read_corpora(section(train=str(path), eval=str(path)))
    path.write_text("one line")
    with pytest.raises(DataError, match="leaves no text on one side"):
        read_corpora(section(train=str(path), eval=None, eval_split=0.5))


def test_refuses_a_model_that_sees_what_it_predicts(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match="is not causal: a token changes what"):
        run_recipe(make(model=save_tiny(tmp_path / "bert")))


def test_refuses_a_tokenizer_of_more_tokens(
    make: Callable[..., Recipe], llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="but the model has 40 embeddings"):
        CausalLM("loss", 40, BLOCK).encode(Corpus(["w1 w43"], "t"), make_tokenizer(), BLOCK)
    with pytest.raises(DataError, match="a block needs two tokens"):
        run_recipe(make("data.max_length=1"))


@pytest.mark.parametrize("metric", ["accuracy", "matthews"])
def test_refuses_metrics_of_labels(metric: str) -> None:
    values = {"task": "causal_lm", "train": "a", "eval": "b", "metric": metric}
    tree = {"model": {"name_or_path": "m"}, "data": values, "output": "o"}
    with pytest.raises(RecipeError, match="use perplexity, loss"):
        recipe_from_dict(tree)
