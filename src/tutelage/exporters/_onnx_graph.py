"""From the stand-ins of a traced graph to the operators that ONNX Runtime runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int8
from torch import Tensor

from ._layers import QuantizedLayer
from ._onnx_modules import DOMAIN, Kernel, owner_of

__all__ = ["IR_VERSION", "OPSET", "Product", "expand", "name_axes", "strip"]

OPSET = 25
"""The first opset with 2-bit integers."""
IR_VERSION = 13
"""The intermediate representation that goes with it."""
_BLOCK = 128
"""Weights that share a scale in MatMulNBits: the fastest that ONNX Runtime has."""


@dataclass(frozen=True)
class Product:
    """Where a product of a quantized Linear is found in the graph.

    Attributes:
        layer: Module name.
        x: Name of the input value, of uint8 codes where ``offset`` is given.
        y: Name of the result, int32 where ``offset`` is given.
        offset: What was added to the codes of the input, ``None`` for a float input.
    """

    layer: str
    x: str
    y: str
    offset: int | None


@dataclass
class _Builder:
    layers: Mapping[str, QuantizedLayer]
    kernel: Kernel
    nodes: list[Any] = field(default_factory=list)
    tensors: list[Any] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    made: set[str] = field(default_factory=set)

    def node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Adds a node unless its output is there already, and returns the output."""
        from onnx import helper

        if output not in self.made:
            self.made.add(output)
            self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def constant(self, name: str, value: Any) -> str:
        from onnx import numpy_helper

        if name not in self.made:
            self.made.add(name)
            self.tensors.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def stored(self, layer: QuantizedLayer) -> str:
        """Returns the name of the codes, (rows, width), moved to where two bits hold them."""
        from onnx import TensorProto

        name = f"{owner_of(layer)}.codes"
        if name not in self.made:
            self.made.add(name)
            tensor = TensorProto(name=name, data_type=TensorProto.INT2)
            tensor.dims.extend(layer.codes.shape)
            tensor.raw_data = _two_bits(_shifted(layer))
            self.tensors.append(tensor)
        return name

    def codes(self, layer: QuantizedLayer, dtype: int) -> str:
        """Returns the codes as int8 or float32; ONNX Runtime computes this once, at load."""
        from onnx import TensorProto

        owner = owner_of(layer)
        output = f"{owner}.codes_{'int8' if dtype == TensorProto.INT8 else 'float'}"
        if layer.grid.step == 1 or layer.grid.lo == -1:
            return self.node("Cast", [self.stored(layer)], output, to=dtype)
        # Four levels -3, -1, 1, 3 are stored as -2, -1, 0, 1.
        wide = self.node("Cast", [self.stored(layer)], f"{owner}.codes_wide", to=TensorProto.INT32)
        step = self.constant("tutelage.two", np.int32(layer.grid.step))
        one = self.constant("tutelage.one", np.int32(layer.grid.lo + 2 * layer.grid.step))
        wide = self.node("Mul", [wide, step], f"{owner}.codes_scaled")
        wide = self.node("Add", [wide, one], f"{owner}.codes_moved")
        return self.node("Cast", [wide], output, to=dtype)

    def product(self, layer: QuantizedLayer, x: str, y: str) -> None:
        from onnx import TensorProto

        signed = layer.spec.input is None or layer.spec.input.signed
        offset = 128 if signed else 0
        if signed:
            shift = self.constant("tutelage.offset", np.float32(offset))
            moved = self.node("Add", [x, shift], f"{x}.offset")
        else:
            moved = x
        q = self.node("Cast", [moved], f"{x}.uint8", to=TensorProto.UINT8)
        point = self.constant(f"tutelage.zero_point_{offset}", np.uint8(offset))
        codes = self.codes(layer, TensorProto.INT8)
        w = self.node("Transpose", [codes], f"{codes}.transposed", perm=[1, 0])
        total = self.node("MatMulInteger", [q, w, point], f"{y}.int32")
        self.node("Cast", [total], y, to=TensorProto.FLOAT)
        self.products.append(Product(layer.name, q, total, offset))

    def float_product(self, layer: QuantizedLayer, x: str, y: str) -> None:
        from onnx import TensorProto

        self.products.append(Product(layer.name, x, y, None))
        if layer.spec.input is not None and self.kernel == "matmulnbits":
            self.n_bits(layer, x, y)
            return
        codes = self.codes(layer, TensorProto.FLOAT)
        scale = self.constant(f"{layer.name}.row_scale", layer.scale.numpy())
        values = self.node("Mul", [codes, scale], f"{layer.name}.values")
        w = self.node("Transpose", [values], f"{layer.name}.values_transposed", perm=[1, 0])
        self.node("MatMul", [x, w], y)

    def n_bits(self, layer: QuantizedLayer, x: str, y: str) -> None:
        rows, width = layer.codes.shape
        blocks = -(-width // _BLOCK)
        index = torch.full((rows, blocks * _BLOCK), 1, dtype=torch.uint8)
        index[:, :width] = (layer.codes + 1).to(torch.uint8)
        lanes = index.reshape(rows, blocks, _BLOCK // 4, 4) << torch.tensor(
            [0, 2, 4, 6], dtype=torch.uint8
        )
        packed = lanes.sum(-1, dtype=torch.uint8).numpy()
        scale = layer.scale.expand(rows, 1).expand(rows, blocks).contiguous().numpy()
        points = np.full((rows, -(-blocks // 4)), 0b01010101, dtype=np.uint8)
        inputs = [
            x,
            self.constant(f"{layer.name}.packed", packed),
            self.constant(f"{layer.name}.block_scale", scale),
            self.constant(f"{layer.name}.zero_points", points),
        ]
        settings = {"K": width, "N": rows, "bits": 2, "block_size": _BLOCK, "accuracy_level": 4}
        self.node("MatMulNBits", inputs, y, domain="com.microsoft", **settings)

    def lookup(self, layer: QuantizedLayer, index: str, y: str) -> None:
        from onnx import TensorProto

        codes = self.codes(layer, TensorProto.INT8)
        rows = self.node("Gather", [codes, index], f"{y}.int8", axis=0)
        self.node("Cast", [rows], y, to=TensorProto.FLOAT)


def _shifted(layer: QuantizedLayer) -> Int8[Tensor, "rows width"]:
    grid = layer.grid
    if grid.lo == -1:
        return layer.codes
    return (layer.codes - grid.lo) // grid.step - 2


def _two_bits(codes: Int8[Tensor, "rows width"]) -> bytes:
    flat = (codes.reshape(-1) & 3).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4)).reshape(-1, 4)
    lanes = flat << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
    return lanes.sum(-1, dtype=torch.uint8).numpy().tobytes()


def expand(model: Any, layers: Mapping[str, QuantizedLayer], kernel: Kernel) -> list[Product]:
    """Replaces the stand-ins of a model in place.

    Args:
        model: A ``ModelProto`` that was traced with ``substitute``.
        layers: The quantized weights, by module name.
        kernel: How Linears are multiplied.

    Returns:
        The products of the quantized Linears.
    """
    from onnx import helper

    builder = _Builder(layers, kernel)
    for node in model.graph.node:
        if node.domain != DOMAIN:
            builder.nodes.append(node)
            continue
        name = next(a.s.decode() for a in node.attribute if a.name == "layer")
        make = {
            "Product": builder.product,
            "FloatProduct": builder.float_product,
            "Lookup": builder.lookup,
        }[node.op_type]
        make(layers[name], node.input[0], node.output[0])
    del model.graph.node[:]
    model.graph.node.extend(builder.nodes)
    model.graph.initializer.extend(builder.tensors)
    opsets = {"": OPSET} | ({"com.microsoft": 1} if kernel == "matmulnbits" else {})
    del model.opset_import[:]
    model.opset_import.extend(helper.make_opsetid(*item) for item in opsets.items())
    model.ir_version = IR_VERSION
    return builder.products


def strip(model: Any, config: Any) -> None:
    """Removes what the tracer noted about source files, and notes names of labels.

    Args:
        model: A ``ModelProto``.
        config: Configuration of the model.
    """
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        part.doc_string = ""
        if hasattr(part, "metadata_props"):
            del part.metadata_props[:]
    from .. import __version__

    model.producer_name, model.producer_version = "tutelage", __version__
    labels = getattr(config, "id2label", None)
    if labels:
        entry = model.metadata_props.add()
        entry.key, entry.value = "id2label", json.dumps(labels)


def name_axes(model: Any) -> None:
    """Calls the open axes of inputs and outputs ``batch`` and ``tokens``.

    Args:
        model: A ``ModelProto``.
    """
    names: dict[str, str] = {}
    for value in model.graph.input:
        for axis, dim in zip(("batch", "tokens"), value.type.tensor_type.shape.dim, strict=False):
            if dim.dim_param:
                names[dim.dim_param] = axis
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = names.get(dim.dim_param, dim.dim_param)
