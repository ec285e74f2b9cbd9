from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tutelage.errors import DataError
from tutelage.train.data import Examples, read_examples, split_examples
from tutelage.train.recipe import DataSection
from tutelage.train.tasks import TextTask

TEXTS = ['He said "no".', "a, b", "crème brûlée", "x\u2028y"]
LABELS = ["neg", "pos", "neg", "pos"]


def section(**values: Any) -> DataSection:
    return DataSection(**{"train": "unused", "eval": "unused"} | values)


def write_table(path: Path) -> None:
    """Writes the four examples in the format that the name asks for."""
    records = [{"label": y, "text": x} for x, y in zip(TEXTS, LABELS, strict=True)]
    frame = pd.DataFrame(records)
    kind = path.name.split(".")[1]
    if kind == "tsv":
        lines = ["label\ttext", *(f"{r['label']}\t{r['text']}" for r in records)]
        content = "\r\n".join(lines).encode()
    elif kind == "csv":
        content = frame.to_csv(index=False).encode()
    elif kind == "jsonl":
        content = "\n".join(json.dumps(r, ensure_ascii=False) for r in records).encode()
    elif kind == "json":
        content = json.dumps(records).encode()
    else:
        frame.to_parquet(path)
        content = path.read_bytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("zipped", ["", ".gz"], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "json", "parquet"])
def test_reads_every_format_alike(tmp_path: Path, kind: str, zipped: str) -> None:
    path = tmp_path / f"data.{kind}{zipped}"
    write_table(path)
    examples = read_examples(str(path), section(), split="train")
    assert examples == Examples(TEXTS, None, LABELS, str(path))
    assert len(examples) == 4


