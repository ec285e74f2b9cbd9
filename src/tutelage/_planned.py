"""The tensors a packed file of a model would hold, computed from shapes alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import nn

from .quantizers import Encoding, packed_width
from .scheme import WEIGHT_QUANTIZERS, ModuleSpec

__all__ = ["Plan", "Rest", "bytes_of", "header_bytes", "planned_tensors"]

Rest = Literal["float32", "bfloat16"]
"""How all that is not quantized is stored."""

_WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "BF16": 2, "I32": 4, "F32": 4, "F64": 8, "I64": 8}
"""Bytes an element by dtype, in the order in which safetensors puts them, last to first."""

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.float64: "F64",
    torch.int64: "I64",
}

Plan = dict[str, tuple[str, tuple[int, ...]]]
"""From a tensor's name to dtype and shape."""


def planned_tensors(
    model: nn.Module, specs: Mapping[str, ModuleSpec], encoding: Encoding, rest: Rest
) -> Plan:
    """Returns safetensors' name of the dtype, and the shape, of every tensor to be stored.

    Args:
        model: The full-precision model, on any device, meta included.
        specs: How its modules would be quantized, attention left out.
        encoding: How codes would be stored.
        rest: Dtype of what would not be quantized.
    """
    from .artefacts._hollow import not_stored

    state = dict(model.state_dict())
    found: Plan = {}
    packed = {f"{name}.weight" for name in specs}
    loose = not_stored(model, state)
    for name, tensor in state.items():
        if name not in packed and name not in loose:
            floating = "F32" if rest == "float32" else "BF16"
            dtype = _NAMES.get(tensor.dtype, floating)
            found[name] = (dtype, tuple(tensor.shape))
    for name, spec in specs.items():
        if spec.shared_with is None:
            rows, width = _rows(state[f"{name}.weight"].shape, spec)
            weight = cast("Any", spec.weight)
            size = rows * packed_width(width, WEIGHT_QUANTIZERS[weight.kind].grid, encoding)
            found[f"{name}.weight"] = ("U8", (size,))
            scales = rows if weight.granularity == "row" else 1
            found[f"{name}.weight_scale"] = ("F32", (scales, 1))
    return found


def _rows(shape: torch.Size, spec: ModuleSpec) -> tuple[int, int]:
    """Returns rows and codes a row of a weight."""
    if spec.kind == "conv1d":
        return shape[1], shape[0]
    return shape[0], shape[1:].numel()


def bytes_of(dtype: str, shape: Iterable[int]) -> int:
    """Returns the bytes of a tensor.

    Args:
        dtype: Its dtype, as safetensors calls it.
        shape: Its shape.
    """
    return _WIDTHS[dtype] * torch.Size(shape).numel()


def header_bytes(tensors: Plan) -> int:
    """Returns the bytes of the header that safetensors would write, its own length included.

    Args:
        tensors: What ``planned_tensors`` returns.
    """
    from .artefacts._huggingface import FORMAT_VERSION
    from .artefacts._verify import metadata_of

    digests = dict.fromkeys(tensors, "0" * 16)
    metadata = metadata_of(digests, {}, FORMAT_VERSION) | {"format": "pt"}
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    ranks = {dtype: rank for rank, dtype in enumerate(_WIDTHS)}
    for name, (dtype, shape) in sorted(
        tensors.items(), key=lambda item: (-ranks[item[1][0]], item[0])
    ):
        start, end = end, end + bytes_of(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8
