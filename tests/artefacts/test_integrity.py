"""What is declared is checked before a model is built, whoever loads it."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzz import Peak
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

import tutelage
from helpers import logits_of, make_batch, make_student, same_bits
from tutelage.artefacts import weight_bytes
from tutelage.artefacts._pack import digest
from tutelage.artefacts._reader import LARGEST_TEXT, parse, read_header, read_json, stored_digest
from tutelage.artefacts._verify import verify_files
from tutelage.errors import ArtefactError

PLAIN = AutoModelForSequenceClassification.from_pretrained
LOADERS = pytest.mark.parametrize("load", [tutelage.load, PLAIN], ids=["tutelage", "transformers"])


@pytest.fixture(scope="module")
def student() -> Any:
    return make_student()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, student: Any) -> Path:
    return tutelage.save(student, tmp_path_factory.mktemp("good") / "out")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory, student: Any) -> Path:
    folder = tmp_path_factory.mktemp("good") / "shards"
    student.save_pretrained(folder, max_shard_size="4KB")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "shards"))


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Classifiers that are built are noted, and not built."""
    built: list[Any] = []

    def note(self: Any, config: Any, *_: Any, **__: Any) -> None:
        built.append(config)
        raise AssertionError("a model was built")

    monkeypatch.setattr(BertForSequenceClassification, "__init__", note)
    return built


def edit(folder: Path, name: str = "config.json", /, **entries: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(content | entries))


class TestBeforeTheModelIsBuilt:
    @LOADERS
    @pytest.mark.parametrize(
        "entries",
        [
            {"num_hidden_layers": 10**9},
            {"hidden_size": 2**40},
            {"vocab_size": 2**62},
            {"hidden_act": "relu"},
            {"transformers_weights": "model.safetensors"},
        ],
        ids=lambda entries: next(iter(entries)),
    )
    def test_a_configuration_is_refused(
        self, load: Any, entries: Any, folder: Path, unbuilt: list[Any]
    ) -> None:
        edit(folder, **entries)
        with pytest.raises(ArtefactError, match="is not the one that"):
            load(folder)
        assert not unbuilt

    @LOADERS
    def test_a_header_is_refused(self, load: Any, folder: Path, unbuilt: list[Any]) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ArtefactError, match="truncated or corrupt"):
            load(folder)
        assert not unbuilt

    def test_a_tensor_is_refused(self, folder: Path, unbuilt: list[Any]) -> None:
        file = folder / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(ArtefactError, match="was changed after"):
            tutelage.load(folder)
        assert not unbuilt

    def test_a_good_one_is_built(self, folder: Path, unbuilt: list[Any]) -> None:
        with pytest.raises(ArtefactError, match="a model was built"):
            tutelage.load(folder)
        assert len(unbuilt) == 1


@LOADERS
class TestOfAnotherSave:
    def test_weights_of_another_seed(self, load: Any, folder: Path, tmp_path: Path) -> None:
        other = tutelage.save(make_student(seed=1), tmp_path / "other")
        shutil.copy(other / "model.safetensors", folder)
        with pytest.raises(ArtefactError, match="restore both files from one save"):
            load(folder)

    def test_a_shard_of_another_seed(self, load: Any, shards: Path, tmp_path: Path) -> None:
        make_student(seed=1).save_pretrained(tmp_path / "other", max_shard_size="4KB")
        name = sorted(file.name for file in shards.glob("model-*"))[1]
        shutil.copy(tmp_path / "other" / name, shards)
        with pytest.raises(ArtefactError, match="one save"):
            load(shards)

    def test_an_index_that_leads_elsewhere(self, load: Any, shards: Path, tmp_path: Path) -> None:
        make_student(seed=1).save_pretrained(tmp_path / "other", max_shard_size="4KB")
        name = "model.safetensors.index.json"
        shard_of = json.loads((shards / name).read_text())["weight_map"]
        edit(shards, name, weight_map={k: f"../other/{v}" for k, v in shard_of.items()})
        with pytest.raises(ArtefactError, match="of another save"):
            load(shards)


