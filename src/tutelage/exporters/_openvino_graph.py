"""From a float graph of OpenVINO to one with packed weights that its CPU plug-in runs in int8."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from ..errors import ExportError
from ..nn._conv2d import over_patches
from ..nn._subclass import with_forward_of
from ._layers import QuantizedLayer

__all__ = ["MARK", "Codes", "codes_of", "compress", "group_size", "substitute"]

MARK = "/quantized"
"""End of the name of the MatMul of every quantized Linear."""

_MULTIPLE = 16
"""Inputs in a group of activations: a multiple of it, or OpenVINO computes in float32."""

Codes = tuple[Int8[np.ndarray, "rows width"], Float[np.ndarray, "scales 1"]]
"""Codes and scales of a weight."""


class _Linear(nn.Module):
    """A float product whose weight can be found in the graph by its name."""

    def __init__(self, layer: QuantizedLayer, tag: str) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.codes.shape
        self.tag = tag
        self.register_parameter(tag, nn.Parameter(layer.values, requires_grad=False))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.clone())

    @property
    def weight(self) -> Tensor:
        return cast("Tensor", getattr(self, self.tag))

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


class _Conv2d(_Linear):
    def __init__(self, layer: QuantizedLayer, tag: str, plain: nn.Conv2d) -> None:
        super().__init__(layer, tag)
        self.kernel_size = cast("tuple[int, int]", plain.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        return over_patches(super().forward, input, self.kernel_size)


class _Embedding(nn.Embedding):
    tag: str

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.embedding(input, cast("Tensor", getattr(self, self.tag)))


def substitute(layer: QuantizedLayer, plain: nn.Module, tag: str) -> nn.Module:
    """Returns what is traced in the place of a quantized layer.

    Args:
        layer: The quantized layer.
        plain: The full-precision module that stands there.
        tag: Name of the weight in the graph, which no other has.
    """
    if layer.spec.kind == "conv2d":
        return _Conv2d(layer, tag, cast("nn.Conv2d", plain))
    if layer.spec.kind != "embedding":
        return _Linear(layer, tag)
    target = cast("Any", plain)
    target.__class__ = with_forward_of(type(plain), _Embedding)
    target.tag = tag
    del target._parameters["weight"]
    object.__setattr__(target, "weight", torch.zeros(()))
    target.register_parameter(tag, nn.Parameter(layer.values, requires_grad=False))
    return plain


def group_size(layers: Mapping[str, QuantizedLayer]) -> int:
    """Returns how many inputs of a Linear share an activation scale in OpenVINO.

    OpenVINO knows one number for the whole model, and a layer that is narrower than it would run
    in float32 in silence. The narrowest layer is computed as trained, wider ones with one scale
    for every group of as many inputs.

    Args:
        layers: The quantized weights, by module name.

    Returns:
        A multiple of 16, or 0 where no activation is quantized.

    Raises:
        ExportError: OpenVINO cannot round the activations as the scheme does.
    """
    products = [layer for layer in layers.values() if layer.spec.kind != "embedding"]
    plain = [layer.name for layer in products if layer.spec.input is None]
    if len(plain) == len(products):
        return 0
    if plain:
        raise ExportError(
            f"the input of {plain[0]!r} is not quantized and that of others is, which OpenVINO "
            "cannot tell apart; export with format='onnx'."
        )
    for layer in products:
        spec = cast("Any", layer.spec.input)
        if (spec.bits, spec.granularity, spec.signed, spec.clip) != (8, "row", True, None):
            raise ExportError(
                f"the input of {layer.name!r} is rounded otherwise than to 8 bits with one scale "
                "per token and no clipping, which OpenVINO cannot do; export with format='onnx'."
            )
    narrowest = min(products, key=lambda layer: layer.codes.shape[1])
    size = narrowest.codes.shape[1] // _MULTIPLE * _MULTIPLE
    if size == 0:
        raise ExportError(
            f"{narrowest.name!r} has {narrowest.codes.shape[1]} inputs; OpenVINO quantizes "
            f"activations of at least {_MULTIPLE}, export with format='onnx'."
        )
    return size


def compress(model: Any, tags: Mapping[str, QuantizedLayer]) -> None:
    """Replaces the float weights of a graph by packed codes, in place.

    Args:
        model: An ``openvino.Model``.
        tags: The quantized weights, by the name they were traced with.

    Raises:
        ExportError: A weight is not in the graph, or is used in an unknown way.
    """
    found = set()
    for node in model.get_ops():
        if node.get_type_name() != "Constant":
            continue
        names = " ".join(node.output(0).get_names())
        match = re.search(r"quantized_\d+_weight", names)
        if match is None:
            continue
        layer = tags[match.group()]
        found.add(match.group())
        for target in node.output(0).get_target_inputs():
            user = target.get_node()
            kind, place = user.get_type_name(), target.get_index()
            if kind == "Gather" and place == 0:
                _compress_gather(user, layer)
            elif kind == "MatMul" and place == 1 and user.get_attributes()["transpose_b"]:
                _compress_product(user, target, layer)
            else:
                raise ExportError(
                    f"OpenVINO uses the weight of {layer.name!r} in a {kind}, which cannot be "
                    "compressed; export with format='onnx'."
                )
    missing = sorted(layer.name for tag, layer in tags.items() if tag not in found)
    if missing:
        raise ExportError(
            f"the weight of {missing[0]!r} is not in the graph that OpenVINO made; export with "
            "format='onnx'."
        )


def _compress_product(user: Any, target: Any, layer: QuantizedLayer) -> None:
    from openvino import opset13 as op

    shifted, point = _stored(layer)
    values = op.convert(shifted, np.float32)
    if point:
        zero = op.convert(op.constant(np.array([[point]], dtype=np.uint8)), np.float32)
        values = op.subtract(values, zero)
    rows = layer.codes.shape[0]
    scale = layer.scale.expand(rows, 1).contiguous().numpy()
    target.replace_source_output(op.multiply(values, op.constant(scale)).output(0))
    user.set_friendly_name(f"{layer.name}{MARK}")
    users = list(user.output(0).get_target_inputs())
    if len(users) == 1 and users[0].get_node().get_type_name() == "Add":
        # The plug-in joins product and bias and keeps the name of the latter alone.
        users[0].get_node().set_friendly_name(f"{layer.name}{MARK}/bias")


def _compress_gather(user: Any, layer: QuantizedLayer) -> None:
    from openvino import opset13 as op

    # Converted first: a Gather of 2-bit constants crashes. The plug-in does so once, at load.
    shifted, point = _stored(layer)
    index, axis = user.input_value(1), op.constant(np.int64(0))
    codes = op.convert(shifted, np.uint8 if point else np.int8)
    rows = op.convert(op.gather(codes, index, axis), np.float32)
    if point:
        rows = op.subtract(rows, op.constant(np.float32(point)))
    scale = op.constant(layer.scale.numpy())
    factor = op.gather(scale, index, axis) if len(layer.scale) > 1 else scale
    made = op.multiply(rows, factor)
    made.set_friendly_name(user.get_friendly_name())
    for target in list(user.output(0).get_target_inputs()):
        target.replace_source_output(made.output(0))


def _stored(layer: QuantizedLayer) -> tuple[Any, int]:
    """Returns the codes as a packed constant, and its zero point."""
    import openvino as ov

    # A zero point between two codes runs in float32: four levels take 4 bits.
    kind, bits, point = (ov.Type.u2, 2, 1) if layer.grid.lo == -1 else (ov.Type.i4, 4, 0)
    per_byte = 8 // bits
    flat = ((layer.codes + point) & (2**bits - 1)).reshape(-1).to(torch.uint8)
    flat = nn.functional.pad(flat, (0, -len(flat) % per_byte)).reshape(-1, per_byte)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    lanes = (flat << shifts).sum(-1, dtype=torch.uint8).numpy()
    tensor = ov.Tensor(kind, ov.Shape(list(layer.codes.shape)))
    tensor.data.reshape(-1).view(np.uint8)[:] = lanes
    return ov.op.Constant(tensor), point


def codes_of(product: Any) -> Codes:
    """Reads the weight of a marked MatMul back.

    Args:
        product: A node of ``openvino.Model``.

    Returns:
        Codes less the zero point, int8, and scales, (rows, 1).
    """
    multiply = product.input_value(1).get_node()
    scale = multiply.input_value(1).get_node().data
    node = multiply.input_value(0).get_node()
    point = 0
    if node.get_type_name() == "Subtract":
        zero = node.input_value(1).get_node().input_value(0).get_node()
        point = int(zero.data.reshape(-1)[0])
        node = node.input_value(0).get_node()
    constant = node.input_value(0).get_node()
    bits = 2 if constant.get_element_type().to_string() == "u2" else 4
    lanes = constant.data.reshape(-1).view(np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    flat = ((lanes[:, None] >> shifts) & (2**bits - 1)).reshape(-1).astype(np.int8)
    rows, width = constant.get_output_shape(0)
    codes = flat[: rows * width].reshape(rows, width)
    if not point:
        codes = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).astype(np.int8)
    return codes - np.int8(point), scale
