"""OpenVINO files: packed weights in int8 arithmetic, no library of ours to run them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tutelage
from families import make_any_student, make_model
from helpers import inputs_of, make_batch, make_student, tiny
from tutelage.errors import ExportError, OutputExistsError
from tutelage.exporters import _openvino_check as check
from tutelage.exporters._layers import quantized_layers
from tutelage.exporters._openvino_graph import MARK, codes_of
from tutelage.scheme import Rule, Scheme, WeightSpec

ov = pytest.importorskip("openvino")

TOKEN = "DYNAMIC_QUANTIZATION_GROUP_SIZE"


def compiled(path: Path, **properties: str) -> Any:
    settings = {"INFERENCE_NUM_THREADS": 1, **check.COMPILE_PROPERTIES, **properties}
    return ov.Core().compile_model(str(path), "CPU", settings)


def feed(model: Any, batch: dict[str, Tensor]) -> dict[str, Any]:
    known = {value.any_name for value in model.inputs}
    made = {name: tensor.numpy() for name, tensor in batch.items() if name in known}
    if "token_type_ids" in known:
        made["token_type_ids"] = np.zeros_like(made["input_ids"])
    return made


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return torch.from_numpy(model(feed(model, batch))["logits"].copy())


def expect_near(student: Any, model: Any, batch: dict[str, Tensor]) -> None:
    """KL and logits: attention and wide layers are rounded otherwise than by the student."""
    found = logits_of(model, batch)
    with torch.no_grad():
        expected = student(**batch).logits
    assert found.shape == expected.shape
    assert (found - expected).square().mean() < 0.05**2 * expected.square().mean()
    left, right = expected.log_softmax(-1), found.log_softmax(-1)
    assert (left.exp() * (left - right)).sum(-1).mean() < 1e-3


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    student = make_student("bert", layers=1, width=32, heads=4).train()
    path = tmp_path_factory.mktemp("openvino") / "deep" / "model.xml"
    assert tutelage.export(student, path, format="openvino") == path
    assert all(module.training for module in student.modules())
    assert {file.name for file in path.parent.iterdir()} == {"model.xml", "model.bin"}
    return student.eval(), path


@pytest.mark.parametrize("shape", [(8, 7), (1, 1), (1, 36), (6, 3)], ids=str)
def test_logits_are_near_for_any_batch_and_length(
    exported: tuple[Any, Path], shape: tuple[int, int]
) -> None:
    student, path = exported
    expect_near(student, compiled(path), inputs_of(make_batch(*shape, padded=shape[1] > 2)))


def test_padding_changes_nothing(exported: tuple[Any, Path]) -> None:
    model = compiled(exported[1])
    batch = inputs_of(make_batch(2, 6, padded=False))
    wide = {name: torch.nn.functional.pad(tensor, (0, 5)) for name, tensor in batch.items()}
    torch.testing.assert_close(logits_of(model, wide), logits_of(model, batch), atol=1e-5, rtol=0)


def test_every_linear_is_compressed_and_in_int8(exported: tuple[Any, Path]) -> None:
    student, path = exported
    linears = {n for n, x in quantized_layers(student).items() if x.spec.kind == "linear"}
    model = compiled(path)
    batch = inputs_of(make_batch())
    logits_of(model, batch)
    found = check.compressed_layers(model)
    assert set(found) == linears
    assert all(value.endswith(", u2") for value in found.values())
    assert check.executions(path, feed(model, batch)) == dict.fromkeys(linears, "int8")


def test_narrow_linears_compute_what_the_student_does(exported: tuple[Any, Path]) -> None:
    student, path = exported
    model = ov.Core().read_model(path)
    node = next(n for n in model.get_ops() if n.get_friendly_name().endswith(f"query{MARK}"))
    probe = ov.Model([node.input_value(0), node.output(0)], model.get_parameters(), "probe")
    probe.set_rt_info("32", ["runtime_options", TOKEN])
    core = ov.Core().compile_model(probe, "CPU", dict(check.COMPILE_PROPERTIES))
    made = core(feed(model, inputs_of(make_batch())))
    layer = student.get_submodule(node.get_friendly_name().removesuffix(MARK))
    with torch.no_grad():
        expected = layer(torch.from_numpy(made[0].copy())) - layer.bias
    torch.testing.assert_close(torch.from_numpy(made[1].copy()), expected, rtol=1e-5, atol=1e-6)


def test_what_rules_int8_out_is_told(exported: tuple[Any, Path]) -> None:
    _, path = exported
    with pytest.raises(ExportError, match=r"compiled for bf16.*INFERENCE_PRECISION_HINT"):
        check.compressed_layers(_Renamed(compiled(path), "INFERENCE_PRECISION_HINT", "bf16"))
    wide = compiled(path, **{TOKEN: "64"})
    with pytest.raises(ExportError, match=r"SIZE=64 the layer .* of 32 inputs runs in float32"):
        check.compressed_layers(wide)
    batch = feed(wide, inputs_of(make_batch()))
    found = check.executions(path, batch, {**check.COMPILE_PROPERTIES, TOKEN: "64"})
    assert found["bert.encoder.layer.0.attention.self.query"] == "float32"


class _Renamed:
    """A compiled model that reports another value of one property."""

    def __init__(self, model: Any, key: str, value: str) -> None:
        self.model, self.key, self.value = model, key, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def get_property(self, key: str) -> Any:
        if key != self.key:
            return self.model.get_property(key)
        return type("Precision", (), {"to_string": lambda _: self.value})()


def test_plain_models_have_no_compressed_layer() -> None:
    from openvino import opset13 as op

    x = op.parameter([-1, 4], np.float32)
    plain = ov.Model([op.matmul(x, op.constant(np.eye(4, dtype=np.float32)), False, True)], [x])
    with pytest.raises(ExportError, match="no quantized Linear"):
        check.compressed_layers(ov.Core().compile_model(plain, "CPU"))


def test_codes_and_scales_are_those_of_the_student(exported: tuple[Any, Path]) -> None:
    student, path = exported
    layers, seen = quantized_layers(student), 0
    for node in ov.Core().read_model(path).get_ops():
        if node.get_friendly_name().endswith(MARK):
            layer = layers[node.get_friendly_name().removesuffix(MARK)]
            codes, scale = codes_of(node)
            assert np.array_equal(codes, layer.codes.numpy())
            assert np.array_equal(scale, layer.scale.numpy())
            seen += 1
    assert seen == len(layers) - 1


def test_weights_take_two_bits_on_disk(exported: tuple[Any, Path]) -> None:
    student, path = exported
    constants = [n for n in ov.Core().read_model(path).get_ops() if n.get_type_name() == "Constant"]
    packed = [n for n in constants if n.get_element_type().to_string() == "u2"]
    codes = sum(layer.codes.numel() for layer in quantized_layers(student).values())
    assert sum(np.prod(node.get_output_shape(0)) for node in packed) == codes
    plain = sum(p.numel() for n, p in student.named_parameters())
    assert path.with_suffix(".bin").stat().st_size < codes / 4 + 4 * (plain - codes) + 8192


def test_a_fresh_process_needs_openvino_alone(exported: tuple[Any, Path]) -> None:
    _, path = exported
    batch = inputs_of(make_batch())
    expected = logits_of(compiled(path), batch).argmax(-1).tolist()
    code = f"""
