"""ONNX files: the integers of the student, 2 bits a weight, no library of ours to run them."""

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
from transformers import GPT2Config, GPT2LMHeadModel

import tutelage
from families import make_any_student, make_model
from helpers import VOCAB, inputs_of, make_batch, make_student, redraw, tiny
from tutelage.errors import ExportError, OutputExistsError
from tutelage.exporters import _onnx, _onnx_graph
from tutelage.exporters._layers import quantized_layers
from tutelage.exporters._onnx_modules import substitute
from tutelage.scheme import ActivationSpec, Rule, Scheme, WeightSpec

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def open_session(model: Any) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(session: Any, batch: dict[str, Tensor], names: list[str] | None = None) -> list[Any]:
    known = {value.name for value in session.get_inputs()}
    feed = {name: tensor.numpy() for name, tensor in batch.items() if name in known}
    if "token_type_ids" in known and "token_type_ids" not in feed:
        feed["token_type_ids"] = np.zeros_like(feed["input_ids"])
    return list(session.run(names, feed))


def expect_logits(student: Any, session: Any, batch: dict[str, Tensor], within: float) -> None:
    with torch.no_grad():
        expected = student(**batch).logits
    found = torch.from_numpy(run(session, batch)[0])
    assert found.shape == expected.shape
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    torch.testing.assert_close(found, expected, rtol=within, atol=within)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    student = make_student("bert", layers=1).eval()
    path = tmp_path_factory.mktemp("onnx") / "deep" / "model.onnx"
    student.train()
    assert tutelage.export(student, path, format="onnx") == path
    assert all(module.training for module in student.modules())
    assert [file.name for file in path.parent.iterdir()] == ["model.onnx"]
    return student.eval(), path


@pytest.mark.parametrize("shape", [(4, 7), (1, 1), (1, 36), (6, 3)], ids=str)
def test_logits_are_the_students_for_any_batch_and_length(
    exported: tuple[Any, Path], shape: tuple[int, int]
) -> None:
    student, path = exported
    batch = inputs_of(make_batch(*shape, padded=shape[1] > 2))
    expect_logits(student, open_session(path), batch, within=1e-5)


def test_padding_changes_nothing(exported: tuple[Any, Path]) -> None:
    session = open_session(exported[1])
    batch = inputs_of(make_batch(2, 6, padded=False))
    wide = {name: torch.nn.functional.pad(tensor, (0, 5)) for name, tensor in batch.items()}
    np.testing.assert_allclose(run(session, wide)[0], run(session, batch)[0], atol=1e-5)


def test_every_product_is_that_of_the_students_integers(exported: tuple[Any, Path]) -> None:
    student, path = exported
    model = onnx.load(path)
    products = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
    layers = {n: x for n, x in quantized_layers(student).items() if x.spec.kind == "linear"}
    assert len(products) == len(layers)
    wanted = [name for node in products for name in (node.input[0], node.output[0])]
    for name in dict.fromkeys(wanted):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    found = run(open_session(model), inputs_of(make_batch()), wanted)
    seen = set()
    for index, node in enumerate(products):
        x, y = found[2 * index].astype(np.int64) - 128, found[2 * index + 1]
        name = node.input[1].removesuffix(".codes_int8.transposed")
        assert np.array_equal(y, x @ layers[name].codes.numpy().T.astype(np.int64))
        assert np.abs(x).max() == 127
        seen.add(name)
    assert seen == set(layers)


def test_inputs_are_rounded_as_the_student_rounds_them(exported: tuple[Any, Path]) -> None:
    _student, path = exported
    model = onnx.load(path)
    product = next(n for n in model.graph.node if n.op_type == "MatMulInteger")
    assert ".query" in product.input[1]
    made = {output: node for node in model.graph.node for output in node.output}
    q = made[made[product.input[0]].input[0]].input[0]
    codes = made[q]
    assert codes.op_type == "Round"
    x = made[codes.input[0]].input[0]
    for name in (x, q):
        model.graph.output.append(onnx.ValueInfoProto(name=name))
    inputs, found = run(open_session(model), inputs_of(make_batch()), [x, q])
    expected = ActivationSpec().build().quantize(torch.from_numpy(inputs)).codes
    assert torch.equal(torch.from_numpy(found), expected)


def test_weights_take_two_bits_on_disk(exported: tuple[Any, Path]) -> None:
    student, path = exported
    stored = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    for name, layer in quantized_layers(student).items():
        tensor = stored[f"{name}.codes"]
        assert tensor.data_type == onnx.TensorProto.INT2
        assert len(tensor.raw_data) == -(-layer.codes.numel() // 4)
    widest = max(len(t.raw_data) for t in stored.values() if t.data_type == onnx.TensorProto.FLOAT)
    assert widest <= 4 * 40 * 15  # position embeddings


def test_the_file_names_what_it_needs(exported: tuple[Any, Path]) -> None:
    model = onnx.load(exported[1])
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 25)]
    assert model.ir_version == 13
    assert [i.name for i in model.graph.input] == ["input_ids", "attention_mask", "token_type_ids"]
    axes = [d.dim_param for d in model.graph.input[1].type.tensor_type.shape.dim]
    assert axes == ["batch", "tokens"]
    assert [value.name for value in model.graph.output] == ["logits"]
    assert b"site-packages" not in exported[1].read_bytes()
    assert str(Path(__file__).parents[2]).encode() not in exported[1].read_bytes()


