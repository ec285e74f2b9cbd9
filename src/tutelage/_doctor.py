"""What is active here and why: versions, kernels, libraries for other formats."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from .kernels import active_path, cache_folder, native, triton_status

__all__ = ["Finding", "examine"]

_LIBRARIES = ("openvino", "onnx", "onnxruntime", "onnxscript", "gguf", "compressed-tensors")


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        subject: What was looked at.
        state: What was found, such as a version or the path in use.
        reason: Why, or what would change it; may be empty.
    """

    subject: str
    state: str
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self)


def examine() -> list[Finding]:
    """Looks at versions, kernels and libraries; compiles the CPU kernels where that is due."""
    from . import __version__

    found = [
        Finding("tutelage", __version__),
        Finding("python", platform.python_version(), platform.platform()),
        Finding("torch", torch.__version__, f"{torch.get_num_threads()} threads"),
        Finding("transformers", _version("transformers")),
    ]
    cpu = native()
    if cpu.active:
        found.append(Finding("CPU kernels", f"compiled, {cpu.isa}", cpu.reason))
        found.append(Finding("kernel cache", str(cache_folder())))
    else:
        path = "torch._int_mm" if active_path(torch.device("cpu")) == "int8" else "float32 products"
        found.append(Finding("CPU kernels", f"torch, {path}", cpu.reason))
    block = "available (tutelage.fuse)" if cpu.has_block else "not available"
    why = "" if cpu.has_block else "they need compiled kernels and AVX-512 VNNI"
    found.append(Finding("fused encoder blocks", block, why))
    state, _, why = triton_status().partition(": ")
    found.append(Finding("CUDA kernels", state, why))
    for name in _LIBRARIES:
        state = _version(name)
        why = "" if state != "not installed" else f"pip install {name}"
        found.append(Finding(name, state, why))
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