import sys, numpy, openvino
model = openvino.Core().compile_model({str(path)!r}, "CPU", {check.COMPILE_PROPERTIES})
assert model.get_property({TOKEN!r}) == 32
ids = numpy.array({batch["input_ids"].tolist()})
mask = numpy.array({batch["attention_mask"].tolist()})
feed = {{"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}}
print(model(feed)["logits"].argmax(-1).tolist())
assert "tutelage" not in sys.modules and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(expected)


def test_files_that_stand_are_kept(exported: tuple[Any, Path], tmp_path: Path) -> None:
    student, path = exported
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        tutelage.export(student, path, format="openvino")
    (tmp_path / "model.bin").touch()
    with pytest.raises(OutputExistsError, match=r"model\.bin exists"):
        tutelage.export(student, tmp_path / "model.xml", format="openvino")
    assert path.read_bytes() == before


@pytest.mark.parametrize(("preset", "bits"), [("w2-a8", "i4"), ("binary-a8", "u2")])
def test_other_weights_are_packed_too(preset: str, bits: str, tmp_path: Path) -> None:
    student = make_student("roberta", preset, layers=1, width=32, heads=4).eval()
    path = tmp_path / "model.xml"
    tutelage.export(student, path, format="openvino", quantized_attention=True)
    model = compiled(path)
    expect_near(student, model, inputs_of(make_batch()))
    assert {value[-2:] for value in check.compressed_layers(model).values()} == {bits}


def test_a_decoder_with_a_tied_head_and_a_window(tmp_path: Path) -> None:
    student = make_any_student("gemma3").eval()
    path = tutelage.export(student, tmp_path / "model.xml", format="openvino")
    model = compiled(path)
    expect_near(student, model, inputs_of(make_batch()))
    assert "lm_head" in check.compressed_layers(model)


def test_images_and_unquantized_activations(tmp_path: Path) -> None:
    weight = WeightSpec(kind="ternary")
    scheme = Scheme(name="w", weight=weight, rules=(Rule(pattern=".*projection", weight=weight),))
    student = tutelage.prepare(make_model("vit"), scheme).eval()
    path = tutelage.export(student, tmp_path / "model.xml", format="openvino")
    model = compiled(path)
    pixels = {"pixel_values": torch.randn(5, 3, 16, 16)}
    with torch.no_grad():
        expected = student(**pixels).logits
    torch.testing.assert_close(logits_of(model, pixels), expected, rtol=1e-4, atol=1e-5)
    assert any("projection" in name for name in check.compressed_layers(model))


@pytest.mark.parametrize(
    ("preset", "shape", "message"),
    [
        ("ternary-a4", {}, "rounded otherwise than to 8 bits.*format='onnx'"),
        ("reference", {}, "one scale per token and no clipping.*format='onnx'"),
        ("ternary-a8", {"width": 15, "heads": 3}, "has 15 inputs.*at least 16.*format='onnx'"),
    ],
)
def test_what_openvino_cannot_round_is_refused(
    preset: str, shape: dict[str, int], message: str, tmp_path: Path
) -> None:
    student = make_student("bert", preset, layers=1, **({"width": 32, "heads": 4} | shape))
    with pytest.raises(ExportError, match=message):
        tutelage.export(student, tmp_path / "model.xml", format="openvino")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_expressed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.xml"
    with pytest.raises(ExportError, match=r"model\.onnx is no \.xml file"):
        tutelage.export(tiny(), path.with_suffix(".onnx"), format="openvino")
    with pytest.raises(ExportError, match="an encoder and a decoder"):
        tutelage.export(make_any_student("t5"), path, format="openvino")
    with pytest.raises(tutelage.errors.UnsupportedModelError, match="neither a student nor"):
        tutelage.export(tiny(), path, format="openvino")
    assert not list(tmp_path.iterdir())


def test_a_wrong_graph_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tutelage.exporters import _openvino

    student = make_student("bert", layers=1, width=32, heads=4).eval()
    path = tmp_path / "model.xml"
    with monkeypatch.context() as patch:
        patch.setattr(_openvino, "group_size", lambda _: 64)
        with pytest.raises(ExportError, match="in float32 on this machine, not in int8"):
            tutelage.export(student, path, format="openvino")
    other = copy.deepcopy(student)
    with torch.no_grad():
        other.classifier.weight.neg_()
    made = _openvino.graph_of
    monkeypatch.setattr(
        _openvino, "graph_of", lambda _, *args, **kwargs: made(other, *args, **kwargs)
    )
    with pytest.raises(ExportError, match="off the student's"):
        tutelage.export(student, path, format="openvino")
    assert not list(tmp_path.iterdir())


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ExportError, match=r"pip install 'tutelage\[openvino\]'"):
        tutelage.export(tiny(), tmp_path / "m.xml", format="openvino")
