"""The one way into every format."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..errors import ExportError, nearest

__all__ = ["FORMATS", "export"]

FORMATS: dict[str, str] = {
    "packed": "_packed",
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
            and ``"gguf"``, a folder for ``"compressed-tensors"`` and ``"packed"``.
        format: ``"openvino"``, ``"onnx"``, ``"compressed-tensors"`` or ``"gguf"``; ``"packed"``
            is what ``tutelage.save`` writes.
        processor: Tokenizer, for formats that store one; by default the one beside the weights
            the model was loaded from.
        overwrite: Replace what stands at ``path``.
        **options: What the format takes besides: ``encoding`` and ``rest`` (packed, see
            ``tutelage.save``), ``kernel`` and ``quantized_attention`` (ONNX),
            ``quantized_attention`` (OpenVINO), ``activations`` (compressed-tensors), ``encoding``
            and ``pre_tokenizer`` (GGUF).

    Returns:
        The path that was written.

    Raises:
        ExportError: There is no such format or option, its library is not installed, or the model
            cannot be expressed in it.
        OutputExistsError: Something stands at ``path`` and ``overwrite`` is off.
        UnsupportedModelError: The model is neither prepared nor packed.
    """
    if format not in FORMATS:
        raise ExportError(
            f"there is no format {format!r}; use one of {', '.join(map(repr, FORMATS))}."
            f"{nearest(format, FORMATS)}"
        )
    module = importlib.import_module(f".{FORMATS[format]}", __package__)
    write = cast("Callable[..., Path]", module.write)
    _refuse_options(format, write, options)
    return write(student, Path(path), processor=processor, overwrite=overwrite, **options)


def _refuse_options(format: str, write: Callable[..., Path], options: dict[str, Any]) -> None:
    known = dict(list(inspect.signature(write).parameters.items())[4:])
    for name, value in options.items():
        if name not in known:
            raise ExportError(
                f"the format {format!r} has no option {name!r}; use one of "
                f"{', '.join(map(repr, known))}.{nearest(name, known)}"
            )
        if isinstance(known[name].default, bool) and not isinstance(value, bool):
            raise ExportError(f"{name} is {value!r}; use true or false.")
