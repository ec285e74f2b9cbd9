"""The kernels as operators of torch: schemas and shapes here, Triton when one is called."""

from __future__ import annotations

import os

import torch
from torch import Tensor

__all__ = ["LIBRARY"]

LIBRARY = torch.library.Library("tutelage", "FRAGMENT")
"""Keeps the operators registered."""

_TAGS = (torch.Tag.pt2_compliant_tag,)

LIBRARY.define(
    "triton_packed_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, int width, "
    "int bits, int lo, int step, int levels) -> Tensor",
    tags=_TAGS,
)
LIBRARY.define(
    "triton_weight_only_linear(Tensor x, Tensor packed, Tensor weight_scale, Tensor? bias, "
    "int width, int bits, int lo, int step) -> Tensor",
    tags=_TAGS,
)


def _quantized(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    width: int,
    bits: int,
    lo: int,
    step: int,
    levels: int,
) -> Tensor:
    from . import _launch

    return _launch.quantized(x, packed, weight_scale, bias, width, bits, lo, step, levels)


def _weight_only(
    x: Tensor,
    packed: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    width: int,
    bits: int,
    lo: int,
    step: int,
) -> Tensor:
    from . import _launch

    return _launch.weight_only(x, packed, weight_scale, bias, width, bits, lo, step)


def _fake(x: Tensor, packed: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]), dtype=torch.float32)


# Triton's interpreter runs on tensors of the CPU.
_KEYS = ("CUDA", "CPU") if os.environ.get("TRITON_INTERPRET") == "1" else ("CUDA",)
for _name, _run in (
    ("triton_packed_linear", _quantized),
    ("triton_weight_only_linear", _weight_only),
):
    for _key in _KEYS:
        LIBRARY.impl(_name, _run, _key)
    torch.library.register_fake(f"tutelage::{_name}", _fake, lib=LIBRARY)
