"""Base-3 bytes, and a rest in bfloat16: smaller files, the same codes and scales."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

import tutelage
from families import make_any_student, make_model, output_of
from helpers import FAMILIES, PRESETS, logits_of, make_batch, make_student, same_bits
from tutelage.artefacts import weight_bytes
from tutelage.artefacts._pack import digest, weights_digest
from tutelage.artefacts._reader import read_header
from tutelage.artefacts._verify import metadata_of
from tutelage.errors import ArtefactError, SchemeError
from tutelage.nn import PackedWeight
from tutelage.scheme import ActivationSpec, Rule, WeightSpec

TERNARY = [preset for preset in PRESETS if preset.startswith("ternary") or preset == "reference"]
WORD = "bert.embeddings.word_embeddings.weight"


def bits_of(model: Any) -> dict[str, torch.Tensor]:
    """The bytes of every module that holds some."""
    return {
        name: module.packed()[0]
        for name, module in model.named_modules()
        if isinstance(module, PackedWeight)
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("preset", TERNARY)
def test_base_3_loads_as_what_bits_load(family: str, preset: str, tmp_path: Path) -> None:
    student = make_student(family, preset)
    tutelage.save(student, tmp_path / "bits")
    tutelage.save(student, tmp_path / "base3", encoding="base3")
    small, large = (load_file(tmp_path / f / "model.safetensors") for f in ("base3", "bits"))
    assert small.keys() == large.keys()
    for name, tensor in small.items():
        if tensor.dtype == torch.uint8:
            assert len(tensor) < len(large[name])
        else:
            assert same_bits(tensor, large[name])
    one, other = tutelage.load(tmp_path / "bits"), tutelage.load(tmp_path / "base3")
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base3")
    for model in (other, auto):
        assert one.state_dict().keys() == model.state_dict().keys()
        for name, tensor in small.items():
            assert same_bits(model.state_dict()[name], tensor)
        want = bits_of(one)
        for name, rows in bits_of(model).items():
            assert same_bits(rows, want[name])
        assert same_bits(logits_of(model, make_batch()), logits_of(student, make_batch()))


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "bart-scaled", "albert-mlm", "t5"])
def test_shared_transposed_and_scaled_weights(name: str, tmp_path: Path) -> None:
    student = make_any_student(name)
    tutelage.save(student, tmp_path / "out", encoding="base3")
    loaded = tutelage.load(tmp_path / "out")
    assert same_bits(output_of(loaded), output_of(student))


def test_a_patch_embedding(tmp_path: Path) -> None:
    rule = Rule(
        pattern=r".*patch_embeddings\.projection",
        weight=WeightSpec(kind="ternary"),
        input=ActivationSpec(),
    )
    scheme = tutelage.Scheme.preset("ternary-a8").model_copy(update={"rules": (rule,)})
    student = tutelage.prepare(make_model("vit"), scheme)
    tutelage.save(student, tmp_path / "out", encoding="base3")
    loaded = tutelage.load(tmp_path / "out")
    assert same_bits(output_of(loaded), output_of(student))


def test_saved_again_in_the_encoding_it_came_in(tmp_path: Path) -> None:
    tutelage.save(make_student(), tmp_path / "out", encoding="base3", rest="bfloat16")
    tutelage.load(tmp_path / "out").save_pretrained(tmp_path / "again")
    one, other = tmp_path / "out", tmp_path / "again"
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    # The order of the metadata is safetensors' own, and differs from save to save.
    before, after = (read_header(folder / "model.safetensors") for folder in (one, other))
    assert (before.metadata, before.tensors) == (after.metadata, after.tensors)


def test_the_card_and_summary_tell_the_size(tmp_path: Path) -> None:
    student = make_student()
    for encoding in ("bits", "base3"):
        for rest in ("float32", "bfloat16"):
            folder = tmp_path / f"{encoding}-{rest}"
            tutelage.save(student, folder, encoding=encoding, rest=rest)
            told = tutelage.summary(student, encoding, rest).packed_bytes
            file = folder / "model.safetensors"
            length = int.from_bytes(file.read_bytes()[:8], "little")
            assert weight_bytes(folder) - 8 - length == told
            assert f"{told:,} bytes" in (folder / "README.md").read_text()


def test_defaults_are_untouched_by_an_earlier_save(tmp_path: Path) -> None:
    student = make_student()
    tutelage.save(student, tmp_path / "small", encoding="base3", rest="bfloat16")
    student.save_pretrained(tmp_path / "default")
    section = json.loads((tmp_path / "default" / "config.json").read_text())["quantization_config"]
    assert (section["encoding"], section["rest"]) == ("bits", "float32")
    loaded = tutelage.load(tmp_path / "default")
    assert same_bits(logits_of(loaded, make_batch()), logits_of(student, make_batch()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rest_in_bfloat16_is_the_student_with_it_rounded(family: str, tmp_path: Path) -> None:
    student = make_student(family)
    tutelage.save(student, tmp_path / "out", rest="bfloat16")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    dtypes = {tensor.dtype for name, tensor in stored.items() if "weight_scale" not in name}
    assert dtypes == {torch.uint8, torch.bfloat16}
    loaded = tutelage.load(tmp_path / "out")
    auto = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    quantized = {name for name, tensor in stored.items() if tensor.dtype == torch.uint8}
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if name not in quantized:
                parameter.copy_(parameter.bfloat16().float())
    want = logits_of(student, make_batch())
    assert same_bits(logits_of(loaded, make_batch()), want)
    assert same_bits(logits_of(auto, make_batch()), want)


def test_a_tied_rest_is_stored_once(tmp_path: Path) -> None:
    rule = Rule(pattern=r".*embed_tokens")
    scheme = tutelage.Scheme.preset("ternary-a8").model_copy(update={"rules": (rule,)})
    student = tutelage.prepare(make_model("llama-tied"), scheme)
    tutelage.save(student, tmp_path / "out", rest="bfloat16")
    loaded = tutelage.load(tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "base-3"}, r"no encoding 'base-3'; use 'bits' or 'base3'\. Did you mean"),
        ({"rest": "int8"}, r"no dtype of the rest 'int8'; use 'float32' or 'bfloat16'"),
    ],
)
def test_unknown_options(options: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match=message):
        tutelage.save(make_student(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", ["binary-a8", "w2-a8"])
def test_base_3_without_a_ternary_weight_is_refused(preset: str, tmp_path: Path) -> None:
    with pytest.raises(SchemeError, match="no ternary weight"):
        tutelage.save(make_student("bert", preset), tmp_path / "out", encoding="base3")


def forge(folder: Path, change: Any) -> None:
    """Changes tensors and configuration, and signs them anew."""
    tensors = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    change(tensors, config)
    digests = {name: digest(t) for name, t in tensors.items()}
    config["quantization_config"]["weights"] = weights_digest(digests)
    (folder / "config.json").write_text(json.dumps(config))
    metadata = metadata_of(digests, config, 3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"} | metadata)


@pytest.mark.parametrize(("encoding", "value"), [("base3", 243), ("base3", 255), ("bits", 3)])
def test_bytes_that_are_no_codes_are_refused(encoding: Any, value: int, tmp_path: Path) -> None:
    folder = tutelage.save(make_student(), tmp_path / "out", encoding=encoding)
    forge(folder, lambda tensors, _: None)
    tutelage.load(folder)
    forge(folder, lambda tensors, _: tensors[WORD].__setitem__(0, value))
    for load in (tutelage.load, AutoModelForSequenceClassification.from_pretrained):
        with pytest.raises(ArtefactError, match=f"'{WORD}' holds bytes that are no codes"):
            load(folder)


@pytest.mark.parametrize("key", ["encoding", "rest"])
def test_an_encoding_of_the_future_is_refused(key: str, tmp_path: Path) -> None:
    folder = tutelage.save(make_student(), tmp_path / "out")
    forge(folder, lambda _, config: config["quantization_config"].update({key: "base7"}))
    with pytest.raises(ArtefactError, match=r"'base7'.*which this library does not know"):
        tutelage.load(folder)
