"""Word embeddings with one scale per vocabulary row."""

from __future__ import annotations

from typing import cast

from jaxtyping import Float, Int
from torch import Tensor, nn

from ..quantizers import BaseQuantizer
from ._gate import blend, gate_of
from ._subclass import with_forward_of
from ._weight import QuantWeight

__all__ = ["QuantEmbedding"]


class QuantEmbedding(QuantWeight, nn.Embedding):
    """``nn.Embedding`` whose table is quantized in the forward pass.

    With one scale per row only the rows that a batch uses are quantized: they are gathered
    first, which gives exactly the values of the whole table. Made in place from an existing
    ``nn.Embedding`` by ``tutelage.prepare``. A subclass, such as one that scales what it looks
    up, keeps its forward: it becomes a subclass of both.

    Attributes:
        weight_quantizer: Quantizer of the table.
    """

    weight_quantizer: BaseQuantizer

    @classmethod
    def from_embedding(cls, module: nn.Embedding, weight: nn.Module) -> QuantEmbedding:
        """Turns ``module`` into a ``QuantEmbedding`` in place and returns it.

        Args:
            module: An ``nn.Embedding`` without ``max_norm``, or of a subclass for which
                ``looks_up_rows`` holds.
            weight: Quantizer of the table.
        """
        module.__class__ = with_forward_of(type(module), cls)
        module.weight_quantizer = weight
        return cast("QuantEmbedding", module)

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch embedding_dim"]:
        """Looks up quantized rows.

        Args:
            input: Token indices, any shape.

        Returns:
            Float32, shape (*batch, embedding_dim).
        """
        gate = gate_of(self)
        if self.weight_quantizer.granularity == "row":
            rows = super().forward(input)
            quantized = self.weight_quantizer(rows)
            return quantized if gate is None else blend(rows, quantized, gate)
        quantized = self.weight_quantizer(self.weight)
        return nn.functional.embedding(
            input,
            quantized if gate is None else blend(self.weight, quantized, gate),
            self.padding_idx,
            scale_grad_by_freq=self.scale_grad_by_freq,
            sparse=self.sparse,
        )
