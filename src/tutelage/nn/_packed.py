"""Modules that hold packed codes: what is shipped. For inference only."""

from __future__ import annotations

import math
from typing import Any, Self, cast

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn

from ..errors import ArtefactError
from ..kernels import (
    active,
    fits,
    packed_linear,
    packed_linear_cuda,
    quantize,
    resident_codes,
    to_panels,
)
from ..quantizers import (
    BaseQuantizer,
    Encoding,
    Grid,
    Quantized,
    UniformQuantizer,
    are_codes,
    packed_width,
    recode,
    unpack,
)
from ._conv2d import over_patches
from ._linear import Arithmetic, quantized_linear
from ._precision import in_float32
from ._subclass import with_forward_of

__all__ = ["PackedConv2d", "PackedEmbedding", "PackedLinear", "PackedWeight"]


class PackedWeight(nn.Module):
    """A module whose weight is packed, or that uses the packed weight of another module.

    The bytes are the buffer ``weight`` of the state dict, uint8 with one dimension, so that a
    reader who takes them for a full-precision weight fails on the shape; the scales are
    ``weight_scale``, float32, (rows, 1) or (1, 1). A module that shares has neither.

    Attributes:
        grid: The codes that are possible.
        rows: Rows of the weight: output features or table entries.
        width: Codes in a row.
        encoding: How codes became the bytes; asked of the owner.
    """

    grid: Grid
    rows: int
    width: int
    encoding: Encoding

    @property
    def weight(self) -> Tensor:
        """A stand-in that tells device and dtype of the computation; its values are NaN.

        Models read the dtype of a weight to cast what goes in, and must not find that of bytes.
        """
        own = self._buffers.get("weight")
        if own is None and self.owner is self:
            raise AttributeError("weight")
        shape = (self.rows, self.width) if own is None else own.shape
        device = self.owner._bytes().device
        made = cast("Tensor | None", self.__dict__.get("_stand_in"))
        if made is None or made.device != device or made.shape != shape:
            made = torch.full((), math.nan, dtype=torch.float32, device=device).expand(shape)
            cast("Any", made)._is_hf_initialized = True  # transformers fills it otherwise
            self.__dict__["_stand_in"] = made
        return made

    @weight.setter
    def weight(self, value: Tensor) -> None:
        # transformers ties weights by assignment; these are tied already.
        if value is not self.owner.__dict__.get("_stand_in"):
            raise AttributeError("the weight is packed and cannot be assigned.")

    @property
    def owner(self) -> PackedWeight:
        """The module that holds the bytes, most often this one."""
        return cast("PackedWeight", self.__dict__.get("_owner", self))

    def packed(self) -> tuple[UInt8[Tensor, "rows packed"], Float[Tensor, "scales 1"]]:
        """Returns bytes of whole bits a code, a row for every row of codes, and the scales.

        Bytes that are held in base 3 are turned at the first call and kept.
        """
        owner = self.owner
        rows = self._byte_rows()
        if owner.encoding != "bits":
            kept = cast("Tensor | None", owner.__dict__.get("_recoded"))
            if kept is None or kept.device != rows.device:
                kept = recode(rows, self.width, self.grid, owner.encoding, "bits")
                owner.__dict__["_recoded"] = kept
            rows = kept
        return rows, cast("Tensor", owner.weight_scale)

    def make_room(self, encoding: Encoding) -> None:
        """Makes room for bytes in another encoding.

        Args:
            encoding: That of the file which will be loaded.
        """
        if self.owner is self:
            self.encoding = encoding
            size = self.rows * packed_width(self.width, self.grid, encoding)
            self._buffers["weight"] = self._bytes().new_empty(size)

    def holds_codes(self) -> bool:
        """Whether the bytes are some that packing makes; of shared ones the owner is asked."""
        if self.owner is not self or self._bytes().is_meta:
            return True
        return are_codes(self._byte_rows(), self.width, self.grid, self.encoding)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.__dict__.pop("_recoded", None)

    def _byte_rows(self) -> Tensor:
        return self.owner._bytes().view(self.rows, -1)

    def _bytes(self) -> Tensor:
        return cast("Tensor", self._buffers["weight"])

    def _hold(self, quantizer: BaseQuantizer, shape: tuple[int, int], owner: Any) -> Self:
        self.grid, (self.rows, self.width) = quantizer.grid, shape
        self.encoding = "bits"
        device = cast("Tensor", self._parameters["weight"]).device
        del self._parameters["weight"]
        if owner is not None:
            if not isinstance(owner, PackedWeight) or (owner.rows, owner.width) != shape:
                raise ArtefactError(
                    f"a packed weight of shape {shape} is shared with one that does not fit; the "
                    "files are of another architecture."
                )
            self.__dict__["_owner"] = owner
            return self
        size = self.rows * packed_width(self.width, self.grid)
        self.register_buffer("weight", torch.empty(size, dtype=torch.uint8, device=device))
        scales = self.rows if quantizer.granularity == "row" else 1
        scale = torch.empty((scales, 1), dtype=torch.float32, device=device)
        self.register_buffer("weight_scale", scale)
        return self


