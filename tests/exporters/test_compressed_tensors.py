"""Folders that plain transformers loads through compressed-tensors, in a process of their own."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tutelage
from families import make_any_student, make_inputs, make_model
from helpers import inputs_of, make_batch, make_student, make_tokenizer, tiny
from tutelage.errors import ExportError, OutputExistsError
from tutelage.exporters._compressed_tensors import pack_int32
from tutelage.exporters._layers import quantized_layers, twin
from tutelage.scheme import Rule, Scheme

pytest.importorskip("compressed_tensors")

CASES = {
    "bert": (lambda: make_student("bert"), "quantized"),
    "bert-a4": (lambda: make_student("bert", "ternary-a4"), "quantized"),
    "distilbert-binary": (lambda: make_student("distilbert", "binary-a8"), "quantized"),
    "roberta-w2": (lambda: make_student("roberta", "w2-a8"), "float"),
    "reference": (lambda: make_student("bert", "reference"), "float"),
    "llama-tied": (lambda: tied_llama(), "quantized"),
    "gemma": (lambda: make_any_student("gemma"), "quantized"),
    "vit": (lambda: vit(), "quantized"),
}

LOADS = """
import json, sys, torch, transformers

told = {}
for folder in sys.argv[2:]:
    config = json.load(open(f"{folder}/config.json"))
    cls = getattr(transformers, config["architectures"][0])
    model, report = cls.from_pretrained(folder, output_loading_info=True)
    inputs = torch.load(f"{folder}.inputs")
    with torch.no_grad():
        logits = model.eval()(**inputs).logits
    base, of_base = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        base.eval()(**inputs)
    told[folder] = {
        "problems": sorted(map(str, (v for v in report.values() if v))),
        "missing": sorted(of_base["missing_keys"]),
        "base": {name: p for name, p in base.state_dict().items()},
        "state": model.state_dict(),
        "logits": logits,
    }
