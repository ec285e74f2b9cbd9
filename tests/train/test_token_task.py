from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForTokenClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from helpers import redraw, save_tiny, tiny_config
from tutelage.errors import DataError, RecipeError
from tutelage.train._bio import entities, entity_scores, is_bio
from tutelage.train._tagged import TaggedExamples, read_tagged
from tutelage.train.evaluation import evaluate_folder, predict_texts
from tutelage.train.metrics import METRICS
from tutelage.train.recipe import DataSection, Recipe, load_recipe, recipe_from_dict
from tutelage.train.run import run_recipe
from tutelage.train.tasks import TokenTask

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
PIECES = ("[UNK]", "[PAD]", "[CLS]", "[SEP]", "ann", "##a", "##b", "bob", "in", "rome", "sees")


def tokenizer() -> Any:
    """Makes a WordPiece tokenizer, so that words have several tokens."""
    vocabulary = {piece: index for index, piece in enumerate(PIECES)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=40,
    )


ROWS = [
    (["anna", "sees", "bob"], ["B-PER", "O", "B-PER"]),
    (["annab", "bob", "in", "rome"], ["B-PER", "I-PER", "O", "B-LOC"]),
    (["rome", "rome", "sees"], ["B-LOC", "I-LOC", "O"]),
]


def section(**values: Any) -> DataSection:
    return DataSection(
        **{"task": "token_classification", "train": "a.jsonl", "eval": "b.jsonl"} | values
    )


def write(path: Path, rows: list[Any]) -> Path:
    lines = (json.dumps({"tokens": words, "tags": tags}) for words, tags in rows)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def tagger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("bert")
    config.id2label, config.label2id = dict(enumerate(TAGS)), {t: i for i, t in enumerate(TAGS)}
    model = BertForTokenClassification(config)
    redraw(model)
    folder = tmp_path_factory.mktemp("m") / "tagger"
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path: Path, tagger: Path) -> Callable[..., Recipe]:
    train = write(tmp_path / "train.jsonl", ROWS * 6)
    dev = write(tmp_path / "dev.jsonl", ROWS * 2)

    def recipe(*overrides: str, model: Path = tagger) -> Recipe:
        values = {
            "model": {"name_or_path": str(model)},
            "data": {"task": "token_classification", "train": str(train), "eval": str(dev)}
            | {"max_length": 16},
            "teacher": {"max_steps": 3, "batch_size": 6},
            "student": {"max_steps": 3, "batch_size": 6},
            "output": str(tmp_path / "out"),
        }
        return recipe_from_dict(values, overrides)

    return recipe


