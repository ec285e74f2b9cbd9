"""Whether the Triton kernels serve on a device, and why not."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import Tensor

__all__ = ["serves", "triton_status"]

_INSTALLED = importlib.util.find_spec("triton") is not None
_REASONS: dict[int, str] = {}


def triton_status(device: torch.device | str | None = None) -> str:
    """Says whether packed layers on a CUDA device run on the Triton kernels.

    Args:
        device: By default the current CUDA device, if there is one.

    Returns:
        ``"active: ..."`` with Triton's version and the device, or ``"inactive: ..."`` with the
        reason; inactive means that packed layers run in plain torch there, with equal results.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    reason = _outside_reason(device) or _reason(device)
    if reason:
        return f"inactive: {reason}"
    import triton

    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return f"active: Triton {triton.__version__} on {name} (sm_{major}{minor})"


def serves(device: torch.device) -> bool:
    """Whether the kernels serve on a device; they are tried there at the first call.

    Args:
        device: Where the operands are.
    """
    if _outside_reason(device):
        return False
    if torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        # Nothing can be tried while a graph is recorded: taken to serve unless known better.
        return not _REASONS.get(_index(device), "")
    return not _reason(device)


def _outside_reason(device: torch.device) -> str:
    if os.environ.get("TUTELAGE_TRITON", "1") == "0":
        return "TUTELAGE_TRITON=0 switches the kernels off"
    if device.type != "cuda":
        return f"the kernels need a CUDA device, and this one is {device.type!r}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not _INSTALLED:
        return "triton is not installed; pip install triton"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA devices, and this is ROCm"
    return ""


def _index(device: torch.device) -> int:
    index: int | None = device.index  # torch's stubs forget None
    return torch.cuda.current_device() if index is None else index


def _reason(device: torch.device) -> str:
    index = _index(device)
    if index not in _REASONS:
        _REASONS[index] = _tried(torch.device("cuda", index))
    return _REASONS[index]


def _tried(device: torch.device) -> str:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0, and this device has {capability}"
    try:
        wrong = _check(device)
    except Exception as error:  # a missing C compiler or driver shows itself in many types
        reason = f"Triton failed at a first kernel: {type(error).__name__}: {error}"
    else:
        if not wrong:
            return ""
        reason = f"a first product was wrong ({wrong})"
    warnings.warn(f"Packed layers run in plain torch: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _check(device: torch.device) -> str:
    """Runs each kernel on a small product of integers and compares it with float64."""
    from . import _launch

    rows, width = 48, 160
    place = torch.arange(rows * width, device=device)
    index = (place * 7 // 3 % 3).to(torch.uint8).reshape(rows, width // 4, 4)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=device)
    packed = (index << shifts).sum(-1, dtype=torch.uint8)
    codes = index.reshape(rows, width).double() - 1
    scale = torch.full((1, 1), 0.5, device=device)
    weight: dict[str, Any] = {"width": width, "bits": 2, "lo": -1, "step": 1, "tuned": False}
    for tokens in (1, 5):
        x = (place[: tokens * width] * 37 % 255 - 127).reshape(tokens, width)
        x[:, 0] = 127  # the scale of every token is 1
        expected: Tensor = (x.double() @ codes.t() * 0.5).float()
        y = _launch.quantized(x.float(), packed, scale, None, levels=127, **weight)
        if not torch.equal(y, expected):
            return f"{tokens} quantized tokens"
        if not torch.equal(_launch.weight_only(x.bfloat16(), packed, scale, None, **weight), y):
            return f"{tokens} bfloat16 tokens"
    return ""
