"""Modules with operators in them that stand for what ONNX stores in 2 bits."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..nn._conv2d import over_patches
from ..nn._subclass import with_forward_of
from ..quantizers import BaseQuantizer
from ._layers import QuantizedLayer

__all__ = ["DOMAIN", "Kernel", "owner_of", "substitute"]

DOMAIN = "tutelage"
"""Of the operators that are replaced before the file is written."""

Kernel = Literal["matmulinteger", "matmulnbits"]
"""How ONNX Runtime multiplies: exactly, or faster than that for a few tokens."""


def owner_of(layer: QuantizedLayer) -> str:
    """Returns the name under which the codes of a layer are stored."""
    return layer.spec.shared_with or layer.name


def _operator(name: str, x: Tensor, layer: str, columns: int) -> Tensor:
    shape = (*x.shape[: x.dim() - (name != "Lookup")], columns)
    return torch.onnx.ops.symbolic(
        f"{DOMAIN}::{name}",
        (x,),
        attrs={"layer": layer},
        dtype=torch.float32,
        shape=shape,
        version=1,
    )


class _Linear(nn.Module):
    """A product of codes, scaled as the student scales it."""

    scale: Tensor

    def __init__(self, layer: QuantizedLayer, kernel: Kernel) -> None:
        super().__init__()
        self.layer, self.rows = layer.name, layer.codes.shape[0]
        self.in_features, self.out_features = layer.codes.shape[1], self.rows
        # Models read the dtype of a weight to cast what goes in.
        object.__setattr__(self, "weight", torch.zeros(()))
        self.register_buffer("scale", layer.scale.reshape(-1))
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.clone())
        if kernel == "matmulnbits" and layer.grid.lo != -1:
            raise ExportError(
                f"{layer.name!r} has four levels, whose zero point lies between two codes, and "
                "MatMulNBits is slow with that; export with kernel='matmulinteger'."
            )
        exact = layer.spec.input is not None and kernel == "matmulinteger"
        self.quantizer: BaseQuantizer | None = None
        if exact:
            self.quantizer = cast("Any", layer.spec.input).build()

    def forward(self, input: Tensor) -> Tensor:
        if self.quantizer is None:
            y = _operator("FloatProduct", input, self.layer, self.rows)
        else:
            codes, scale = self.quantizer.quantize(input)
            y = _operator("Product", codes, self.layer, self.rows) * scale * self.scale
        return y if self.bias is None else y + self.bias


class _Conv2d(_Linear):
    def __init__(self, layer: QuantizedLayer, kernel: Kernel, plain: nn.Conv2d) -> None:
        super().__init__(layer, kernel)
        self.kernel_size = cast("tuple[int, int]", plain.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        return over_patches(super().forward, input, self.kernel_size)


class _Embedding(nn.Embedding):
    """A lookup of codes; what a subclass of ``nn.Embedding`` meets as its base."""

    layer: str
    scale: Tensor

    def forward(self, input: Tensor) -> Tensor:
        codes = _operator("Lookup", input, self.layer, self.embedding_dim)
        scale = self.scale if len(self.scale) == 1 else nn.functional.embedding(input, self.scale)
        return codes * scale


def substitute(layer: QuantizedLayer, plain: nn.Module, kernel: Kernel) -> nn.Module:
    """Returns what is traced in the place of a quantized layer.

    Args:
        layer: The quantized layer.
        plain: The full-precision module that stands there.
        kernel: How ONNX Runtime shall multiply.

    Raises:
        ExportError: The weight does not fit the kernel.
    """
    if layer.spec.kind == "conv2d":
        return _Conv2d(layer, kernel, cast("nn.Conv2d", plain))
    if layer.spec.kind != "embedding":
        return _Linear(layer, kernel)
    target = cast("Any", plain)
    target.__class__ = with_forward_of(type(plain), _Embedding)
    target.layer = layer.name
    target.register_buffer("scale", layer.scale)
    del target._parameters["weight"]
    object.__setattr__(target, "weight", torch.zeros(()))
    return plain
