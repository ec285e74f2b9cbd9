"""OpenVINO: int8 weights of the teacher, activations quantized as they come."""

from __future__ import annotations

import shutil
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

__all__ = ["OpenvinoRunner", "compress"]

_LOW_BIT = ("u1", "u2", "u3", "u4", "i4", "u6", "i8", "u8")
_ROUNDED = 1e-4
"""Relative error above which a product has rounded its input to 8 bits: fp32 stays below 1e-6."""


def compress(model: Any) -> list[int]:
    """Replaces matrices by int8 codes and one scale per output row or table entry, in place.

    Args:
        model: An ``openvino.Model``.

    Returns:
        Number of inputs of every product that was compressed.
    """
    import openvino as ov
    from openvino import opset13 as op

    widths, made = [], {}
    for node in model.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in ("MatMul", "Gather"):
            continue
        at = 1 if kind == "MatMul" else 0
        constant = node.input_value(at).get_node()
        shape = constant.get_output_partial_shape(0)
        real = constant.get_output_element_type(0) in (ov.Type.f32, ov.Type.f16)
        if constant.get_type_name() != "Constant" or len(shape) != 2 or not real:
            continue
        rows_last = kind == "MatMul" and not node.get_attributes()["transpose_b"]
        axis = 0 if rows_last else 1
        if kind == "MatMul":
            widths.append(int(shape[axis].get_length()))
        key = (constant.get_friendly_name(), axis)
        if key not in made:
            weight = np.asarray(constant.get_data(), dtype=np.float32)
            scale = np.abs(weight).max(axis, keepdims=True) / np.float32(127)
            scale[scale == 0] = 1
            codes = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
            made[key] = op.multiply(
                op.convert(op.constant(codes, ov.Type.i8), "f32"), op.constant(scale)
            )
        node.input(at).replace_source_output(made[key].output(0))
    return widths


