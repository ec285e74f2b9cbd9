"""What every module with a quantized weight has in common."""

from __future__ import annotations

from typing import cast

from jaxtyping import Float
from torch import Tensor, nn

from ..quantizers import Quantized, Quantizer

__all__ = ["QuantWeight"]


class QuantWeight(nn.Module):
    """A module whose latent weight is rounded by a quantizer.

    Subclasses say how their weight is read as a matrix of rows, one per output feature or table
    entry. Training, packing and sizes all go through that matrix.

    Attributes:
        weight_quantizer: Quantizer of the weight, one scale per row or tensor. Modules that share
            one weight share it too.
    """

    weight_quantizer: Quantizer

    def weight_rows(self) -> Float[Tensor, "rows width"]:
        """Returns the latent weight as a matrix whose rows are quantized and packed."""
        return cast("Tensor", self.weight)

    def quantized_weight(self) -> Quantized:
        """Returns codes (rows, width) and scale (rows, 1) or (1, 1) of the weight."""
        return self.weight_quantizer.quantize(self.weight_rows())