@pytest.mark.parametrize("kind", ["tsv", "csv", "parquet"])
def test_columns_by_position(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    write_table(path)
    assert read_examples(str(path), section(text=1, label=0)).texts == TEXTS


@pytest.mark.parametrize("kind", ["tsv", "csv"])
def test_without_header(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    mark = "\t" if kind == "tsv" else ","
    path.write_text(f"1{mark}first one\n\n0{mark}second\n", encoding="utf-8")
    examples = read_examples(str(path), section(header=False, text=1, label=0))
    assert (examples.texts, examples.labels) == (["first one", "second"], ["1", "0"])


def test_pairs_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,other,score\na,b,1.5\nc,d,2\n", encoding="utf-8")
    wanted = section(task="pair_regression", text_pair="other", label="score")
    assert read_examples(str(path), wanted) == Examples(
        ["a", "c"], ["b", "d"], [1.5, 2.0], str(path)
    )


@pytest.mark.parametrize("kind", ["tsv", "csv", "jsonl", "parquet"])
def test_one_text_of_a_pair_may_be_blank(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"data.{kind}"
    frame = pd.DataFrame({"text": ["a", "", "c"], "other": ["", "b", "d"], "label": [0, 1, 1]})
    if kind == "parquet":
        frame.to_parquet(path)
    elif kind == "jsonl":
        frame.to_json(path, orient="records", lines=True)
    else:
        frame.to_csv(path, sep="\t" if kind == "tsv" else ",", index=False)
    wanted = section(task="pair", text_pair="other")
    examples = read_examples(str(path), wanted)
    assert (examples.texts, examples.pairs) == (["a", "", "c"], ["", "b", "d"])
    with pytest.raises(DataError, match=r"row 2 of .* has no text; "):
        read_examples(str(path), section())


def test_both_texts_of_a_pair_blank_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text("text,other,label\na,b,0\n, ,1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"row 2 of .* has neither text nor text_pair"):
        read_examples(str(path), section(task="pair", text_pair="other"))


def test_byte_order_mark_and_other_encodings(tmp_path: Path) -> None:
    path = tmp_path / "data.tsv"
    path.write_text("text\tlabel\né\ta\n", encoding="utf-8-sig")
    assert read_examples(str(path), section()).texts == ["é"]
    path.write_text("text\tlabel\né\ta\n", encoding="latin-1")
    assert read_examples(str(path), section(encoding="latin-1")).texts == ["é"]


def test_whole_numbers_are_one_label_however_stored(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pd.DataFrame({"text": ["a", "b"], "label": [0.0, 1.0]}).to_parquet(path)
    assert read_examples(str(path), section()).labels == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "content", "values", "message"),
    [
        pytest.param("d.tsv", b"", {}, "holds no examples; give a file", id="empty"),
        pytest.param("d.tsv", b" \n\n", {}, "holds no examples", id="blank"),
        pytest.param("d.tsv", b"\xef\xbb\xbf", {}, "holds no examples", id="mark-only"),
        pytest.param("d.tsv", b"text\tlabel\n", {}, "holds no examples", id="tsv-header-only"),
        pytest.param("d.csv", b"text,label\n", {}, "holds no examples", id="csv-header-only"),
        pytest.param("d.json", b"[]", {}, "holds no examples", id="empty-list"),
        pytest.param(
            "d.csv",
            b"sentence,label\na,b\n",
            {"text": "sentense"},
            "has no column 'sentense'. Did you mean 'sentence'? Set data.text to one of: "
            "sentence, label;",
            id="column",
        ),
        pytest.param(
            "d.tsv",
            b"0\ta\n",
            {"header": False},
            "no column 'text': it is read without header and has 2 columns; set data.text to a "
            "position from 0 to 1.",
            id="name-without-header",
        ),
        pytest.param("d.tsv", b"text\tl\na\tb\n", {"text": 5}, "no column 5.", id="position"),
        pytest.param("d.tsv", b"text\ttext\na\tb\n", {}, "names a column twice", id="twice"),
        pytest.param("d.tsv", b"text\tlabel\na\tb\n\tb\n", {}, "row 2 of", id="no-text"),
        pytest.param("d.tsv", b"text\tlabel\na\tb\na\n", {}, "has no label; add it", id="no-label"),
        pytest.param("d.csv", b"text,label\na,b\na\n", {}, "row 2 of", id="csv-no-label"),
        pytest.param("d.csv", b"text,label\na,b\na,b,c\n", {}, "not valid CSV", id="ragged-csv"),
        pytest.param("d.csv", b'text,label\n"a,b\n', {}, "not valid CSV", id="open-quote"),
        pytest.param(
            "d.tsv", b"text\tlabel\na\tb\na\tb\tc\n", {}, "row 2 of", id="tab-within-a-field"
        ),
        pytest.param("d.tsv", b"text\tlabel\na\tb\n\xff\tb\n", {}, "line 3 of", id="not-utf-8"),
        pytest.param("d.tsv.gz", b"no gzip", {}, "cannot be read (Not a gzipped", id="not-gzip"),
        pytest.param(
            "d.tsv.gz", gzip.compress(b"a\tb\n" * 99)[:-9], {}, "cannot be read", id="truncated"
        ),
        pytest.param("d.parquet", b"PAR1 no", {}, "not a valid Parquet file", id="parquet"),
        pytest.param("d.jsonl", b'{"text": "a"}\n{', {}, "line 2 of", id="jsonl"),
        pytest.param("d.json", b"{", {}, "is not valid JSON", id="json"),
        pytest.param("d.json", b'{"text": 1}', {}, "row 1 of", id="json-no-list"),
        pytest.param("d.jsonl", b"3\n", {}, "not an object with named fields", id="no-object"),
        pytest.param(
            "d.jsonl",
            b'{"text": "a", "label": 1}\n{"text": "a"}',
            {},
            "row 2 of",
            id="jsonl-no-label",
        ),
        pytest.param(
            "d.jsonl", b'{"text": ["a"], "label": 1}', {}, "holds a list as text", id="list"
        ),
        pytest.param(
            "d.tsv",
            b"text\tlabel\na\t1\na\tgood\n",
            {"task": "regression"},
            "the label 'good', which is not a finite number",
            id="not-a-number",
        ),
        pytest.param(
            "d.tsv", b"text\tlabel\na\tnan\n", {"task": "regression"}, "not a finite", id="nan"
        ),
        pytest.param("d.xlsx", b"x", {}, "the type of", id="unknown-type"),
    ],
)
def test_refuses_a_file_in_one_line(
    tmp_path: Path, name: str, content: bytes, values: dict[str, Any], message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_examples(str(path), section(**values))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["missing.tsv", "missing.csv.gz", "./missing", "/no/such"])
def test_missing_files(source: str) -> None:
    with pytest.raises(DataError, match=r"there is no file or folder .*; check the path\."):
        read_examples(source, section())


def test_an_empty_name() -> None:
    with pytest.raises(DataError, match="a path or name of data is empty; set"):
        read_examples("", section())


class TestClassFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        for label in ("sport", "business", ".hidden", "__pycache__"):
            (tmp_path / "news" / label).mkdir(parents=True)
            for number in (2, 1):
                text = f"{label} article {number}\n"
                (tmp_path / "news" / label / f"{number}.txt").write_text(text, encoding="utf-8")
        (tmp_path / "news" / "README.TXT").write_text("read me", encoding="utf-8")
        (tmp_path / "news" / "sport" / ".DS_Store").write_bytes(b"\xff")
        return tmp_path / "news"

    def test_names_are_labels_and_files_are_sorted(self, folder: Path) -> None:
        examples = read_examples(str(folder), section())
        assert examples.labels == ["business", "business", "sport", "sport"]
        assert examples.texts[:2] == ["business article 1\n", "business article 2\n"]

    def test_a_bad_byte_names_its_file(self, folder: Path) -> None:
        (folder / "sport" / "3.txt").write_bytes(b"ok\n\xa3 5")
        with pytest.raises(DataError, match=r"line 2 of '.*3\.txt' is not valid utf-8; set data"):
            read_examples(str(folder), section())

    def test_an_empty_file_is_named(self, folder: Path) -> None:
        (folder / "sport" / "3.txt").touch()
        with pytest.raises(DataError, match=r"3\.txt' holds no examples"):
            read_examples(str(folder), section())

    def test_an_empty_class_is_named(self, folder: Path) -> None:
        (folder / "tech").mkdir()
        with pytest.raises(DataError, match=r"tech' holds no text files; fill or remove it"):
            read_examples(str(folder), section())

    def test_other_tasks_are_refused(self, folder: Path) -> None:
        with pytest.raises(DataError, match="do not fit the task 'regression'"):
            read_examples(str(folder), section(task="regression"))

    @pytest.mark.parametrize("evaluation", ["none", "same", "same, otherwise written"])
    def test_one_folder_is_split(self, folder: Path, evaluation: str) -> None:
        named = {"none": None, "same": str(folder)}.get(evaluation, f"{folder}/../news")
        wanted = section(train=str(folder), eval=named, eval_split=2)
        train, held_out = TextTask.read(wanted)
        assert sorted(held_out.labels) == sorted(train.labels) == ["business", "sport"]
        assert set(train.texts).isdisjoint(held_out.texts)

    def test_one_folder_needs_a_split(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"are both '.*'; set data\.eval_split"):
            TextTask.read(section(train=str(folder), eval=str(folder)))


def test_two_files_are_not_split(tmp_path: Path) -> None:
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text(f"text\tlabel\n{name}\ta\n", encoding="utf-8")
    wanted = section(train=f"{tmp_path}/train.tsv", eval=f"{tmp_path}/dev.tsv", eval_split=0.5)
    train, held_out = TextTask.read(wanted)
    assert (train.texts, held_out.texts) == (["train.tsv"], ["dev.tsv"])


class TestDatasetsLibrary:
    @pytest.fixture
    def loaded(self, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
        calls: list[Any] = []
        features = datasets.Features(
            {
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["neg", "pos"]),
            }
        )

        def load(path: str, config: str | None, *, split: str) -> datasets.Dataset:
            calls.append((path, config, split))
            labels = [1, 0, -1 if split == "test" else 1]
            return datasets.Dataset.from_dict({"text": list("abc"), "label": labels}, features)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return calls

    def test_names_configs_and_splits(self, loaded: list[Any]) -> None:
        wanted = section(train="group/set:cfg", eval="group/set:cfg", train_split="train[:3]")
        train, held_out = TextTask.read(wanted)
        assert train.labels == held_out.labels == ["pos", "neg", "pos"]
        assert loaded == [
            ("group/set", "cfg", "train[:3]"),
            ("group/set", "cfg", "validation"),
        ]

    def test_unlabelled_splits_are_refused(self, loaded: list[Any]) -> None:
        with pytest.raises(DataError, match="row 3 of 'set' has no label"):
            read_examples("set", section(eval_split_name="test"), split="eval")

    @pytest.mark.parametrize("kind", [FileNotFoundError, KeyError, RuntimeError])
    def test_any_error_becomes_one_line(
        self, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
    ) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise kind("first line\nsecond line")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(DataError) as caught:
            read_examples("no/such", section(), split="train")
        assert "the split 'train' of 'no/such' could not be loaded" in str(caught.value)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize("whole", [True, False], ids=["dictionary", "one split"])
    def test_folders_saved_by_the_library(self, tmp_path: Path, whole: bool) -> None:
        table = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
        saved = datasets.DatasetDict({"train": table}) if whole else table
        saved.save_to_disk(str(tmp_path / "saved"))
        assert read_examples(str(tmp_path / "saved"), section()).labels == ["0", "1"]

    def test_is_asked_for_only_when_needed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(DataError, match=r"pip install 'tutelage\[data\]'"):
            read_examples("some_name", section())


def examples_of(labels: list[Any]) -> Examples:
    texts = [f"text {number}" for number in range(len(labels))]
    return Examples(texts, [text.upper() for text in texts], labels, "memory")


class TestSplit:
    @given(
        st.lists(st.sampled_from("abcd"), min_size=8, max_size=60),
        st.integers(0, 2**32 - 1),
        st.floats(0.05, 0.5),
    )
    def test_is_a_stratified_partition(self, labels: list[str], seed: int, share: float) -> None:
        whole = examples_of(labels)
        count = round(share * len(labels))
        classes = Counter(labels)
        if not 1 <= count <= len(labels) - len(classes):
            with pytest.raises(DataError, match="must be between 1 and"):
                split_examples(whole, share, seed, True)
            return
        rest, drawn = split_examples(whole, share, seed, True)
        assert len(drawn) == count
        assert sorted(rest.texts + drawn.texts) == sorted(whole.texts)
        assert set(rest.labels) == set(labels)
        assert [rest.texts, drawn.texts] == [
            sorted(part.texts, key=whole.texts.index) for part in (rest, drawn)
        ]
        for label, size in classes.items():
            exact = size * count / len(labels)
            assert drawn.labels.count(label) <= np.ceil(exact) + len(classes)
        assert split_examples(whole, share, seed, True) == (rest, drawn)

    def test_keeps_the_shares(self) -> None:
        rest, drawn = split_examples(examples_of(["a"] * 80 + ["b"] * 20), 10, 0, True)
        assert Counter(drawn.labels) == {"a": 8, "b": 2}
        assert Counter(rest.labels) == {"a": 72, "b": 18}
        assert drawn.pairs == [text.upper() for text in drawn.texts]

    def test_the_seed_decides(self) -> None:
        whole = examples_of(["a", "b"] * 50)
        drawn = [split_examples(whole, 0.2, seed, True)[1].texts for seed in (0, 0, 1)]
        assert drawn[0] == drawn[1] != drawn[2]

    def test_regression_is_not_stratified(self) -> None:
        whole = examples_of([float(number) for number in range(10)])
        rest, drawn = split_examples(whole, 0.3, 0, False)
        assert (len(rest), len(drawn)) == (7, 3)

    @pytest.mark.parametrize("amount", [10, 9, 0.01, 1000], ids=str)
    def test_refuses_to_leave_too_little(self, amount: float) -> None:
        with pytest.raises(DataError, match="must be between 1 and 8, so that something is left"):
            split_examples(examples_of(["a", "b"] * 5), amount, 0, True)