class PackedLinear(PackedWeight):
    """Linear layer with packed integer weights; what a ``Conv1D`` becomes, too.

    Attributes:
        weight_scale: Float32, (out_features, 1) or (1, 1).
        bias: Float32, (out_features,), or ``None``.
        input_quantizer: Quantizer of the input, or ``None`` for weight-only quantization.
        arithmetic: How the product is computed.
    """

    bias: Tensor | None
    input_quantizer: BaseQuantizer | None
    arithmetic: Arithmetic
    _codes: Tensor | None
    _panels: Tensor | None

    @classmethod
    def from_linear(
        cls,
        module: nn.Module,
        quantizer: BaseQuantizer,
        input: BaseQuantizer | None,
        arithmetic: Arithmetic = "integer",
        owner: nn.Module | None = None,
    ) -> Self:
        """Turns a module into a packed one with empty buffers in place.

        Args:
            module: A plain ``nn.Linear``, on any device, meta included.
            quantizer: Says grid and granularity of the weight.
            input: Quantizer of the input, or ``None``.
            arithmetic: How the product is computed.
            owner: The packed module whose bytes and scales this one uses, ``None`` for its own.

        Raises:
            ArtefactError: The owner's weight has another shape.
        """
        weight = cast("Tensor", module.weight)
        return cls._from_module(
            module, (weight.shape[0], weight.shape[1]), quantizer, input, arithmetic, owner
        )

    @classmethod
    def from_conv1d(
        cls,
        module: nn.Module,
        quantizer: BaseQuantizer,
        input: BaseQuantizer | None,
        arithmetic: Arithmetic = "integer",
    ) -> Self:
        """As ``from_linear``, for a plain ``Conv1D``: packed row by row of its transposed weight.

        Args:
            module: A plain ``Conv1D``, on any device, meta included.
            quantizer: As in ``from_linear``.
            input: As in ``from_linear``.
            arithmetic: As in ``from_linear``.
        """
        weight = cast("Tensor", module.weight)
        return cls._from_module(
            module, (weight.shape[1], weight.shape[0]), quantizer, input, arithmetic, None
        )

    @classmethod
    def _from_module(
        cls,
        module: nn.Module,
        shape: tuple[int, int],
        quantizer: BaseQuantizer,
        input: BaseQuantizer | None,
        arithmetic: Arithmetic,
        owner: nn.Module | None,
    ) -> Self:
        module.__class__ = cls
        packed = cast("Self", module)
        packed._codes = packed._panels = None
        packed.input_quantizer, packed.arithmetic = input, arithmetic
        return packed._hold(quantizer, shape, owner)

    def codes(self) -> Tensor:
        """Returns the unpacked codes, int8 or float32, (out_features, in_features).

        They are unpacked at the first call and kept.
        """
        rows = self._byte_rows()
        if self._codes is None or self._codes.device != rows.device:
            codes = unpack(rows, self.width, self.grid, self.owner.encoding)
            self._codes = resident_codes(codes)
        return self._codes

    def panels(self) -> Tensor:
        """Returns the codes as compiled kernels read them, uint8; made once and kept."""
        if self._panels is None:
            codes = unpack(self._byte_rows(), self.width, self.grid, self.owner.encoding)
            index = ((codes - self.grid.lo) // self.grid.step).to(torch.uint8)
            self._panels = to_panels(index, self.grid.bits)
        return self._panels

    @property
    def levels(self) -> int | None:
        """Codes of the input on each side of zero, where compiled kernels can compute the layer.

        ``None`` for weight-only quantization, products in ``"float"`` arithmetic and inputs that
        are not scaled per token.
        """
        quantizer = self.input_quantizer
        if self.arithmetic != "integer" or not isinstance(quantizer, UniformQuantizer):
            return None
        if quantizer.granularity != "row" or quantizer.clip is not None or quantizer.reciprocal:
            return None
        return quantizer.grid.hi if fits(self.width) else None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._codes = self._panels = None

    @in_float32
    def forward(
        self, input: Float[Tensor, "*batch in_features"]
    ) -> Float[Tensor, "*batch out_features"]:
        """Applies the layer; the same numbers as the quantized layer it was packed from.

        Args:
            input: Shape (*batch, in_features).
        """
        scale = cast("Tensor", self.owner.weight_scale)
        levels = self.levels
        if levels is not None and input.device.type == "cpu" and active():
            return packed_linear(
                input.float(),
                self.panels(),
                scale,
                self.bias,
                self.rows,
                self.width,
                self.grid,
                levels,
            )
        quantizer = self.input_quantizer
        if quantizer is not None and input.is_cuda:
            rows, _ = self.packed()
            y = packed_linear_cuda(
                input, rows, scale, self.bias, self.width, self.grid, quantizer, self.arithmetic
            )
            if y is not None:
                return y
        if quantizer is None:
            values = self.codes().float() * scale
            return nn.functional.linear(input.to(values.dtype), values, self.bias)
        weight = Quantized(self.codes(), scale)
        quantized = quantize(quantizer, input, compact=self.arithmetic == "integer")
        return quantized_linear(quantized, weight, self.bias, self.arithmetic)

    def extra_repr(self) -> str:
        """Shows shape and grid."""
        return f"{self.width}, {self.rows}, bits={self.grid.bits}"


class PackedConv2d(PackedLinear):
    """Patch embedding with packed integer weights.

    Attributes:
        kernel_size: Height and width of a patch.
    """

    kernel_size: tuple[int, int]

    @classmethod
    def from_conv2d(
        cls,
        module: nn.Conv2d,
        quantizer: BaseQuantizer,
        input: BaseQuantizer | None,
        arithmetic: Arithmetic = "integer",
    ) -> Self:
        """As ``PackedLinear.from_linear``, for a ``nn.Conv2d`` that embeds patches.

        Args:
            module: A plain ``nn.Conv2d`` for which ``is_patch_embedding`` holds.
            quantizer: As in ``PackedLinear.from_linear``.
            input: As in ``PackedLinear.from_linear``.
            arithmetic: As in ``PackedLinear.from_linear``.
        """
        shape = (module.out_channels, math.prod(module.weight.shape[1:]))
        return cls._from_module(module, shape, quantizer, input, arithmetic, None)

    def forward(
        self, input: Float[Tensor, "*batch channels height width"]
    ) -> Float[Tensor, "*batch out_channels rows columns"]:
        """Applies the layer; the same numbers as the ``QuantConv2d`` it was packed from.

        Args:
            input: Images.
        """
        return over_patches(super().forward, input, self.kernel_size)


class PackedEmbedding(PackedWeight):
    """Embedding table with packed integer rows, unpacked row by row as they are looked up.

    Attributes:
        weight_scale: Float32, (num_embeddings, 1) or (1, 1).
    """

    @classmethod
    def from_embedding(
        cls, module: nn.Embedding, quantizer: BaseQuantizer, owner: nn.Module | None = None
    ) -> PackedEmbedding:
        """Turns ``module`` into a ``PackedEmbedding`` with empty buffers in place.

        Args:
            module: An ``nn.Embedding``, on any device, meta included; a subclass keeps its
                forward, as in ``QuantEmbedding``.
            quantizer: Says grid and granularity of the table.
            owner: The packed module whose bytes and scales this one uses, ``None`` for its own.

        Raises:
            ArtefactError: The owner's weight has another shape.
        """
        shape = (module.num_embeddings, module.embedding_dim)
        plain = type(module)
        target = cast("Any", module)
        target.__class__ = cls if plain is nn.Embedding else with_forward_of(plain, _PackedLookup)
        return cast("PackedEmbedding", module)._hold(quantizer, shape, owner)

    def forward(self, input: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch embedding_dim"]:
        """Looks up rows.

        Args:
            input: Token indices, any shape.
        """
        # Unlike indexing, index_select refuses negative indices, as nn.Embedding does.
        index = input.reshape(-1)
        rows, scale = self._byte_rows(), cast("Tensor", self.owner.weight_scale)
        encoding = self.owner.encoding
        codes = unpack(rows.index_select(0, index), self.width, self.grid, encoding).float()
        codes.mul_(scale.index_select(0, index) if len(scale) > 1 else scale)
        return codes.reshape(*input.shape, self.width)

    def extra_repr(self) -> str:
        """Shows shape and grid."""
        return f"{self.rows}, {self.width}, bits={self.grid.bits}"


class _PackedLookup(PackedEmbedding, nn.Embedding):
    """What a subclass of ``nn.Embedding`` meets when it calls ``super().forward``."""
