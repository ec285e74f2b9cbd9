"""The machine that figures are of."""

from __future__ import annotations

import contextlib
import os
import platform
from typing import Any

__all__ = ["machine", "processor_name"]


def processor_name() -> str:
    """Returns the processor's name as the system gives it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Returns processor and cores, and the GPU where torch would use one."""
    import torch

    found: dict[str, Any] = {"processor": processor_name(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found
