"""ONNX Runtime: dynamic int8 of the teacher."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import BenchError
from ._cases import Inputs
from ._engine import Engine, Runner
from ._models import first_line, load_plain, trace
from ._workspace import Workspace

__all__ = ["OnnxRunner", "onnx_products"]

_INTEGER = {
    "DynamicQuantizeMatMul": 1,
    "MatMulInteger": 1,
    "MatMulIntegerToFloat": 1,
    "MatMulNBits": 1,
    "QGemm": 3,
    "QLinearMatMul": 3,
}
"""Operators whose product is of integers, and which of their inputs is the weight."""

_FLOAT = {"FusedGemm": 1, "FusedMatMul": 1, "Gemm": 1, "MatMul": 1}
_LARGE = 1_800_000_000
_QUIET = 3


def onnx_products(graph: Any) -> tuple[list[str], list[str]]:
    """Returns the products with constant weights: integer ones, and those left in float.

    Args:
        graph: An ``onnx.GraphProto``, optimized by ONNX Runtime.
    """
    constant = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # in topological order
        if all(name in constant or not name for name in node.input):
            constant.update(node.output)
    integer: list[str] = []
    floating: list[str] = []
    for node in graph.node:
        for kinds, found in ((_INTEGER, integer), (_FLOAT, floating)):
            at = kinds.get(node.op_type)
            if at is not None and len(node.input) > at and node.input[at] in constant:
                found.append(node.name or node.output[0])
    return integer, floating


class OnnxRunner(Runner):
    """A session of ONNX Runtime.

    Args:
        file: The model.
        threads: Of the session.
        expected: Products with constant weights that must be integer.
        floating: Products with constant weights that may be left in float.
    """

    def __init__(self, file: Path, threads: int, expected: int, floating: int = 0) -> None:
        self.file, self.threads = file, threads
        self.expected, self.floating = expected, floating
        self.session = self._start()
        self.names = {i.name for i in self.session.get_inputs()}
        self.bytes = 0

    def _start(self, optimized: Path | None = None) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.log_severity_level = _QUIET
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        return onnxruntime.InferenceSession(
            str(self.file), options, providers=["CPUExecutionProvider"]
        )

    def prepare(self, inputs: Inputs) -> Inputs:
        """Keeps what the graph takes; token types that are not given are zero."""
        zeros = {n: np.zeros_like(inputs["input_ids"]) for n in self.names - set(inputs)}
        return {name: a for name, a in {**inputs, **zeros}.items() if name in self.names}

    def run(self, prepared: Inputs) -> Any:
        """Runs the session."""
        return self.session.run(None, prepared)

    def output(self, inputs: Inputs) -> np.ndarray:
        """Runs the session."""
        return np.asarray(self.run(self.prepare(inputs))[0], dtype=np.float32)

    def check(self) -> str:
        """Reads the graph as ONNX Runtime optimized it."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "optimized.onnx"
            self._start(file)
            graph = onnx.load(file).graph
        # The very tensors of this model, without those that only an operator's contract needs.
        self.bytes = sum(onnx.numpy_helper.to_array(t).nbytes for t in graph.initializer)
        integer, floating = onnx_products(graph)
        if len(floating) > self.floating:
            raise BenchError(f"ONNX Runtime computes {floating[0]} in float32, not in int8")
        if len(integer) < self.expected or not integer:
            raise BenchError(
                f"ONNX Runtime computes {len(integer)} products of {self.expected} in int8"
            )
        return f"{len(integer)} integer products in the optimized graph"

    def weight_bytes(self) -> int:
        """Returns the bytes of the constants in the optimized graph; ``check`` reads them."""
        return self.bytes


class OnnxInt8(Engine):
    """The teacher through torch.onnx and ONNX Runtime's ``quantize_dynamic``."""

    name, title, int8 = "onnx-int8", "ONNX Runtime int8, dynamic, per channel", True
    library, extra = ("onnxruntime", "onnx", "onnxscript"), "onnx"

    def convert(self, work: Workspace) -> None:
        """Exports and quantizes it; embedding tables become int8, too."""
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        model = load_plain(work.teacher)
        sample = {name: torch.from_numpy(a) for name, a in work.inputs("sample").items()}
        program = trace(model, sample)
        large = sum(p.numel() * p.element_size() for p in model.parameters()) > _LARGE
        with (
            tempfile.TemporaryDirectory() as folder,
            warnings.catch_warnings(),
            _quiet_logging(),
        ):
            warnings.simplefilter("ignore")  # torch's own, about its own
            plain = Path(folder) / "plain.onnx"
            try:
                with torch.no_grad():
                    made: Any = torch.onnx.export(
                        program,
                        tuple(sample.values()),
                        input_names=list(sample),
                        output_names=["output"],
                        dynamo=True,
                        opset_version=20,
                        verbose=False,
                    )
            except Exception as error:  # whatever the exporter meets
                raise BenchError(f"torch.onnx cannot export it ({first_line(error)})") from error
            made.save(str(plain), external_data=large)
            _untie(plain, large)
            quantize_dynamic(
                str(plain),
                str(work.folder(self.name) / "model.onnx"),
                op_types_to_quantize=["MatMul", "Gemm", "Gather"],
                per_channel=True,
                weight_type=QuantType.QInt8,
                extra_options={"MatMulConstBOnly": True},
                use_external_data_format=large,
            )
            expected = len(onnx_products(onnx.load(plain, load_external_data=False).graph)[1])
        work.note(self.name, expected=expected)

    def load(self, work: Workspace) -> Runner:
        """Starts a session."""
        file = work.folder(self.name) / "model.onnx"
        return OnnxRunner(file, work.plan.threads, work.noted(self.name)["expected"])


def _untie(file: Path, large: bool) -> None:
    """Gives a product whose weight is a transposed table a matrix of its own.

    ``quantize_dynamic`` passes over a weight that is no initializer, as of a tied head.
    """
    import onnx

    model = onnx.load(file)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    turned = {
        node.output[0]: node
        for node in model.graph.node
        if node.op_type == "Transpose" and node.input[0] in tensors
    }
    wanted = {
        node.input[1]
        for node in model.graph.node
        if node.op_type in _FLOAT and node.input[1] in turned
    }
    for name in sorted(wanted):
        node = turned[name]
        axes = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        matrix = np.transpose(onnx.numpy_helper.to_array(tensors[node.input[0]]), axes)
        model.graph.node.remove(node)
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.ascontiguousarray(matrix), name)
        )
    if wanted:
        onnx.save(model, file, save_as_external_data=large)


class _quiet_logging:  # noqa: N801
    """Keeps advice about pre-processing, meant for static quantization, off the console."""

    def __enter__(self) -> None:
        self.before = logging.root.manager.disable
        logging.disable(logging.WARNING)

    def __exit__(self, *_: object) -> None:
        logging.disable(self.before)