torch.save(told, sys.argv[1])
assert "tutelage" not in sys.modules
"""


def tied_llama() -> Any:
    """A student of a Llama whose head is its embedding."""
    model = make_model("llama")
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    tied = type(model)(config).eval()
    return tutelage.prepare(tied, Scheme.preset("ternary-a8"))


def vit() -> Any:
    """A student of a ViT with a ternary patch embedding."""
    base = Scheme.preset("ternary-a8")
    rule = Rule(pattern=".*patch_embeddings.projection", weight=base.weight, input=base.input)
    return tutelage.prepare(make_model("vit"), base.model_copy(update={"rules": (rule,)}))


def inputs_for(name: str) -> dict[str, Tensor]:
    if name in ("gemma", "vit"):
        return make_inputs(name)
    batch = inputs_of(make_batch())
    return {"input_ids": batch["input_ids"]} if "llama" in name else batch


@pytest.fixture(scope="module")
def students() -> dict[str, Any]:
    return {name: make().eval() for name, (make, _) in CASES.items()}


@pytest.fixture(scope="module")
def folders(students: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("folders"), {}
    for name, (_, activations) in CASES.items():
        made[name] = root / name
        written = tutelage.export(
            students[name],
            made[name],
            format="compressed-tensors",
            processor=None if name == "vit" else make_tokenizer(),
            activations=activations,
        )
        assert written == made[name]
        torch.save(inputs_for(name), f"{made[name]}.inputs")
    return made


@pytest.fixture(scope="module")
def loaded(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What a process without tutelage sees in every folder."""
    file = next(iter(folders.values())).parent / "told"
    done = subprocess.run(
        [sys.executable, "-c", LOADS, str(file), *map(str, folders.values())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = torch.load(file)
    return {name: told[str(folder)] for name, folder in folders.items()}


@pytest.mark.parametrize("name", CASES)
def test_weights_are_bit_exact_and_nothing_is_drawn(
    name: str, students: dict[str, Any], loaded: dict[str, dict[str, Any]]
) -> None:
    told = loaded[name]
    assert told["problems"] == []
    want = twin(students[name]).state_dict()
    assert want.keys() - told["state"].keys() == set()
    for key, tensor in want.items():
        assert torch.equal(told["state"][key], tensor), key
    for layer in quantized_layers(students[name]).values():
        values = layer.codes.double() * layer.scale.double()
        got = told["state"][f"{layer.name}.weight"].reshape(values.shape)
        assert torch.equal(got, values.float())


@pytest.mark.parametrize("name", CASES)
def test_a_model_without_the_head_finds_its_weights(
    name: str, students: dict[str, Any], loaded: dict[str, dict[str, Any]]
) -> None:
    # A classifier has no pooler of the base model where the family does without one.
    assert [key for key in loaded[name]["missing"] if "pooler" not in key] == []
    prefix = f"{students[name].base_model_prefix}."
    for layer in quantized_layers(students[name]).values():
        if layer.name.startswith(prefix) and "patch" not in layer.name:
            got = loaded[name]["base"][f"{layer.name.removeprefix(prefix)}.weight"]
            assert torch.equal(got, layer.values)


def stepped(model: nn.Module, student: nn.Module) -> nn.Module:
    """Quantizes inputs row by row as compressed-tensors defines it."""

    def hook(bits: int) -> Any:
        def quantize(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            made = inputs[0].clone()
            for row in made.view(-1, made.shape[-1]):
                scale = row.abs().max() / (2 ** (bits - 1) - 0.5)
                codes = torch.round(row / scale) if scale > 0 else torch.zeros_like(row)
                row.copy_(codes.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale)
            return (made, *inputs[1:])

        return quantize

    for name, layer in quantized_layers(student).items():
        if layer.spec.input is not None and layer.spec.kind == "linear":
            model.get_submodule(name).register_forward_pre_hook(hook(layer.spec.input.bits))
    return model


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_is_documented(
    name: str, students: dict[str, Any], loaded: dict[str, dict[str, Any]]
) -> None:
    model = twin(students[name])
    if CASES[name][1] == "quantized":
        model = stepped(model, students[name])
    with torch.no_grad():
        want = model(**inputs_for(name)).logits
    torch.testing.assert_close(loaded[name]["logits"], want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["bert", "distilbert-binary", "llama-tied", "vit"])
def test_it_is_close_to_the_student(
    name: str, students: dict[str, Any], loaded: dict[str, dict[str, Any]]
) -> None:
    with torch.no_grad():
        want = students[name](**inputs_for(name)).logits
    p, q = want.log_softmax(-1), loaded[name]["logits"].log_softmax(-1)
    assert float((p.exp() * (p - q)).sum(-1).mean()) < 0.01


@pytest.mark.parametrize(
    ("name", "bits"), [("bert", 2), ("distilbert-binary", 2), ("llama-tied", 2), ("roberta-w2", 4)]
)
def test_bits_on_disk(name: str, bits: int, folders: dict[str, Path], students: Any) -> None:
    state = load_file(folders[name] / "model.safetensors")
    for layer in quantized_layers(students[name]).values():
        rows, width = layer.codes.shape
        if layer.spec.kind == "embedding":
            assert state[f"{layer.name}.weight"].dtype == torch.int8
        else:
            assert state[f"{layer.name}.weight_packed"].shape == (rows, -(-width * bits // 32))
            assert state[f"{layer.name}.weight_shape"].tolist() == [rows, width]
        assert state[f"{layer.name}.weight_scale"].shape == (rows, 1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_hold_the_codes_lowest_bits_first(bits: int) -> None:
    made = torch.Generator().manual_seed(bits)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, (5, 37), generator=made, dtype=torch.int8)
    words = pack_int32(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (5, -(-37 * bits // 32))
    for row in range(5):
        stream = b"".join(int(word).to_bytes(4, "little", signed=True) for word in words[row])
        number = int.from_bytes(stream, "little")
        for column in range(37):
            got = (number >> (bits * column)) & (2**bits - 1)
            assert got + low == codes[row, column]
        assert number >> (bits * 37) == 0


def test_the_configuration_is_that_of_nobody_but_the_format(folders: dict[str, Path]) -> None:
    config = json.loads((folders["llama-tied"] / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    assert "fusion_config" not in config
    section = config["quantization_config"]
    assert section["quant_method"] == "compressed-tensors"
    assert "tutelage" not in json.dumps(config)
    assert (folders["bert"] / "tokenizer.json").is_file()


def test_what_the_format_has_no_word_for_is_refused(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(ExportError, match=r"'transformer\.h\.0\.attn\.c_attn' is a Conv1D.*onnx"):
        tutelage.export(make_any_student("gpt2"), target, format="compressed-tensors")
    for family, why in (
        ("dinov2", "Dinov2ForImageClassification: its code"),  # why differs by version
        ("t5", "T5ForConditionalGeneration: its code wants unpacked weights"),
        ("modernbert", "ModernBertForSequenceClassification: its code wants unpacked weights"),
    ):
        with pytest.raises(ExportError, match=f"could not load a packed {why}"):
            tutelage.export(make_any_student(family), target, format="compressed-tensors")
    student = make_student("bert", "reference")
    with pytest.raises(ExportError, match=r"no clipped activations.*activations='float'"):
        tutelage.export(student, target, format="compressed-tensors")
    with pytest.raises(ExportError, match=r"activations is 'int8'; use"):
        tutelage.export(student, target, format="compressed-tensors", activations="int8")
    assert list(tmp_path.iterdir()) == []
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(OutputExistsError):
        tutelage.export(make_student(), target, format="compressed-tensors")


def test_weight_only_students_and_packed_models_are_the_same_to_it(tmp_path: Path) -> None:
    plain = Scheme(name="w", weight=Scheme.preset("ternary-a8").weight)
    student = tutelage.prepare(tiny("bert"), plain).eval()
    packed = tutelage.load(tutelage.save(student, tmp_path / "packed"))
    for name, model in (("a", student), ("b", packed)):
        tutelage.export(model, tmp_path / name, format="compressed-tensors")
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)
    section = json.loads((tmp_path / "a" / "config.json").read_text())["quantization_config"]
    assert section["format"] == "pack-quantized"
    assert section["config_groups"]["group_0"]["input_activations"] is None
