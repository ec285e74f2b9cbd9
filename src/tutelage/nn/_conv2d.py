"""Patch embeddings: a convolution whose stride is its kernel, which is a Linear over patches."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from ._linear import Arithmetic, QuantProduct

__all__ = ["QuantConv2d", "is_patch_embedding", "over_patches"]


def is_patch_embedding(module: nn.Module) -> bool:
    """Whether ``module`` is a Conv2d over patches that neither overlap nor leave gaps.

    Args:
        module: Any module.
    """
    return (
        type(module) is nn.Conv2d
        and module.kernel_size == module.stride
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
        and module.groups == 1
    )


def over_patches(
    product: Callable[[Tensor], Tensor],
    x: Float[Tensor, "*batch channels height width"],
    kernel: tuple[int, int],
) -> Float[Tensor, "*batch out_channels rows columns"]:
    """Applies a Linear to every patch of an image.

    Args:
        product: From patches (*batch, patches, channels * kernel height * kernel width) to
            (*batch, patches, out_channels).
        x: Images; what does not fill a patch at the right and the bottom is left out, as a
            convolution does.
        kernel: Height and width of a patch.
    """
    patches = nn.functional.unfold(x, kernel, stride=kernel).transpose(-1, -2).contiguous()
    size = (x.shape[-2] // kernel[0], x.shape[-1] // kernel[1])
    return product(patches).transpose(-1, -2).unflatten(-1, size)


class QuantConv2d(QuantProduct, nn.Conv2d):
    """Patch embedding with quantized weight, and quantized patches where wanted.

    One scale per output channel or tensor, and with a row-wise input quantizer one per patch.
    Made in place by ``tutelage.prepare``; parameters, hooks and names stay.
    """

    kernel_size: tuple[int, int]

    @classmethod
    def from_conv2d(
        cls,
        module: nn.Conv2d,
        weight: nn.Module,
        input: nn.Module | None,
        arithmetic: Arithmetic = "integer",
    ) -> QuantConv2d:
        """Turns ``module`` into a ``QuantConv2d`` in place and returns it.

        Args:
            module: A plain ``nn.Conv2d`` for which ``is_patch_embedding`` holds.
            weight: Quantizer of the weight; its rows are output channels.
            input: Quantizer of the patches, or ``None``.
            arithmetic: How the product is computed.
        """
        return cls._from_module(module, weight, input, arithmetic)

    def weight_rows(self) -> Float[Tensor, "out_channels patch"]:
        """Returns the weight with one row per output channel."""
        return self.weight.flatten(1)

    def forward(
        self, input: Float[Tensor, "*batch channels height width"]
    ) -> Float[Tensor, "*batch out_channels rows columns"]:
        """Applies the quantized layer.

        Args:
            input: Images.

        Returns:
            Shape (*batch, out_channels, rows of patches, columns of patches), float32.
        """
        return over_patches(super().forward, input, self.kernel_size)