class OpenvinoRunner(Runner):
    """A compiled model of OpenVINO.

    Args:
        file: The model, .xml.
        settings: Of the CPU plug-in, besides threads.
        threads: Of the model.
        expected: Products whose weights must be compressed.
        dynamic: Whether their inputs must be quantized to 8 bits.
        floating: Products with constant weights that may be left in float.
    """

    def __init__(
        self,
        file: Path,
        settings: dict[str, Any],
        threads: int,
        expected: int,
        *,
        dynamic: bool = True,
        floating: int = 0,
    ) -> None:
        import openvino as ov

        self.core = ov.Core()
        self.expected, self.dynamic, self.floating = expected, dynamic, floating
        self.settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, **settings}
        self.compiled = self.core.compile_model(str(file), "CPU", self.settings)
        self.request = self.compiled.create_infer_request()
        self.names = {name: i for i in self.compiled.inputs for name in i.get_names()}

    def prepare(self, inputs: Inputs) -> Inputs:
        """Keeps what the graph takes; token types that are not given are zero."""
        ids = inputs.get("input_ids")
        missing = {
            n
            for i in self.compiled.inputs
            if not i.get_names() & set(inputs)
            for n in [i.get_any_name()]
        }
        made = {n: a for n, a in inputs.items() if n in self.names}
        return made | {n: np.zeros_like(ids) for n in missing}

    def run(self, prepared: Inputs) -> Any:
        """Runs the model."""
        return self.request.infer(prepared)

    def output(self, inputs: Inputs) -> np.ndarray:
        """Runs the model."""
        return np.array(self.run(self.prepare(inputs))[0], dtype=np.float32)

    def products(self) -> list[tuple[str, int, str, str]]:
        """Returns name, inputs, weight type and input type of products with constant weights."""
        found: list[tuple[str, int, str, str]] = []
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            if _info(node, "layerType") not in ("FullyConnected", "MatMul", "Gemm"):
                continue
            source = node.input_value(1).get_node()
            if _info(source, "layerType") not in ("Const", "Constant"):
                continue
            kind, given = (node.input(at).get_element_type().get_type_name() for at in (1, 0))
            width = int(node.input(1).get_partial_shape()[-1].get_length())
            found.append((_info(node, "originalLayersNames"), width, kind, given))
        return found

    def check(self) -> str:
        """Reads the compiled graph, and tries every width of a product by itself.

        The graph says which weights are compressed, but not whether inputs are quantized: where a
        group of inputs is longer than a row, the plug-in multiplies in float32 without a word. A
        product of the same width under the same settings shows it by its rounding.
        """
        products = self.products()
        low = [p for p in products if p[2] in _LOW_BIT]
        rest = [p for p in products if p[2] not in _LOW_BIT]
        if len(rest) > self.floating:
            raise BenchError(f"OpenVINO computes {rest[0][0]} with {rest[0][2]} weights")
        if len(low) < self.expected or not low:
            raise BenchError(f"OpenVINO compresses {len(low)} products of {self.expected}")
        if not self.dynamic:
            return f"{len(low)} FullyConnected of {low[0][2]} weights, inputs {low[0][3]}"
        for name, _, _, given in low:
            if given not in ("f32", "i8", "u8"):
                raise BenchError(f"OpenVINO feeds {name} with {given}, not with int8")
        for width, kind in sorted({(p[1], p[2]) for p in low if p[3] == "f32"}):
            if self.rounding(width, kind) < _ROUNDED:
                group = self.settings.get("DYNAMIC_QUANTIZATION_GROUP_SIZE")
                raise BenchError(
                    f"OpenVINO multiplies {kind} weights of {width} inputs in float32 at a group "
                    f"size of {group}"
                )
        return f"{len(low)} FullyConnected of {low[0][2]} weights, inputs quantized"

    def rounding(self, width: int, kind: str = "i8") -> float:
        """Returns the relative error of one product under this model's settings.

        Args:
            width: Inputs of the product.
            kind: Type of its weights.
        """
        import openvino as ov
        from openvino import opset13 as op

        random = np.random.default_rng(0)
        codes = random.integers(0, 3 if kind.endswith("2") else 8, (64, width))
        x = op.parameter([-1, width], ov.Type.f32)
        values = op.convert(op.constant(codes.astype(np.int8), getattr(ov.Type, kind)), "f32")
        values = op.multiply(values, op.constant(np.full((64, 1), 0.01, np.float32)))
        model = ov.Model([op.result(op.matmul(x, values, False, True))], [x])
        compiled = self.core.compile_model(model, "CPU", self.settings)
        rows = random.standard_normal((8, width)).astype(np.float32)
        exact = rows.astype(np.float64) @ (0.01 * codes.T)
        return float(np.abs(compiled(rows)[0] - exact).max() / np.abs(exact).max())

    def weight_bytes(self) -> int:
        """Returns the bytes of the constants in the compiled graph."""
        total = 0
        for node in self.compiled.get_runtime_model().get_ordered_ops():
            if _info(node, "layerType") != "Const":
                continue
            kind, shape = node.get_output_element_type(0), node.get_output_partial_shape(0)
            if shape.is_static and not kind.is_dynamic():
                bits = kind.bitwidth * int(np.prod([d.get_length() for d in shape]))
                total += -(-bits // 8)
        return total


def _info(node: Any, key: str) -> str:
    found = node.get_rt_info()
    return str(found[key].value) if key in found else str(node.get_type_name())


class OpenvinoInt8(Engine):
    """The teacher with int8 weights and inputs quantized per token and group."""

    name, title, int8 = "openvino-int8", "OpenVINO int8, dynamic", True
    library, extra = ("openvino",), "openvino"

    def convert(self, work: Workspace) -> None:
        """Converts and compresses it; embedding tables become int8, too."""
        import openvino as ov

        model = load_plain(work.teacher)
        sample = {name: torch.from_numpy(a) for name, a in work.inputs("sample").items()}
        program = trace(model, sample)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about its own
                made = ov.convert_model(program)
        except Exception as error:  # whatever the converter meets
            raise BenchError(f"OpenVINO cannot convert it ({first_line(error)})") from error
        for port, name in zip(made.inputs, sample, strict=True):
            port.set_names({name})
        widths = compress(made)
        if not widths:
            raise BenchError("OpenVINO's graph has no product with constant weights")
        made.validate_nodes_and_infer_types()
        ov.save_model(made, work.folder(self.name) / "model.xml", compress_to_fp16=False)
        work.note(self.name, widths=widths)

    def load(self, work: Workspace) -> Runner:
        """Compiles it."""
        widths = work.noted(self.name)["widths"]
        file = work.folder(self.name) / "model.xml"
        # A group longer than the shortest row would leave that row in float32.
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": min(widths),
        }
        return OpenvinoRunner(file, settings, work.plan.threads, len(widths))


class OpenvinoDefault(OpenvinoInt8):
    """The same, in the precision that the plug-in chooses: bfloat16 where the CPU has it."""

    name, title, int8 = "openvino-w8", "OpenVINO int8 weights, default precision", False

    def convert(self, work: Workspace) -> None:
        """Converts it, unless the engine before did."""
        ready = work.folder(OpenvinoInt8.name)
        if (ready / "note.json").is_file():
            shutil.copytree(ready, work.folder(self.name), dirs_exist_ok=True)
        else:
            super().convert(work)

    def load(self, work: Workspace) -> Runner:
        """Compiles it."""
        count = len(work.noted(self.name)["widths"])
        file = work.folder(self.name) / "model.xml"
        return OpenvinoRunner(file, {}, work.plan.threads, count, dynamic=False)