class TestFreeEntries:
    @pytest.mark.parametrize(
        "entries",
        [
            {"id2label": {"0": "x", "1": "y", "2": "z"}, "label2id": {"x": 0, "y": 1, "z": 2}},
            {"problem_type": "single_label_classification"},
            {"use_cache": False},
            {"_name_or_path": "/nowhere"},
            {"transformers_version": "4.0.0"},
            {"tokenizer_class": "Nobody"},
        ],
        ids=lambda entries: next(iter(entries)),
    )
    @LOADERS
    def test_load_as_before(self, load: Any, entries: Any, folder: Path, student: Any) -> None:
        edit(folder, **entries)
        loaded = load(folder)
        assert same_bits(logits_of(loaded, make_batch()), logits_of(student, make_batch()))

    @pytest.mark.parametrize(
        "entries",
        [
            {"architectures": ["BertForTokenClassification"]},
            {"architectures": ["BertModel"]},
            {"architectures": ["BertForSequenceClassification", "x"]},
            {"dtype": "bfloat16"},
            {"torch_dtype": "float32"},
            {"auto_map": {"AutoModel": "custom.Model"}},
            {"id2label": {"0": "x", "1": "y"}},
            {"id2label": {"a": "x"}},
        ],
        ids=str,
    )
    def test_are_refused(self, entries: Any, folder: Path) -> None:
        edit(folder, **entries)
        with pytest.raises(ArtefactError):
            tutelage.load(folder)

    def test_no_code_of_the_folder_is_run(self, folder: Path) -> None:
        (folder / "custom.py").write_text("raise SystemExit('run')")
        edit(folder, auto_map={"AutoConfig": "custom.A", "AutoModel": "custom.B"})
        with pytest.raises(ArtefactError):
            tutelage.load(folder)

    def test_an_adapter_is_refused(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        with pytest.raises(ArtefactError, match=r"adapter.*remove adapter_config\.json"):
            tutelage.load(folder)


BOMBS = {
    "arrays": "[" * 200_000,
    "objects": '{"a":' * 200_000,
    "twice": '{"a": 1, "a": 2}',
    "nan": '{"a": NaN}',
    "digits": "9" * 5000,
    "mark": "\ufeff{}",
}


@pytest.mark.parametrize("text", list(BOMBS.values()), ids=list(BOMBS))
class TestJson:
    def test_as_a_configuration(self, text: str, folder: Path) -> None:
        (folder / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ArtefactError, match="is no valid JSON"):
            tutelage.load(folder)

    def test_as_a_header(self, text: str, folder: Path) -> None:
        content = text.encode()
        file = folder / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(content)) + content)
        with pytest.raises(ArtefactError, match="truncated or corrupt"):
            tutelage.load(folder)

    def test_as_an_index(self, text: str, shards: Path) -> None:
        (shards / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        with pytest.raises(ArtefactError):
            tutelage.load(shards)

    def test_as_the_settings_of_generation(self, text: str, folder: Path, student: Any) -> None:
        (folder / "generation_config.json").write_text(text, encoding="utf-8")
        loaded = tutelage.load(folder)  # a classifier does not read it
        assert same_bits(logits_of(loaded, make_batch()), logits_of(student, make_batch()))


def test_an_endless_configuration(folder: Path) -> None:
    with (folder / "config.json").open("ab") as handle:
        handle.truncate(LARGEST_TEXT + 1)
    with pytest.raises(ArtefactError, match="is larger than"):
        tutelage.load(folder)


def test_parsed_as_everybody_parses() -> None:
    text = '{"a": [1, 2.5, null, true], "b": {"ä": "\\u00e4"}}'
    assert parse(text) == parse(text.encode()) == json.loads(text)


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "gap": lambda t: t["b"].update(data_offsets=[9, 13]),
    "overlap": lambda t: t["b"].update(data_offsets=[4, 8]),
    "too short": lambda t: t.pop("b"),
    "beyond the end": lambda t: t["b"].update(shape=[2], data_offsets=[8, 16]),
    "other shape": lambda t: t["b"].update(shape=[2]),
    "giant shape": lambda t: t["b"].update(shape=[2**62, 4]),
    "overflow": lambda t: t["b"].update(shape=[2**33, 2**33]),
    "negative": lambda t: t["b"].update(shape=[-1]),
    "true": lambda t: t["b"].update(shape=[True]),
    "real": lambda t: t["b"].update(shape=[1.0]),
    "dtype": lambda t: t["b"].update(dtype="F33"),
    "no offsets": lambda t: t["b"].pop("data_offsets"),
    "offsets of three": lambda t: t["b"].update(data_offsets=[8, 12, 12]),
    "no object": lambda t: t.update(b=3),
    "metadata": lambda t: t.update(__metadata__={"a": 1}),
}


