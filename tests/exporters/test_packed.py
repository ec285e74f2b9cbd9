"""Packed models written anew: the same codes in another encoding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tutelage
from families import make_any_student
from helpers import FAMILIES, logits_of, make_batch, make_student, same_bits
from tutelage import cli
from tutelage.errors import ExportError, SchemeError, UnsupportedModelError


@pytest.mark.parametrize("family", [*FAMILIES, "llama-tied"])
@pytest.mark.parametrize("rest", ["float32", "bfloat16"])
def test_a_loaded_model_writes_the_files_of_its_student(
    family: str, rest: str, tmp_path: Path
) -> None:
    student = make_student(family) if family in FAMILIES else make_any_student(family)
    tutelage.save(student, tmp_path / "bits")
    expected = tutelage.save(student, tmp_path / "expected", encoding="base3", rest=rest)
    loaded = tutelage.load(tmp_path / "bits")
    made = tutelage.export(loaded, tmp_path / "made", format="packed", encoding="base3", rest=rest)
    wanted, found = (load_file(folder / "model.safetensors") for folder in (expected, made))
    assert wanted.keys() == found.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in wanted.items())
    back = tutelage.export(tutelage.load(made), tmp_path / "back", format="packed")
    small, large = (
        load_file(back / "model.safetensors"),
        load_file(tmp_path / "bits/model.safetensors"),
    )
    codes = [name for name, tensor in large.items() if tensor.dtype == torch.uint8]
    assert codes
    assert all(same_bits(small[name], large[name]) for name in codes)
    assert (
        json.loads((back / "config.json").read_text())["quantization_config"]["encoding"] == "bits"
    )


def test_the_model_in_memory_and_its_card_stay_right(tmp_path: Path) -> None:
    loaded = tutelage.load(tutelage.save(make_student("bert"), tmp_path / "bits"))
    before = logits_of(loaded, make_batch())
    made = tutelage.save(loaded, tmp_path / "made", encoding="base3")
    assert same_bits(logits_of(loaded, make_batch()), before)
    assert same_bits(logits_of(tutelage.load(made), make_batch()), before)
    size = (made / "model.safetensors").stat().st_size
    card = (made / "README.md").read_text()
    assert "scheme `ternary-a8`" in card
    assert f"{size:,} bytes of weights" in card


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    loaded = tutelage.load(tutelage.save(make_student("bert", "binary-a8"), tmp_path / "bits"))
    with pytest.raises(SchemeError, match="no ternary weight"):
        tutelage.save(loaded, tmp_path / "made", encoding="base3")
    with pytest.raises(UnsupportedModelError, match="is not prepared"):
        tutelage.save(torch.nn.Linear(2, 2), tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_options_of_formats_are_checked(tmp_path: Path) -> None:
    loaded = tutelage.load(tutelage.save(make_student("bert"), tmp_path / "bits"))
    with pytest.raises(ExportError, match=r"no option 'encodin'.*Did you mean 'encoding'"):
        tutelage.export(loaded, tmp_path / "x", format="packed", encodin="base3")
    with pytest.raises(ExportError, match="quantized_attention is 'no'; use true or false"):
        tutelage.export(loaded, tmp_path / "x", format="onnx", quantized_attention="no")


def test_the_command_takes_options(tmp_path: Path) -> None:
    folder = tutelage.save(make_student("bert"), tmp_path / "bits")
    command = ["export", str(folder), "--format", "packed", "--output", str(tmp_path / "made")]
    cli.app([*command, "--option", "encoding=base3"], standalone_mode=False)
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    assert config["quantization_config"]["encoding"] == "base3"
    with pytest.raises(ExportError, match="'encoding' has no value"):
        cli.app([*command, "--option", "encoding"], standalone_mode=False)
