"""Modules that hold packed codes: what is shipped. For inference only."""

from __future__ import annotations

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..kernels import resident_codes
from ..quantizers import BaseQuantizer, Grid, Quantized, packed_width, unpack
from ._linear import Arithmetic, quantized_linear
from ._precision import in_float32

__all__ = ["PackedEmbedding", "PackedLinear"]


def _hold_packed(module: nn.Module, rows: int, width: int, grid: Grid, scales: int) -> None:
    # The bytes keep the name of the weight but have one dimension, so that a reader who takes
    # them for a full-precision weight fails on the shape.
    device = cast("Tensor", module.weight).device
    size = rows * packed_width(width, grid)
    del module.weight
    module.register_buffer("weight", torch.empty(size, dtype=torch.uint8, device=device))
    scale = torch.empty((scales, 1), dtype=torch.float32, device=device)
    module.register_buffer("weight_scale", scale)


class PackedLinear(nn.Module):
    """Linear layer with packed integer weights.

    Attributes:
        weight: Packed codes, uint8, one dimension.
        weight_scale: Float32, (out_features, 1) or (1, 1).
        bias: Float32, (out_features,), or ``None``.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    in_features: int
    out_features: int
    grid: Grid
    input_quantizer: BaseQuantizer | None
    arithmetic: Arithmetic
    _codes: Tensor | None

    @classmethod
    def from_linear(
        cls,
        module: nn.Linear,
        quantizer: BaseQuantizer,
        input: BaseQuantizer | None,
        arithmetic: Arithmetic = "integer",
    ) -> PackedLinear:
        """Turns ``module`` into a ``PackedLinear`` with empty buffers in place.

        Args:
            module: A plain ``nn.Linear``, on any device, meta included.
            quantizer: Says grid and granularity of the weight.
            input: Quantizer of the input, or ``None``.
            arithmetic: How the product is computed.
        """
        rows = module.out_features if quantizer.granularity == "row" else 1
        packed = cast("PackedLinear", module)
        packed.__class__ = cls
        packed.grid, packed._codes = quantizer.grid, None
        packed.input_quantizer, packed.arithmetic = input, arithmetic
        _hold_packed(packed, packed.out_features, packed.in_features, packed.grid, rows)
        return packed

    def codes(self) -> Tensor:
        """Returns the unpacked codes, int8 or float32, (out_features, in_features).

        They are unpacked at the first call and kept.
        """
        if self._codes is None or self._codes.device != self.weight.device:
            rows = self.weight.view(self.out_features, -1)
            self._codes = resident_codes(unpack(rows, self.in_features, self.grid))
        return self._codes

    @in_float32
    def forward(
        self, input: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Applies the layer; the same numbers as the ``QuantLinear`` it was packed from.

        Args:
            input: Shape (*batch, in_features).
        """
        if self.input_quantizer is None:
            values = self.codes().float() * self.weight_scale
            return nn.functional.linear(input.to(values.dtype), values, self.bias)
        weight = Quantized(self.codes(), self.weight_scale)
        quantized = self.input_quantizer.quantize(input)
        return quantized_linear(quantized, weight, self.bias, self.arithmetic)

    def extra_repr(self) -> str:
        """Shows shape and grid."""
        return f"{self.in_features}, {self.out_features}, bits={self.grid.bits}"


class PackedEmbedding(nn.Module):
    """Embedding table with packed integer rows, unpacked row by row as they are looked up.

    Attributes:
        weight: Packed codes, uint8, one dimension.
        weight_scale: Float32, (num_embeddings, 1) or (1, 1).
    """

    weight: Tensor
    weight_scale: Tensor
    num_embeddings: int
    embedding_dim: int
    grid: Grid

    @classmethod
    def from_embedding(cls, module: nn.Embedding, quantizer: BaseQuantizer) -> PackedEmbedding:
        """Turns ``module`` into a ``PackedEmbedding`` with empty buffers in place.

        Args:
            module: A plain ``nn.Embedding``, on any device, meta included.
            quantizer: Says grid and granularity of the table.
        """
        rows = module.num_embeddings if quantizer.granularity == "row" else 1
        packed = cast("PackedEmbedding", module)
        packed.__class__ = cls
        packed.grid = quantizer.grid
        _hold_packed(packed, packed.num_embeddings, packed.embedding_dim, packed.grid, rows)
        return packed

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch embedding_dim"]:
        """Looks up rows.

        Args:
            input: Token indices, any shape.
        """
        # Unlike indexing, index_select refuses negative indices, as nn.Embedding does.
        index = input.reshape(-1)
        rows = self.weight.view(self.num_embeddings, -1).index_select(0, index)
        codes = unpack(rows, self.embedding_dim, self.grid).float()
        scale = self.weight_scale
        codes.mul_(scale.index_select(0, index) if len(scale) > 1 else scale)
        return codes.reshape(*input.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """Shows shape and grid."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.grid.bits}"
