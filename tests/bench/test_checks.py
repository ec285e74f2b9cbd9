"""Every engine says what it computes, and is refused where that is not what its name promises."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tutelage
from families import make_model
from helpers import make_student, tiny
from tutelage.bench import ENGINES
from tutelage.bench._cases import Case, sample
from tutelage.bench._onnx import OnnxRunner, onnx_products
from tutelage.bench._openvino import OpenvinoRunner
from tutelage.bench._torch import TorchRunner, _DynamicInt8, _Packed
from tutelage.bench._workspace import Plan, Workspace
from tutelage.errors import BenchError
from tutelage.kernels import native

WIDTHS = (32, 64)


def two_products(folder: Path, kind: str) -> Path:
    """Writes a graph of two products with constant weights, 32 and 64 inputs wide."""
    random = np.random.default_rng(0)
    weights = [random.standard_normal((64, 32)), random.standard_normal((16, 64))]
    if kind == "openvino":
        import openvino as ov
        from openvino import opset13 as op

        x = y = op.parameter([-1, 32], ov.Type.f32)
        for weight in weights:
            y = op.relu(op.matmul(y, op.constant(weight.astype(np.float32)), False, True))
        ov.save_model(ov.Model([op.result(y)], [x]), folder / "m.xml", compress_to_fp16=False)
        return folder / "m.xml"
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    nodes, name = [], "x"
    for index, _ in enumerate(weights):
        nodes.append(helper.make_node("MatMul", [name, f"w{index}"], [f"p{index}"]))
        nodes.append(helper.make_node("Relu", [f"p{index}"], [name := f"y{index}"]))
    graph = helper.make_graph(
        nodes,
        "two",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(w.T.astype(np.float32), f"w{i}") for i, w in enumerate(weights)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def openvino_runner(file: Path, group: int, **settings: Any) -> OpenvinoRunner:
    made = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
    return OpenvinoRunner(file, made | settings, 1, len(WIDTHS))


@pytest.fixture
def compressed(tmp_path: Path) -> Path:
    openvino = pytest.importorskip("openvino")
    from tutelage.bench._openvino import compress

    model = openvino.Core().read_model(two_products(tmp_path, "openvino"))
    assert compress(model) == list(WIDTHS)
    openvino.save_model(model, tmp_path / "c.xml", compress_to_fp16=False)
    return tmp_path / "c.xml"


def test_openvino_refuses_weights_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    runner = openvino_runner(two_products(tmp_path, "openvino"), 32)
    with pytest.raises(BenchError, match="with f32 weights"):
        runner.check()


def test_openvino_refuses_a_row_shorter_than_the_group(compressed: Path) -> None:
    runner = openvino_runner(compressed, 64)
    assert {p[2] for p in runner.products()} == {"i8"}  # the graph does not show it
    with pytest.raises(BenchError, match="32 inputs in float32 at a group size of 64"):
        runner.check()
    with pytest.raises(BenchError, match="in float32 at a group size of 0"):
        openvino_runner(compressed, 0).check()


def test_openvino_passes_where_every_row_is_quantized(compressed: Path) -> None:
    runner = openvino_runner(compressed, 32)
    assert runner.check() == "2 FullyConnected of i8 weights, inputs quantized"
    assert runner.weight_bytes() >= 64 * 32 + 16 * 64
    assert runner.weight_bytes() < 2 * (64 * 32 + 16 * 64)
    with pytest.raises(BenchError, match="2 products of 3"):
        OpenvinoRunner(compressed, runner.settings, 1, 3).check()


def test_onnx_refuses_products_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = two_products(tmp_path, "onnx")
    with pytest.raises(BenchError, match="in float32, not in int8"):
        OnnxRunner(file, 1, 2).check()


def test_onnx_counts_integer_products(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import quantize_dynamic

    file, made = two_products(tmp_path, "onnx"), tmp_path / "q.onnx"
    quantize_dynamic(str(file), str(made), op_types_to_quantize=["MatMul"], per_channel=True)
    runner = OnnxRunner(made, 1, 2)
    assert runner.check() == "2 integer products in the optimized graph"
    assert 64 * 32 + 16 * 64 <= runner.weight_bytes() < 2 * (64 * 32 + 16 * 64)
    with pytest.raises(BenchError, match="2 products of 3"):
        OnnxRunner(made, 1, 3).check()
    quantize_dynamic(str(file), str(made), op_types_to_quantize=["MatMul"], nodes_to_exclude=[""])
    with pytest.raises(BenchError, match="in float32"):
        OnnxRunner(made, 1, 0).check()


def test_a_weight_behind_constant_nodes_is_found() -> None:
    onnx = pytest.importorskip("onnx")
    helper, TensorProto = onnx.helper, onnx.TensorProto

    weight = helper.make_tensor("w", TensorProto.FLOAT, [2, 2], [1.0, 2.0, 3.0, 4.0])
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"]),
        helper.make_node("MatMul", ["x", "t"], ["y"], name="product"),
        helper.make_node("MatMul", ["y", "y"], ["z"], name="of activations"),
    ]
    graph = helper.make_graph(nodes, "g", [], [], [weight])
    assert onnx_products(graph) == ([], ["product"])


def test_a_tied_head_is_quantized_too(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from tutelage.bench._workspace import Plan, Workspace

    model: Any = make_model("llama-tied").eval()
    model.save_pretrained(tmp_path / "teacher")
    plan = Plan(str(tmp_path), str(tmp_path / "teacher"), ("onnx-int8",), 1, 1)
    (tmp_path / "work").mkdir()
    work = Workspace.start(tmp_path / "work", plan)
    inputs = sample(model, (Case(1, 8),))
    work.store_inputs("sample", inputs)
    ENGINES["onnx-int8"].convert(work)
    runner = ENGINES["onnx-int8"].load(work)
    count = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert runner.check() == f"{count} integer products in the optimized graph"
    exact = TorchRunner(model).output(inputs)
    assert np.linalg.norm(runner.output(inputs) - exact) < 0.1 * np.linalg.norm(exact)


def test_torch_engines_refuse_other_modules() -> None:
    plain = tiny().eval()
    with pytest.raises(BenchError, match="as it was"):
        _DynamicInt8(plain).check()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.ao.quantization.quantize_dynamic(plain, {nn.Linear})
    before = torch.backends.quantized.engine
    try:
        torch.backends.quantized.engine = "x86"
        count = sum(isinstance(m, nn.Linear) for m in plain.modules())
        assert _DynamicInt8(made).check() == f"{count} dynamic int8 Linears, x86"
        linears = [m for m in plain.modules() if isinstance(m, nn.Linear)]
        saved = sum(3 * m.weight.numel() for m in linears)
        assert _DynamicInt8(made).weight_bytes() == TorchRunner(plain).weight_bytes() - saved
        torch.backends.quantized.engine = "onednn"
        with pytest.raises(BenchError, match="'onednn', not x86"):
            _DynamicInt8(made).check()
    finally:
        torch.backends.quantized.engine = before
    with pytest.raises(BenchError, match=r"not in torch\.float32"):
        TorchRunner(_mixed()).check()


def _mixed() -> nn.Module:
    model: Any = tiny().eval()
    model.classifier.bfloat16()
    return model


def test_a_student_that_is_not_packed_is_refused() -> None:
    from helpers import make_student

    with pytest.raises(BenchError, match="is not packed"):
        _Packed(make_student()).check()


def test_weights_are_counted_once_however_often_they_are_shared() -> None:
    model: Any = tiny().eval()
    before = TorchRunner(model).weight_bytes()
    assert before == sum(t.nbytes for t in model.state_dict().values()) + sum(
        b.nbytes for n, b in model.named_buffers() if n not in model.state_dict()
    )
    model.classifier.again = model.classifier.weight
    assert TorchRunner(model).weight_bytes() == before


def test_a_missing_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(ENGINES["openvino-int8"]), "library", ("no_such_library",))
    with pytest.raises(BenchError, match=r"not installed: pip install 'tutelage\[openvino\]'"):
        ENGINES["openvino-int8"].require()


def test_the_fused_engine_counts_its_blocks(tmp_path: Path) -> None:
    if not native().has_block:
        pytest.skip("needs AVX-512 VNNI and a compiler")
    folder = tutelage.save(make_student("bert"), tmp_path / "student")
    plan = Plan(str(folder), None, ("student-fused",), 1, 1)
    (tmp_path / "work").mkdir()
    work = Workspace.start(tmp_path / "work", plan)
    runner = ENGINES["student-fused"].load(work)
    inputs = sample(tutelage.load(folder), (Case(1, 8),))
    runner.output(inputs)
    blocks = len(tutelage.load(folder).bert.encoder.layer)
    assert runner.check().startswith(f"{blocks} fused blocks, ")
    with pytest.raises(BenchError, match="no block of the student is fused"):
        type(runner)(tutelage.load(folder)).check()
