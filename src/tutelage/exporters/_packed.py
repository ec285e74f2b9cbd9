"""The library's own format, in another encoding for instance."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import nn

from ..artefacts import save
from ..quantizers import Encoding

__all__ = ["write"]


def write(
    student: nn.Module,
    path: Path,
    *,
    processor: Any = None,
    overwrite: bool = False,
    encoding: Encoding = "bits",
    rest: Literal["float32", "bfloat16"] = "float32",
) -> Path:
    """Writes a folder as ``tutelage.save`` does.

    Args:
        student: A student or packed model.
        path: The folder.
        processor: As in ``save``.
        overwrite: As in ``save``.
        encoding: As in ``save``.
        rest: As in ``save``.
    """
    return save(
        student, path, processor=processor, overwrite=overwrite, encoding=encoding, rest=rest
    )
