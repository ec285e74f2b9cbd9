"""The one way into every format."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..errors import ExportError, nearest

__all__ = ["FORMATS", "export"]

FORMATS: dict[str, str] = {
    "compressed-tensors": "_compressed_tensors",
    "gguf": "_gguf",
    "onnx": "_onnx",
    "openvino": "_openvino",
}
"""Formats by name, and the module here whose ``write`` makes each; add yours."""


def export(
    student: nn.Module,
    path: str | Path,
    *,
    format: str,
    processor: Any = None,
    overwrite: bool = False,
    **options: Any,
) -> Path:
    """Writes a student in the format of another engine.

    What appears under ``path`` appears whole or not at all. docs/deploy.md says of every format
    who loads it, and whether it computes exactly what the student does or how close it comes.

    Args:
        student: A model made by ``tutelage.prepare``, or a packed one from ``tutelage.load``.
        path: What to write: a file for ``"openvino"`` (.xml, with a .bin beside it), ``"onnx"``
            and ``"gguf"``, a folder for ``"compressed-tensors"``.
        format: ``"openvino"``, ``"onnx"``, ``"compressed-tensors"`` or ``"gguf"``.
        processor: Tokenizer, for formats that store one; by default the one beside the weights
            the model was loaded from.
        overwrite: Replace what stands at ``path``.
        **options: What the format's own ``write`` takes besides.

    Returns:
        The path that was written.

    Raises:
        ExportError: There is no such format, its library is not installed, or the model cannot
            be expressed in it.
        OutputExistsError: Something stands at ``path`` and ``overwrite`` is off.
        UnsupportedModelError: The model is neither prepared nor packed.
    """
    if format not in FORMATS:
        known = ", ".join(map(repr, FORMATS))
        raise ExportError(
            f"there is no format {format!r}; use one of {known}.{nearest(format, FORMATS)}"
        )
    module = importlib.import_module(f".{FORMATS[format]}", __package__)
    write = cast("Callable[..., Path]", module.write)
    return write(student, Path(path), processor=processor, overwrite=overwrite, **options)
