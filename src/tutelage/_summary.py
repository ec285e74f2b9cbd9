"""What a student consists of: every module with its bits and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import nn

from ._prepare import prepared
from .errors import UnsupportedModelError
from .nn import QuantWeight
from .quantizers import Encoding, packed_width
from .scheme import WEIGHT_QUANTIZERS

__all__ = ["Summary", "SummaryRow", "summary"]


@dataclass(frozen=True)
class SummaryRow:
    """One line of a summary.

    Attributes:
        module: Qualified name; ``"(full precision)"`` for all that is not quantized.
        scheme: How it is quantized.
        bits: Bits of one packed weight code, 32 for full precision.
        packed_bytes: Bytes on disk: codes and scales, without the bias; 0 where the module
            shares the weight of another.
        float_bytes: Bytes of the same in float32; 0 likewise.
    """

    module: str
    scheme: str
    bits: int
    packed_bytes: int
    float_bytes: int


@dataclass(frozen=True)
class Summary:
    """What ``summary`` returns; printing it shows a table.

    Attributes:
        rows: One per quantized module that holds weights, and one for the rest.
    """

    rows: tuple[SummaryRow, ...]

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed model."""
        return sum(row.packed_bytes for row in self.rows)

    @property
    def float_bytes(self) -> int:
        """Bytes of the model in float32."""
        return sum(row.float_bytes for row in self.rows)

    def __str__(self) -> str:
        """Returns the table."""
        width = max(len(row.module) for row in self.rows)
        kinds = max(len(row.scheme) for row in self.rows)
        lines = [f"{'module':<{width}}  {'scheme':<{kinds}}  bits  packed bytes  float32 bytes"]
        lines += [
            f"{row.module:<{width}}  {row.scheme:<{kinds}}  {row.bits:>4}  "
            f"{row.packed_bytes:>12,}  {row.float_bytes:>13,}"
            for row in self.rows
        ]
        ratio = self.float_bytes / self.packed_bytes
        lines.append(
            f"{self.packed_bytes:,} of {self.float_bytes:,} bytes: {ratio:.1f} times smaller"
        )
        return "\n".join(lines)


def summary(
    student: nn.Module,
    encoding: Encoding = "bits",
    rest: Literal["float32", "bfloat16"] = "float32",
) -> Summary:
    """Lists every quantized module of a student with its scheme, bits and packed size.

    Args:
        student: A model made by ``prepare``.
        encoding: How codes become bytes, as in ``save``.
        rest: Dtype of all that is not quantized, as in ``save``.

    Raises:
        UnsupportedModelError: The model was not prepared.
    """
    state = prepared(student)
    if state is None:
        raise UnsupportedModelError(
            f"{type(student).__name__} is not prepared; call tutelage.prepare(model, scheme)."
        )
    lines, counted = [], 0
    for name, spec in state.modules.items():
        if spec.weight is None:
            continue
        module = cast("QuantWeight", student.get_submodule(name))
        rows, width = module.weight_rows().shape
        grid = WEIGHT_QUANTIZERS[spec.weight.kind].grid
        scales = rows if spec.weight.granularity == "row" else 1
        text = f"{spec.weight.kind} per {spec.weight.granularity}"
        if spec.input is not None:
            text += f", input {spec.input.bits} bits"
        if spec.shared_with is not None:
            lines.append(
                SummaryRow(name, f"{text}, shared with {spec.shared_with}", grid.bits, 0, 0)
            )
            continue
        packed = rows * packed_width(width, grid, encoding) + 4 * scales
        lines.append(SummaryRow(name, text, grid.bits, packed, 4 * rows * width))
        counted += rows * width
    others = sum(p.numel() for p in student.parameters()) - counted
    size = 4 if rest == "float32" else 2
    lines.append(SummaryRow("(full precision)", rest, 8 * size, size * others, 4 * others))
    return Summary(tuple(lines))
