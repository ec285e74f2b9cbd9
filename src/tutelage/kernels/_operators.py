"""The passes of a training step as operators of torch: schemas and shapes.

The compiled library holds them for the CPU, Triton for CUDA devices; both load when one is called.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["LIBRARY"]

LIBRARY = torch.library.Library("tutelage", "FRAGMENT")
"""Keeps the operators registered."""

_SCHEMAS = {
    "quantize_uniform": "Tensor x, Tensor? factor, int levels, bool has_sign, Tensor(a!) codes, "
    "Tensor(b!) scale, int isa",
    "quantize_weight": "Tensor x, int kind, float threshold, Tensor(a!) codes, Tensor(b!) scale, "
    "int isa",
    "scale_codes": "Tensor codes, Tensor scale, Tensor(a!) out, int isa",
    "scale_sums": "Tensor(a!) sums, Tensor row_scale, Tensor column_scale, Tensor? bias, int isa",
    "squared_error": "Tensor own, Tensor other, Tensor? mask, Tensor(a!) out, int isa",
    "squared_error_backward": "Tensor own, Tensor other, Tensor? mask, Tensor gain, "
    "Tensor(a!) out, int isa",
}


def _register(name: str, schema: str) -> None:
    def on_cuda(*operands: Any) -> None:
        from ._triton import _row_launch

        getattr(_row_launch, name)(*operands)

    LIBRARY.define(f"{name}({schema}) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"tutelage::{name}", lambda *_: None, lib=LIBRARY)


for _name, _schema in _SCHEMAS.items():
    _register(_name, _schema)
