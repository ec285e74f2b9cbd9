"""Artefacts that were truncated, edited or mixed are refused, never loaded as something else."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

import tutelage
from helpers import make_student, same_bits
from tutelage.artefacts._pack import METADATA_KEY, config_digest, digest
from tutelage.errors import ArtefactError, TutelageError

WORD = "bert.embeddings.word_embeddings"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "out"
    tutelage.save(make_student(), folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    change(config)
    file.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]):
    """Rewrites the weights, header included, as somebody who knows the format could."""
    file = str(folder / "model.safetensors")
    with safe_open(file, "pt") as handle:
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        metadata = dict(handle.metadata())
    change(tensors, metadata)
    save_file(tensors, file, metadata)


class TestWeights:
    @pytest.mark.parametrize("kept", [0, 5, 8, 100, 0.5, 0.99, -1], ids=str)
    def test_truncated(self, folder: Path, kept: float) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        kept = int(kept * len(content)) if isinstance(kept, float) else kept
        file.write_bytes(content[:kept])
        with pytest.raises(ArtefactError, match=r"model\.safetensors is truncated or corrupt"):
            tutelage.load(folder)
        with pytest.raises(Exception):  # noqa: B017, PT011
            AutoModelForSequenceClassification.from_pretrained(folder)

    def test_any_flipped_bit_is_refused_or_changes_nothing(
        self, original: Path, folder: Path
    ) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        (start,) = struct.unpack("<Q", content[:8])
        want = tutelage.load(original).state_dict()
        generator = random.Random(7)
        body = [generator.randrange(8 + start, len(content)) for _ in range(40)]
        head = [generator.randrange(0, 8 + start) for _ in range(60)]
        for place in [*body, *head, 0, 7, 8, 8 + start, len(content) - 1]:
            spoiled = bytearray(content)
            spoiled[place] ^= 1 << generator.randrange(8)
            file.write_bytes(spoiled)
            try:
                got = tutelage.load(folder).state_dict()
            except ArtefactError:
                continue
            assert place < 8 + start, "a changed weight was loaded"
            assert all(same_bits(got[name], tensor) for name, tensor in want.items())

    @pytest.mark.parametrize(
        "name",
        [f"{WORD}.weight", f"{WORD}.weight_scale", "classifier.bias", "classifier.weight"],
    )
    def test_one_changed_element_names_the_tensor(self, folder: Path, name: str) -> None:
        def change(tensors: dict[str, torch.Tensor], _: Any) -> None:
            tensors[name].view(-1)[0] += 1

        edit_tensors(folder, change)
        with pytest.raises(ArtefactError, match=rf"tensor '{name}' .* was changed after"):
            tutelage.load(folder)
        with pytest.raises(ArtefactError, match="was changed after"):
            AutoModelForSequenceClassification.from_pretrained(folder)

    def test_a_removed_tensor_is_named(self, folder: Path) -> None:
        edit_tensors(folder, lambda tensors, _: tensors.pop(f"{WORD}.weight_scale"))
        for load in (tutelage.load, AutoModelForSequenceClassification.from_pretrained):
            with pytest.raises(ArtefactError, match=rf"'{WORD}\.weight_scale' is missing"):
                load(folder)

    def test_an_added_tensor_is_refused(self, folder: Path) -> None:
        edit_tensors(folder, lambda tensors, _: tensors.update(extra=torch.ones(1)))
        with pytest.raises(ArtefactError, match="'extra'"):
            tutelage.load(folder)

    def test_two_tensors_of_one_shape_cannot_change_places(self, folder: Path) -> None:
        def swap(tensors: dict[str, torch.Tensor], _: Any) -> None:
            one, other = (f"bert.encoder.layer.{i}.output.dense.weight" for i in range(2))
            tensors[one], tensors[other] = tensors[other], tensors[one]

        edit_tensors(folder, swap)
        with pytest.raises(ArtefactError, match="was changed after"):
            tutelage.load(folder)

    def test_weights_without_digests_are_refused(self, folder: Path) -> None:
        edit_tensors(folder, lambda _, metadata: metadata.pop(METADATA_KEY))
        with pytest.raises(ArtefactError, match="carries no digests; save the model again"):
            tutelage.load(folder)

    @pytest.mark.parametrize("record", ["", "{", "{}", "[]", "3", '{"modules": 1}'])
    def test_digests_that_are_none_are_refused(self, folder: Path, record: str) -> None:
        edit_tensors(folder, lambda _, metadata: metadata.update({METADATA_KEY: record}))
        with pytest.raises(ArtefactError):
            tutelage.load(folder)

    def test_weights_of_another_save_are_refused(self, folder: Path, tmp_path: Path) -> None:
        tutelage.save(make_student("bert", "binary-a8"), tmp_path / "other")
        shutil.copy(tmp_path / "other" / "model.safetensors", folder)
        with pytest.raises(ArtefactError, match="restore both files from one save"):
            tutelage.load(folder)

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(ArtefactError, match=r"holds no model\.safetensors"):
            tutelage.load(folder)
        with pytest.raises(OSError, match="no file named"):
            AutoModelForSequenceClassification.from_pretrained(folder)

    def test_a_teacher_in_full_precision_is_no_artefact(self, tmp_path: Path) -> None:
        from helpers import tiny

        tiny().save_pretrained(tmp_path)
        with pytest.raises(ArtefactError, match="load it with from_pretrained"):
            tutelage.load(tmp_path)


def _grow(config: dict[str, Any]) -> None:
    config["num_hidden_layers"] += 1


def _shrink(config: dict[str, Any]) -> None:
    config["num_hidden_layers"] -= 1


def _widen(config: dict[str, Any]) -> None:
    config["intermediate_size"] *= 2


def _requantize(config: dict[str, Any]) -> None:
    config["quantization_config"]["modules"][WORD]["weight"]["kind"] = "four-level"


def _coarsen(config: dict[str, Any]) -> None:
    name = "bert.encoder.layer.0.output.dense"
    config["quantization_config"]["modules"][name]["input"]["bits"] = 4


def _forget(config: dict[str, Any]) -> None:
    del config["quantization_config"]["modules"][WORD]


def _later(config: dict[str, Any]) -> None:
    config["quantization_config"]["version"] = 4


def _unquantize(config: dict[str, Any]) -> None:
    del config["quantization_config"]


def _rename(config: dict[str, Any]) -> None:
    config["architectures"] = ["BertForPoetry"]


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_an_earlier_version_still_loads(
    version: int, original: Path, folder: Path
) -> None:
    def make_older(config: dict[str, Any]) -> None:
        section = config["quantization_config"]
        section["version"] = version
        del section["encoding"], section["rest"], section["weights"]

    edit_config(folder, make_older)
    digest_of = config_digest(json.loads((folder / "config.json").read_text()), version)

    def change(_: Any, metadata: dict[str, Any]) -> None:
        record = json.loads(metadata[METADATA_KEY])
        metadata[METADATA_KEY] = json.dumps({"tensors": record["tensors"], "config": digest_of})

    edit_tensors(folder, change)
    loaded = tutelage.load(folder)
    want, got = tutelage.load(original).state_dict(), loaded.state_dict()
    assert want.keys() == got.keys()
    assert all(same_bits(got[name], tensor) for name, tensor in want.items())
    loaded.save_pretrained(folder / "again")
    section = json.loads((folder / "again" / "config.json").read_text())["quantization_config"]
    assert section["version"] == 3
    tutelage.load(folder / "again")
    edit_config(folder, lambda config: config.update(hidden_act="relu"))
    with pytest.raises(ArtefactError, match="is not the one that"):
        tutelage.load(folder)


class TestConfig:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            pytest.param(_grow, "is not the one that", id="more-layers"),
            pytest.param(_shrink, "is not the one that", id="less-layers"),
            pytest.param(_widen, "is not the one that", id="wider"),
            pytest.param(_requantize, "is not the one that", id="other-quantizer"),
            pytest.param(_coarsen, "is not the one that", id="other-bits"),
            pytest.param(_forget, "is not the one that", id="module-removed"),
            pytest.param(_later, r"version 4 of.*save the model again", id="later-version"),
            pytest.param(_unquantize, "is no packed model", id="no-quantization-config"),
            pytest.param(_rename, "'BertForPoetry', which is no model", id="unknown-class"),
        ],
    )
    def test_edited(self, folder: Path, change: Any, message: str) -> None:
        edit_config(folder, change)
        with pytest.raises(ArtefactError, match=message):
            tutelage.load(folder)

    @pytest.mark.parametrize("change", [_grow, _shrink, _widen, _requantize, _coarsen, _forget])
    def test_edited_is_refused_by_from_pretrained_too(self, folder: Path, change: Any) -> None:
        edit_config(folder, change)
        with pytest.raises((TutelageError, RuntimeError)):
            AutoModelForSequenceClassification.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("num_attention_heads", 5), ("hidden_act", "relu"), ("layer_norm_eps", 1.0)],
    )
    def test_edited_so_that_shapes_still_fit(self, folder: Path, key: str, value: Any) -> None:
        edit_config(folder, lambda config: config.update({key: value}))
        with pytest.raises(ArtefactError):
            tutelage.load(folder)

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param(lambda c: c.update(hidden_size="wide"), id="hidden-size-text"),
            pytest.param(lambda c: c.update(hidden_size=0), id="hidden-size-0"),
            pytest.param(lambda c: c.update(num_attention_heads=0), id="heads-0"),
            pytest.param(lambda c: c.update(vocab_size=0), id="vocabulary-0"),
            pytest.param(lambda c: c.update(dtype="float33"), id="dtype-unknown"),
            pytest.param(lambda c: c.update(architectures=["pipeline"]), id="class-no-model"),
            pytest.param(lambda c: c.update(architectures=["BertConfig"]), id="class-config"),
            pytest.param(lambda c: c.update(quantization_config="x"), id="quantization-text"),
            pytest.param(lambda c: c["quantization_config"].pop("scheme"), id="no-scheme"),
        ],
    )
    def test_edited_beyond_sense(self, folder: Path, change: Any) -> None:
        edit_config(folder, change)
        with pytest.raises(ArtefactError):
            tutelage.load(folder)

    @pytest.mark.parametrize("content", [b"", b"{", b"nonsense", b"\xff\xfe\x00", b"{'a': 1}"])
    def test_not_json(self, folder: Path, content: bytes) -> None:
        (folder / "config.json").write_bytes(content)
        with pytest.raises(ArtefactError, match=r"config\.json is no valid JSON"):
            tutelage.load(folder)

    @pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
    def test_json_but_no_object(self, folder: Path, content: str) -> None:
        (folder / "config.json").write_text(content)
        with pytest.raises(ArtefactError):
            tutelage.load(folder)

    @pytest.mark.parametrize("content", ["{}", '{"quantization_config": null}'])
    def test_json_of_something_else(self, folder: Path, content: str) -> None:
        (folder / "config.json").write_text(content)
        with pytest.raises(ArtefactError, match="is no packed model"):
            tutelage.load(folder)

    def test_missing(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(ArtefactError, match=r"holds no config\.json; name a folder"):
            tutelage.load(folder)

    def test_no_folder(self, tmp_path: Path, folder: Path) -> None:
        with pytest.raises(ArtefactError, match="there is no folder"):
            tutelage.load(tmp_path / "nowhere")
        with pytest.raises(ArtefactError, match="there is no folder"):
            tutelage.load(str(folder / "config.json"))


class TestDigest:
    def test_depends_on_bytes_shape_and_dtype(self) -> None:
        x = torch.arange(6, dtype=torch.float32)
        others = [x.reshape(2, 3), x.int(), x + 1, -x, x[:5]]
        digests = {digest(x), *(digest(other) for other in others)}
        assert len(digests) == 6
        assert digest(x.clone()) == digest(x)
        assert all(len(d) == 16 for d in digests)

    def test_sees_the_sign_of_zero_and_not_the_strides(self) -> None:
        assert digest(torch.tensor([0.0])) != digest(torch.tensor([-0.0]))
        x = torch.randn(3, 4)
        assert digest(x.t()) == digest(x.t().contiguous())

    @pytest.mark.parametrize("shape", [(), (0,), (0, 3)], ids=str)
    def test_any_shape(self, shape: tuple[int, ...]) -> None:
        assert len(digest(torch.zeros(shape))) == 16

    def test_of_a_config_ignores_the_order_of_keys(self) -> None:
        assert config_digest({"a": 1, "b": {"c": 2, "d": 3}}, 3) == config_digest(
            {"b": {"d": 3, "c": 2}, "a": 1}, 3
        )
        assert config_digest({"a": 1}, 3) != config_digest({"a": 2}, 3)

    def test_of_a_config_fixes_the_class_from_the_third_version_on(self) -> None:
        one, other = {"architectures": ["A"]}, {"architectures": ["B"]}
        assert config_digest(one, 2) == config_digest(other, 2)
        assert config_digest(one, 3) != config_digest(other, 3)
        labels = {"id2label": {"0": "a"}}
        assert config_digest(labels, 3) == config_digest({}, 3)
