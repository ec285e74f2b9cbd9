from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import BertTokenizer

from tutelage.errors import DataError
from tutelage.train.data import Examples
from tutelage.train.recipe import DataSection
from tutelage.train.tasks import EncodedDataset, TextTask, build_task, has_head

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "one", "two", "three"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


def examples(labels: list[Any], source: str = "data", pairs: bool = False) -> Examples:
    texts = ["one two three"] * len(labels)
    return Examples(texts, texts if pairs else None, labels, source)


def section(**values: Any) -> DataSection:
    return DataSection(**{"train": "a.tsv", "eval": "b.tsv"} | values)


def head(*names: str) -> Any:
    return SimpleNamespace(
        architectures=["BertForSequenceClassification"], id2label=dict(enumerate(names))
    )


def task_of(found: list[Any], config: Any = None, **values: Any) -> TextTask:
    data = examples(found, "train")
    return build_task(data, section(**values), examples(found, "eval"), config)


@pytest.mark.parametrize(
    ("labels", "config", "values", "names", "spellings"),
    [
        pytest.param(["b", "a"], None, {}, ("a", "b"), (), id="sorted"),
        pytest.param(["10", "9", "1"], None, {}, ("1", "9", "10"), (), id="numbers-by-value"),
        pytest.param(["a", "b"], None, {"labels": ["b", "a"]}, ("b", "a"), (), id="given"),
        pytest.param(["a", "b"], None, {"labels": ["c", "b", "a"]}, tuple("cba"), (), id="more"),
        pytest.param(["a", "b"], head("b", "a"), {}, ("b", "a"), (), id="head"),
        pytest.param(["a", "b"], head("b", "c", "a"), {}, tuple("bca"), (), id="head-has-more"),
        pytest.param(
            ["neg", "pos"], head("POS", "NEG"), {}, ("POS", "NEG"), ("pos", "neg"), id="case"
        ),
        pytest.param(["1", "0"], head("NEG", "POS"), {}, ("NEG", "POS"), ("0", "1"), id="indices"),
        pytest.param(["0", "1"], head("1", "0"), {}, ("1", "0"), (), id="numbers-as-names"),
        pytest.param(
            ["0", "1"], head("LABEL_0", "LABEL_1"), {}, ("LABEL_0", "LABEL_1"), ("0", "1"), id="raw"
        ),
        pytest.param(
            ["a", "b"],
            head("LABEL_0", "LABEL_1"),
            {"labels": ["b", "a"]},
            ("b", "a"),
            (),
            id="given-names-outputs-without-names",
        ),
        pytest.param(
            ["bad", "good"],
            head("POS", "NEG"),
            {"labels": ["good", "bad"]},
            ("POS", "NEG"),
            ("good", "bad"),
            id="given-for-other-names",
        ),
        pytest.param(
            ["a", "b"],
            SimpleNamespace(architectures=["BertModel"], id2label={0: "x", 1: "y", 2: "z"}),
            {},
            ("a", "b"),
            (),
            id="no-head",
        ),
        pytest.param(
            ["a", "b"],
            SimpleNamespace(
                architectures=["XForSequenceClassification"], id2label={"1": "a", "0": "b"}
            ),
            {},
            ("b", "a"),
            (),
            id="names-keyed-by-text",
        ),
    ],
)
def test_finds_the_labels(
    labels: list[str],
    config: Any,
    values: dict[str, Any],
    names: tuple[str, ...],
    spellings: tuple[str, ...],
) -> None:
    task = task_of(labels, config, **values)
    assert task == TextTask("classification", names, "accuracy", spellings)
    assert task.num_labels == len(names)
    assert task.problem_type == "single_label_classification"
    assert task.id2label == dict(enumerate(names))


