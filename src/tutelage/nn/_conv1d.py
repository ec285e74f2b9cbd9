"""GPT-2's Conv1D: a Linear whose weight is stored transposed."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ._linear import Arithmetic, QuantProduct

__all__ = ["QuantConv1D"]


class QuantConv1D(QuantProduct, Conv1D):  # type: ignore[misc]
    """``Conv1D`` of transformers with quantized weight, and quantized input where wanted.

    ``weight`` keeps its shape (in_features, out_features). A scale belongs to an output feature,
    which is a column of it; packed codes are stored row by row, one row per output feature.
    Made in place by ``tutelage.prepare``; parameters, hooks and names stay.
    """

    @classmethod
    def from_conv1d(
        cls,
        module: Conv1D,
        weight: nn.Module,
        input: nn.Module | None,
        arithmetic: Arithmetic = "integer",
    ) -> QuantConv1D:
        """Turns ``module`` into a ``QuantConv1D`` in place and returns it.

        Args:
            module: A plain ``Conv1D``.
            weight: Quantizer of the weight; its rows are output features.
            input: Quantizer of the input, or ``None``.
            arithmetic: How the product is computed.
        """
        return cls._from_module(module, weight, input, arithmetic)

    def weight_rows(self) -> Float[Tensor, "out_features in_features"]:
        """Returns the transposed weight, one row per output feature."""
        # Sums over strided rows may round differently from those of a Linear.
        return self.weight.t().contiguous()

    __repr__ = nn.Module.__repr__

    def extra_repr(self) -> str:
        """Shows the shape."""
        return f"nf={self.nf}, nx={self.nx}"