def tags_by_hand(model: Any, words: list[str]) -> list[str]:
    """Tags one sentence at a time, from the first token of each word."""
    encoded = tokenizer()([words], is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        best = model(**encoded).logits[0].argmax(-1).tolist()
    ids = encoded.word_ids(0)
    return [model.config.id2label[best[ids.index(word)]] for word in range(len(words))]


def test_from_recipe_to_pipeline(make: Callable[..., Recipe], tagger: Path) -> None:
    result = run_recipe(make("student.eval_steps=3", "student.keep=best"))
    folder = Path(result.folder)
    assert (result.task, result.metric) == ("token_classification", "entity_f1")
    assert set(result.student.metrics) == {
        "entity_f1",
        "entity_precision",
        "entity_recall",
        "token_accuracy",
    }
    teacher = AutoModelForTokenClassification.from_pretrained(tagger).eval()
    predicted = [tags_by_hand(teacher, words) for words, _ in ROWS * 2]
    scores = entity_scores(predicted, [tags for _, tags in ROWS * 2])
    assert result.teacher.metrics["entity_f1"] == scores[2]
    assert result.teacher.metrics["token_accuracy"] < 1
    assert result.kl is not None
    assert result.kl > 0
    found = evaluate_folder(folder, load_recipe(folder / "recipe.yaml").data)
    assert found.metrics == result.student.metrics
    ours = predict_texts(folder, ["anna sees bob", "bob"])
    entry = pipeline("token-classification", str(folder), ignore_labels=[])("anna sees bob")
    starts = {item["word"]: item["entity"] for item in entry}
    assert [starts[piece] for piece in ("ann", "sees", "bob")] == ours[0].labels
    assert ours[1].line("bob") == f"bob/{ours[1].labels[0]}"


def test_fine_tunes_a_model_without_head(make: Callable[..., Recipe], tmp_path: Path) -> None:
    save_tiny(tmp_path / "bare")
    tokenizer().save_pretrained(tmp_path / "bare")
    result = run_recipe(make(model=tmp_path / "bare"))
    assert result.teacher_fine_tuned
    config = AutoModelForTokenClassification.from_pretrained(Path(result.folder) / "teacher").config
    assert sorted(config.id2label.values()) == sorted(TAGS)


def test_without_labels(make: Callable[..., Recipe]) -> None:
    result = run_recipe(make("data.label=null"))
    assert (result.metric, result.student.metrics) == ("agreement", {})
    assert result.agreement is not None


def test_labels_stand_at_the_first_token_of_a_word() -> None:
    task = TokenTask(TAGS, "entity_f1")
    examples = TaggedExamples([["annab", "bob"]], [["B-PER", "I-PER"]], "memory")
    item = task.encode(examples, tokenizer(), 16)[0]
    assert [PIECES[i] for i in item["input_ids"]] == ["[CLS]", "ann", "##a", "##b", "bob", "[SEP]"]
    assert item["labels"] == [-100, 1, -100, -100, 2, -100]


def test_words_beyond_the_limit_are_not_measured() -> None:
    task = TokenTask(TAGS, "entity_f1")
    words, tags = ["bob", "sees", "rome"], ["B-PER", "O", "B-LOC"]
    data = task.encode(TaggedExamples([words], [tags], "memory"), tokenizer(), 4)
    assert (data.starts, data.words) == ([[1, 2]], [[0, 1]])
    perfect = [torch.tensor([0, 1, 0, 0]).numpy()]
    assert task.metrics(perfect, data)["entity_f1"] == 1.0


def test_batches_are_padded_on_the_right() -> None:
    task = TokenTask(TAGS, "entity_f1")
    data = task.encode(
        TaggedExamples([["bob"], ["anna", "in"]], [["O"], ["O", "B-LOC"]], "memory"),
        tokenizer(),
        16,
    )
    left = tokenizer()
    left.padding_side = "left"
    batch = task.collator(left)([data[0], data[1]])
    assert batch["labels"].tolist() == [[-100, 0, -100, -100, -100], [-100, 0, -100, 3, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_other_labels_have_accuracy_only(make: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [(["anna", "sees"], ["noun", "verb"]), (["in", "rome"], ["prep", "noun"])] * 6
    overrides = [f"data.{key}={write(tmp_path / 'pos.jsonl', rows)}" for key in ("train", "eval")]
    save_tiny(tmp_path / "bare")
    tokenizer().save_pretrained(tmp_path / "bare")
    recipe = make(*overrides, "data.eval_split=4", model=tmp_path / "bare")
    result = run_recipe(recipe)
    assert (result.metric, set(result.student.metrics)) == ("token_accuracy", {"token_accuracy"})
    with pytest.raises(DataError, match="'entity_f1' needs tags of entities"):
        run_recipe(
            make(
                *overrides,
                "data.eval_split=4",
                "data.metric=entity_f1",
                "output=" + str(tmp_path / "other"),
                model=tmp_path / "bare",
            )
        )


def test_reads_words_between_blanks(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("tokens\ttags\nanna sees\tB-PER O\n")
    found = read_tagged(str(tmp_path / "a.tsv"), section())
    assert (found.words, found.labels) == ([["anna", "sees"]], [["B-PER", "O"]])


def test_reads_class_numbers_of_the_datasets_library(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner": datasets.List(datasets.ClassLabel(names=list(TAGS))),
        }
    )
    table = datasets.Dataset.from_dict({"tokens": [["a", "b"]], "ner": [[1, 0]]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: table)
    assert read_tagged("some_set", section(label="ner")).labels == [["B-PER", "O"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        pytest.param({"tokens": ["a", "b"], "tags": ["O"]}, "2 words and 1 labels", id="lengths"),
        pytest.param({"tokens": [], "tags": []}, r"row 1 of .* has no text", id="empty"),
        pytest.param({"tokens": ["a", " "], "tags": ["O", "O"]}, "an empty one", id="blank"),
        pytest.param({"tokens": 3, "tags": ["O"]}, "holds a int as text", id="number"),
        pytest.param({"tokens": ["a"], "tags": None}, "holds a NoneType as label", id="null"),
        pytest.param({"words": ["a"], "tags": ["O"]}, "has no column 'tokens'", id="column"),
    ],
)
def test_refuses_a_row(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=message):
        read_tagged(str(tmp_path / "a.jsonl"), section())


@pytest.mark.parametrize(
    ("tag", "message"),
    [("B-ORG", "are not those of the model's head|have 6 labels"), ("O", "label 'O' only")],
)
def test_refuses_labels_that_do_not_fit(
    make: Callable[..., Recipe], tmp_path: Path, tag: str, message: str
) -> None:
    rows = [(["bob"], [tag])] * 6 + (ROWS if tag != "O" else [])
    write(tmp_path / "train.jsonl", rows)
    with pytest.raises(DataError, match=message):
        run_recipe(make())


def test_refuses_metrics_of_other_tasks() -> None:
    tree = {"model": {"name_or_path": "m"}, "data": {"train": "a", "eval": "b"}, "output": "o"}
    with pytest.raises(RecipeError, match="does not fit the task 'token_classification'; use ent"):
        recipe_from_dict(tree, ["data.task=token_classification", "data.metric=accuracy"])


def test_entities_by_hand() -> None:
    assert entities(["B-A", "I-A", "O", "I-A", "B-A", "I-B"]) == {
        ("A", 0, 2),
        ("A", 3, 4),
        ("A", 4, 5),
        ("B", 5, 6),
    }
    assert entities(["O", "O"]) == set()
    assert entities(["B-X-Y", "I-X-Y"]) == {("X-Y", 0, 2)}
    precision, recall, f1 = entity_scores([["B-A", "I-A", "B-B"]], [["B-A", "O", "B-B"]])
    assert (precision, recall, f1) == (0.5, 0.5, 0.5)
    assert entity_scores([["O"]], [["O"]]) == (0.0, 0.0, 0.0)


@given(st.lists(st.tuples(st.sampled_from(["A", "B", ""]), st.integers(1, 3)), max_size=6))
def test_every_notation_says_the_same(runs: list[tuple[str, int]]) -> None:
    bio: list[str] = []
    iobes: list[str] = []
    for kind, length in runs:
        marks = ["B", *"I" * (length - 1)]
        ends = ["S"] if length == 1 else [*marks[:-1], "E"]
        bio += [f"{mark}-{kind}" if kind else "O" for mark in marks]
        iobes += [f"{mark}-{kind}" if kind else "O" for mark in ends]
    bilou = [tag.replace("E-", "L-").replace("S-", "U-") for tag in iobes]
    assert entities(iobes) == entities(bilou) == entities(bio)
    # After its end an entity is over, whatever comes.
    assert len(entities([*(iobes or ["S-A"]), "I-A"])) == len(entities(iobes or ["S-A"])) + 1


@given(st.lists(st.sampled_from(TAGS), max_size=12))
def test_entities_partition_the_tagged_words(tags: list[str]) -> None:
    covered = sorted(word for _, start, end in entities(tags) for word in range(start, end))
    assert covered == [index for index, tag in enumerate(tags) if tag != "O"]
    assert entity_scores([tags], [tags])[2] == float(any(tag != "O" for tag in tags))


def test_what_bio_is() -> None:
    assert is_bio(TAGS)
    assert is_bio(["B-A"])
    assert not is_bio(["O"])
    assert not is_bio(["noun", "B-A"])
    assert is_bio(["S-A", "B-A", "E-A", "I-A", "O"])
    assert is_bio(["U-A", "B-A", "L-A", "I-A", "O"])
    assert not is_bio(["X-A", "O"])
    assert not is_bio(["SA", "BA", "-A", "O"])
    assert METRICS["token_accuracy"].compute([["a", "b"], ["c"]], [["a", "x"], ["c"]]) == 2 / 3
