"""Tokenizers and image processors beside an exported model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["store_processor"]


def store_processor(student: nn.Module, processor: Any, folder: Path) -> None:
    """Stores what makes inputs of text or images.

    Args:
        student: A transformers model.
        processor: Tokenizer or image processor, ``None`` for the one beside the model's weights.
        folder: Where to write its files; none are written where there is no processor.
    """
    from ..artefacts._artefact import _copy_image_processor, processor_of

    processor = processor if processor is not None else processor_of(student)
    if processor is not None:
        processor.save_pretrained(folder)
    else:
        _copy_image_processor(student, folder)
