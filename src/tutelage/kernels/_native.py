"""The compiled CPU kernels: 1- and 2-bit weights in panels, 8-bit activations."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from ..quantizers import Grid
from . import _operators as _operators
from ._build import BuildError, library

__all__ = [
    "ACTIVATIONS",
    "Native",
    "active",
    "encoder_block",
    "fits",
    "isa_index",
    "native",
    "packed_linear",
    "panel_bytes",
    "to_panels",
]

ACTIVATIONS = {"none": 0, "gelu": 1, "relu": 2, "gelu_tanh": 3}
"""Functions that a kernel can apply to what it returns."""

_DEPTH = 64
"""The depth is padded to a multiple of this many weights."""
_WIDEST = 32768
"""Inputs up to which sums of codes stay below 2^24, for three steps of weight."""


@dataclass(frozen=True)
class Native:
    """Whether the compiled kernels serve here.

    Attributes:
        isas: Instruction sets that this processor runs, best first; empty where they do not serve.
        index: Which of them is used.
        reason: Why, as the end of a sentence.
        has_block: Whether an encoder block goes with the instruction set in use.
    """

    isas: tuple[str, ...]
    index: int
    reason: str
    has_block: bool = False

    @property
    def active(self) -> bool:
        """Whether they serve."""
        return bool(self.isas)

    @property
    def isa(self) -> str:
        """The instruction set in use, ``"torch"`` without compiled kernels."""
        return self.isas[self.index] if self.isas else "torch"


@functools.cache
def native() -> Native:
    """Loads the kernels, compiling them at the first call on a machine.

    ``TUTELAGE_NATIVE=0`` switches them off; ``TUTELAGE_ISA`` names the instruction set to use.
    """
    if os.environ.get("TUTELAGE_NATIVE", "1") == "0":
        return Native((), 0, "TUTELAGE_NATIVE=0 switches them off")
    try:
        path = library()
        torch.ops.load_library(path)
    except (BuildError, OSError) as error:
        return Native((), 0, str(error))
    _register_fake()
    loaded = ctypes.CDLL(str(path))
    name_of, has_block = loaded.tutelage_isa, loaded.tutelage_has_block
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.c_int64]
    has_block.restype, has_block.argtypes = ctypes.c_int, [ctypes.c_int64]
    isas: list[str] = []
    while (name := name_of(len(isas))) is not None:
        isas.append(name.decode())
    wanted = os.environ.get("TUTELAGE_ISA", isas[0])
    if wanted not in isas:
        known = ", ".join(isas)
        return Native((), 0, f"TUTELAGE_ISA is {wanted!r}, this processor runs {known}")
    index = isas.index(wanted)
    reason = f"this processor runs {', '.join(isas)}"
    if "TUTELAGE_ISA" in os.environ:
        reason = f"TUTELAGE_ISA={wanted}"
    return Native(tuple(isas), index, reason, bool(has_block(index)))


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def isa_index() -> int:
    """Returns the index of the instruction set in use, -1 without compiled kernels."""
    return native().index if native().active else -1


def active() -> bool:
    """Whether compiled kernels serve here; torch.compile and torch.export may ask it."""
    return isa_index() >= 0


def _register_fake() -> None:
    def fake(
        x: Tensor, panels: Tensor, scale: Tensor, bias: Tensor | None, rows: int, *_: int
    ) -> Tensor:
        return x.new_empty((*x.shape[:-1], rows))

    def fake_block(x: Tensor, *_: object) -> Tensor:
        return torch.empty_like(x)

    torch.library.register_fake("tutelage::packed_linear", fake)
    torch.library.register_fake("tutelage::encoder_block", fake_block)


def panel_bytes(rows: int, width: int, bits: int) -> int:
    """Returns the bytes of a weight in panels.

    Args:
        rows: Output features.
        width: Input features.
        bits: 1 or 2.
    """
    return -(-rows // (16 * (8 // bits))) * -(-width // _DEPTH) * _DEPTH * 16


def to_panels(index: UInt8[Tensor, "rows width"], bits: int) -> UInt8[Tensor, " bytes"]:
    """Arranges codes as the kernels read them.

    A panel covers 16 outputs for each of the 8 / bits fields of a byte, and is an array
    (depth / 4, 64): byte 4 i + c of row r holds codes of output i + 16 j and depth 4 r + c, those
    of group j at bit j * bits.

    Args:
        index: Codes as (code - lo) / step.
        bits: 1 or 2.

    Returns:
        The panels one after the other; rows and depth are filled up with zeros.
    """
    groups = 8 // bits
    rows, width = index.shape
    index = torch.nn.functional.pad(index, (0, -width % _DEPTH, 0, -rows % (16 * groups)))
    split = index.reshape(index.shape[0] // (16 * groups), groups, 16, index.shape[1] // 4, 4)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    # A group at a time: the shifted copy of a whole table would take eight times its bytes.
    panels = torch.zeros_like(split[:, 0])
    for group in range(groups):
        panels |= split[:, group] << shifts[group]
    return panels.permute(0, 2, 1, 3).reshape(-1).contiguous()


def packed_linear(
    x: Float[Tensor, "*batch in_features"],
    panels: UInt8[Tensor, " bytes"],
    scale: Float[Tensor, "scales 1"],
    bias: Float[Tensor, " out_features"] | None,
    rows: int,
    width: int,
    grid: Grid,
    levels: int,
    activation: str = "none",
    isa: int | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """Quantizes ``x`` per row and multiplies it with a packed weight, in compiled code.

    ``((codes_x @ codes_w.T) * scale_x) * scale_w + bias``, bit for bit what
    ``scaled_integer_linear`` computes of ``UniformQuantizer.quantize(x)``, then the activation.

    Args:
        x: Float32 on the CPU.
        panels: Made by ``to_panels``.
        scale: Of the weight, float32, (rows, 1) or (1, 1).
        bias: Float32, or ``None``.
        rows: Output features.
        width: Input features.
        grid: Of the weight.
        levels: Codes of ``x`` reach from -levels to levels, at most 127.
        activation: Applied to the result, one of ``ACTIVATIONS``.
        isa: Index into ``native().isas``, by default the one in use.
    """
    return torch.ops.tutelage.packed_linear(
        x.detach().contiguous(),
        panels,
        scale,
        bias,
        rows,
        width,
        grid.bits,
        grid.step,
        grid.lo,
        levels,
        ACTIVATIONS[activation],
        isa_index() if isa is None else isa,
    )


def encoder_block(
    x: Float[Tensor, "batch tokens hidden"],
    mask: Float[Tensor, "_ 1 queries tokens"] | None,
    tensors: list[Tensor],
    shapes: list[int],
    settings: list[int],
    numbers: list[float],
) -> Float[Tensor, "batch tokens hidden"]:
    """Computes a Transformer encoder block whose six Linears and attention are quantized.

    Linears: query, key, value, output, up, down.

    Args:
        x: Float32 on the CPU.
        mask: Added to the scores, for each query or for all of them; or ``None``.
        tensors: For each Linear its panels, scale and bias (empty for none), then weight and bias
            of the first and of the second layer norm.
        shapes: For each Linear rows, width, bits, and step and lowest code of its grid.
        settings: Heads, width of a head, 1 for norms before attention and feed-forward network
            (0 for after the residual sums), activation, levels of the inputs of Linears, of Q, K,
            V and the attention map, index of the instruction set.
        numbers: Factor of the scores, epsilon of the first and of the second norm.
    """
    return torch.ops.tutelage.encoder_block(
        x.detach().contiguous(), mask, tensors, shapes, settings, numbers
    )


def fits(width: int) -> bool:
    """Whether a weight of that many input features is within what the kernels sum exactly."""
    return width <= _WIDEST