def test_a_fresh_process_needs_onnxruntime_alone(exported: tuple[Any, Path]) -> None:
    student, path = exported
    batch = inputs_of(make_batch())
    with torch.no_grad():
        expected = student(**batch).logits.argmax(-1).tolist()
    code = f"""
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession({str(path)!r}, providers=["CPUExecutionProvider"])
ids = numpy.array({batch["input_ids"].tolist()})
mask = numpy.array({batch["attention_mask"].tolist()})
feed = {{"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}}
print(session.run(["logits"], feed)[0].argmax(-1).tolist())
assert "tutelage" not in sys.modules and "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(expected)


def test_files_that_stand_are_kept(exported: tuple[Any, Path], tmp_path: Path) -> None:
    student, path = exported
    before = path.read_bytes()
    with pytest.raises(OutputExistsError, match="overwrite=True"):
        tutelage.export(student, path, format="onnx")
    with pytest.raises(OutputExistsError, match="is a folder"):
        tutelage.export(student, tmp_path, format="onnx", overwrite=True)
    assert path.read_bytes() == before


def four_levels_and_four_bits() -> Scheme:
    token, weight = ActivationSpec(bits=4), WeightSpec(kind="four-level")
    attention = Scheme.preset("binary-a4").attention
    return Scheme(weight=weight, input=token, embedding=weight, attention=attention)


@pytest.mark.parametrize("scheme", [four_levels_and_four_bits(), Scheme.preset("reference")])
def test_other_schemes_are_exact_too(scheme: Scheme, tmp_path: Path) -> None:
    student = tutelage.prepare(tiny("roberta", layers=1), scheme).eval()
    path = tutelage.export(student, tmp_path / "model.onnx", format="onnx")
    expect_logits(student, open_session(path), inputs_of(make_batch()), within=2e-5)


def test_a_tied_head_and_its_embedding_are_stored_once(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=VOCAB, n_positions=40, n_embd=32, n_layer=1, n_head=4)
    model = GPT2LMHeadModel(config)
    redraw(model)
    student = tutelage.prepare(model, Scheme.preset("ternary-a8")).eval()
    path = tutelage.export(student, tmp_path / "model.onnx", format="onnx")
    stored = [t for t in onnx.load(path).graph.initializer if t.data_type == onnx.TensorProto.INT2]
    tables = [tensor.name for tensor in stored if tensor.dims[0] == VOCAB]
    assert tables == ["transformer.wte.codes"]
    expect_logits(student, open_session(path), inputs_of(make_batch()), within=1e-4)


def test_images_and_unquantized_activations(tmp_path: Path) -> None:
    weight = WeightSpec(kind="ternary")
    plain = Scheme(name="w", weight=weight, rules=(Rule(pattern=".*projection", weight=weight),))
    student = tutelage.prepare(make_model("vit"), plain).eval()
    path = tutelage.export(student, tmp_path / "model.onnx", format="onnx")
    stored = {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}
    codes = [kind for name, kind in stored.items() if "projection.codes" in name]
    assert codes == [onnx.TensorProto.INT2]
    pixels = {"pixel_values": torch.randn(5, 3, 16, 16)}
    expect_logits(student, open_session(path), pixels, within=1e-5)


def test_the_kernel_for_few_tokens_is_near(tmp_path: Path) -> None:
    student = make_student("bert", "binary-a8", layers=1).eval()
    path = tmp_path / "model.onnx"
    tutelage.export(student, path, format="onnx", kernel="matmulnbits", quantized_attention=False)
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 7
    batch = inputs_of(make_batch())
    found = torch.from_numpy(run(open_session(path), batch)[0])
    with torch.no_grad():
        expected = student(**batch).logits
    assert (found - expected).square().mean() < 0.02 * expected.square().mean()


def test_what_cannot_be_expressed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    student = make_student("bert", "w2-a8", layers=1).eval()
    with pytest.raises(ExportError, match=r"no kernel 'matmulint'.*Did you mean 'matmulinteger'"):
        tutelage.export(student, path, format="onnx", kernel="matmulint")
    with pytest.raises(ExportError, match=r"four levels.*kernel='matmulinteger'"):
        tutelage.export(student, path, format="onnx", kernel="matmulnbits")
    with pytest.raises(ExportError, match="an encoder and a decoder"):
        tutelage.export(make_any_student("t5"), path, format="onnx")
    with pytest.raises(tutelage.errors.UnsupportedModelError, match="neither a student nor"):
        tutelage.export(tiny(), path, format="onnx")
    assert not path.exists()


def test_a_wrong_graph_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student = make_student("distilbert", layers=1).eval()
    path, right = tmp_path / "model.onnx", _onnx_graph._two_bits
    graph = _onnx.graph_of(student, lambda x, m: substitute(x, m, "matmulinteger"), attention=True)
    made = _onnx._convert(graph)
    monkeypatch.setattr(_onnx, "_convert", lambda _: copy.deepcopy(made))
    with monkeypatch.context() as patch:
        patch.setattr(_onnx_graph, "_two_bits", lambda codes: right(codes.flip(0)))
        with pytest.raises(ExportError, match=r"multiplies the layer .* wrongly"):
            tutelage.export(student, path, format="onnx")
    other = copy.deepcopy(student)
    with torch.no_grad():
        other.classifier.weight.neg_()
    with pytest.raises(ExportError, match="off the student's"):
        tutelage.export(other, path, format="onnx")
    assert not list(tmp_path.iterdir())
    assert tutelage.export(student, path, format="onnx").is_file()


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ExportError, match=r"onnx is not installed; pip install 'tutelage\[onnx\]'"):
        tutelage.export(make_student("bert", layers=1), tmp_path / "m.onnx", format="onnx")
