"""The engines that are measured; add yours."""

from __future__ import annotations

from ..errors import BenchError, nearest
from ._engine import Engine
from ._exported import ExportedOnnx, ExportedOpenvino
from ._onnx import OnnxInt8
from ._openvino import OpenvinoDefault, OpenvinoInt8
from ._torch import BFloat16, Float32, Student, StudentFused, TorchInt8

__all__ = ["ENGINES", "chosen"]

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Student(),
        StudentFused(),
        ExportedOpenvino(),
        ExportedOnnx(),
        Float32(),
        BFloat16(),
        TorchInt8(),
        OnnxInt8(),
        OpenvinoInt8(),
        OpenvinoDefault(),
    )
}
"""Engines by name, in the order of the table."""


def chosen(names: str | None) -> tuple[str, ...]:
    """Reads names of engines.

    Args:
        names: Separated by commas, ``None`` for all.

    Raises:
        BenchError: There is no such engine.
    """
    if names is None:
        return tuple(ENGINES)
    wanted = dict.fromkeys(name.strip() for name in names.split(","))
    for name in wanted:
        if name not in ENGINES:
            raise BenchError(
                f"there is no engine {name!r}; use some of {', '.join(ENGINES)}."
                f"{nearest(name, ENGINES)}"
            )
    return tuple(name for name in ENGINES if name in wanted)