@pytest.mark.parametrize(
    ("labels", "config", "values", "message"),
    [
        pytest.param([], None, {}, "'train' holds no examples", id="empty"),
        pytest.param(["a"] * 3, None, {}, "hold the label 'a' only; give examples", id="one-class"),
        pytest.param(
            ["a", "c"], None, {"labels": ["a", "b"]}, "the label 'c', which data.labels", id="given"
        ),
        pytest.param(
            ["a", "b", "c"],
            head("a", "b"),
            {},
            "the data have 3 labels (a, b, c), but the model's head has 2 (a, b)",
            id="more-than-the-head",
        ),
        pytest.param(
            ["0", "1"], head("x", "y", "z"), {}, "have 2 labels (0, 1), but the", id="fewer-numbers"
        ),
        pytest.param(
            ["a", "b"], head("x", "y"), {}, "are not those of the model's head (x, y)", id="names"
        ),
        pytest.param(
            ["a", "b"],
            head("a", "y"),
            {"labels": ["a", "b"]},
            "are not those of the model's head",
            id="given-half-right",
        ),
        pytest.param(
            ["a", "b"],
            head("a", "b"),
            {"labels": ["b", "a"]},
            "(b, a) are in another order than the outputs of the model's head (a, b)",
            id="order",
        ),
        pytest.param(
            ["a", "b", "c"], None, {"metric": "f1"}, "set data.metric=macro_f1", id="f1-of-three"
        ),
        pytest.param(
            [1.0, 2.0], head("a", "b"), {"task": "regression"}, "regression needs 1", id="outputs"
        ),
    ],
)
def test_refuses_in_one_line(
    labels: list[Any], config: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        task_of(labels, config, **values)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_the_evaluation_label_that_training_lacks() -> None:
    with pytest.raises(DataError) as caught:
        build_task(examples(["a", "b"]), section(), examples(["a", "z", "q"], "dev.tsv"))
    assert str(caught.value) == (
        "the evaluation data 'dev.tsv' hold the label 'q' (and 1 more), which the training data "
        "lack (they hold a, b); add training examples, or remove these."
    )


def test_shortens_long_lists_of_labels() -> None:
    labels = [f"c{number:02d}" for number in range(30)]
    with pytest.raises(DataError, match=r"c09, \.\.\. 30 in all\), but"):
        task_of(labels, head("a", "b"))


@pytest.mark.parametrize("kind", ["regression", "pair_regression"])
def test_regression(kind: str, tokenizer: Any) -> None:
    pairs = kind.startswith("pair")
    wanted = section(task=kind, text_pair="other" if pairs else None)
    data = examples([1.5, 2.0], pairs=pairs)
    task = build_task(data, wanted, data, head("LABEL_0"))
    assert task == TextTask(kind, (), "correlation")
    assert (task.num_labels, task.problem_type, task.id2label) == (1, "regression", {})
    assert [item["labels"] for item in task.encode(data, tokenizer, 8)] == [1.5, 2.0]  # type: ignore[attr-defined]


def test_the_section_chooses_the_metric() -> None:
    assert task_of(["a", "b"], metric="matthews").metric == "matthews"
    assert task_of([1.0, 2.0], task="regression", metric="spearman").metric == "spearman"


def test_encodes_without_padding_and_cuts(tokenizer: Any) -> None:
    data = Examples(["one", "one two three two"], None, ["b", "a"], "data")
    encoded = task_of(["a", "b"]).encode(data, tokenizer, 4)
    assert len(encoded) == 2
    assert encoded[0]["input_ids"] == [2, 5, 3]
    assert encoded[1]["input_ids"] == [2, 5, 6, 3]
    assert encoded[0]["attention_mask"] == [1, 1, 1]
    assert (encoded[0]["labels"], encoded[1]["labels"]) == (1, 0)
    assert set(encoded[0]) == {*tokenizer.model_input_names, "labels"}


def test_encodes_pairs(tokenizer: Any) -> None:
    data = Examples(["one"], ["two three"], ["a"], "data")
    task = TextTask("pair", ("a", "b"), "accuracy")
    item = task.encode(data, tokenizer, 16)[0]
    assert item["input_ids"] == [2, 5, 3, 6, 7, 3]
    if "token_type_ids" in item:
        assert item["token_type_ids"] == [0, 0, 0, 1, 1, 1]


def test_the_tokenizers_own_limit_holds() -> None:
    vocabulary = {word: index for index, word in enumerate(WORDS)}
    short = BertTokenizer(vocab=vocabulary, model_max_length=3)
    encoded = task_of(["a", "b"]).encode(examples(["a"]), short, 128)
    assert encoded[0]["input_ids"] == [2, 5, 3]


def test_encodes_the_datas_own_spelling(tokenizer: Any) -> None:
    task = task_of(["0", "1"], head("NEG", "POS"))
    encoded = task.encode(examples(["1", "0"]), tokenizer, 8)
    assert [encoded[0]["labels"], encoded[1]["labels"]] == [1, 0]


def test_encode_refuses_what_the_task_lacks(tokenizer: Any) -> None:
    task = task_of(["a", "b"])
    with pytest.raises(DataError, match=r"the label 'z' of 'data' is not one of the task \(a, b\)"):
        task.encode(examples(["a", "z"]), tokenizer, 8)
    with pytest.raises(DataError, match="needs no second text, unlike 'data'"):
        task.encode(examples(["a"], pairs=True), tokenizer, 8)
    with pytest.raises(DataError, match="needs a second text per example"):
        TextTask("pair", ("a", "b"), "accuracy").encode(examples(["a"]), tokenizer, 8)


def test_a_dataset_has_one_row_per_label() -> None:
    with pytest.raises(DataError, match="'input_ids' has 2 rows for 1 labels"):
        EncodedDataset({"input_ids": [[1], [2]]}, [0])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param(None, False, id="none"),
        pytest.param(SimpleNamespace(architectures=None), False, id="unsaved"),
        pytest.param(SimpleNamespace(architectures=["BertModel"]), False, id="encoder"),
        pytest.param(head("a", "b"), True, id="head"),
    ],
)
def test_has_head(config: Any, expected: bool) -> None:
    assert has_head(config) is expected