def write(file: Path, entries: Any, body: bytes = bytes(12), length: int | None = None) -> Path:
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", length or len(text)) + text + body)
    return file


def entries() -> dict[str, Any]:
    return {
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        "a": {"dtype": "U8", "shape": [2, 4], "data_offsets": [0, 8]},
        "__metadata__": {"key": "value"},
    }


class TestHeader:
    def test_what_it_declares(self, tmp_path: Path) -> None:
        file = write(tmp_path / "x", entries())
        header = read_header(file)
        assert header.metadata == {"key": "value"}
        assert [(t.name, t.dtype, t.shape) for t in header.tensors] == [
            ("a", "uint8", (2, 4)),
            ("b", "float32", (1,)),
        ]
        assert header.tensors[0].start == header.bytes == file.stat().st_size - 12

    @pytest.mark.parametrize("change", list(HEADERS.values()), ids=list(HEADERS))
    def test_what_is_not_so(self, change: Any, tmp_path: Path) -> None:
        declared = entries()
        change(declared)
        with pytest.raises(ArtefactError, match="truncated or corrupt"):
            read_header(write(tmp_path / "x", declared))

    @pytest.mark.parametrize("length", [1, 2**20, 2**31, 2**63, 2**64 - 1])
    def test_its_length(self, length: int, tmp_path: Path) -> None:
        with pytest.raises(ArtefactError, match="truncated or corrupt"):
            read_header(write(tmp_path / "x", entries(), length=length))

    def test_a_folder_is_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(ArtefactError, match="it is no file"):
            read_header(tmp_path)
        with pytest.raises(ArtefactError, match="could not be read"):
            read_json(tmp_path)

    def test_no_tensors(self, tmp_path: Path) -> None:
        assert read_header(write(tmp_path / "x", {}, b"")).tensors == ()

    def test_digests_of_a_file_are_those_of_its_tensors(self, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        tensors = {
            "half": torch.randn(3, 5).bfloat16(),
            "whole": torch.randn(700, 800),
            "bytes": torch.arange(7, dtype=torch.uint8),
            "none": torch.zeros(0, 4),
            "one": torch.tensor(3, dtype=torch.int64),
            "flags": torch.tensor([True, False]),
        }
        save_file(tensors, tmp_path / "x.safetensors")
        header = read_header(tmp_path / "x.safetensors")
        with header.file.open("rb") as handle:
            found = {t.name: stored_digest(handle, t) for t in header.tensors}
        assert found == {name: digest(tensor) for name, tensor in tensors.items()}


@pytest.mark.skipif(not Peak().works, reason="needs /proc")
@pytest.mark.parametrize("encoding", ["bits", "base3"])
def test_memory_while_loading(encoding: Any, tmp_path: Path) -> None:
    """At most twice the file, whatever becomes of it, and next to nothing to verify it."""
    student = make_student(width=512, heads=8, layers=4)
    folder = tutelage.save(student, tmp_path / "out", encoding=encoding)
    size, peak = weight_bytes(folder), Peak()
    tutelage.load(folder)
    peak.reset()
    loaded = tutelage.load(folder)
    assert peak.read() < 2 * size
    del loaded
    file = folder / "model.safetensors"
    peak.reset()
    verify_files([file])
    assert peak.read() < 2**22
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    del content
    peak.reset()
    with pytest.raises(ArtefactError):
        tutelage.load(folder)
    assert peak.read() < 2 * size
