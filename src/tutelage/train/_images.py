"""Labelled images from class folders, ``.npz`` files and the `datasets` library."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import DataError
from ._npz import is_npz, read_npz
from ._readers import READERS, file_type
from ._sections import DataSection
from ._split import read_splits, same_source
from .data import column_of, read_columns

__all__ = ["ImageExamples", "open_image", "read_image_splits", "read_images", "require_pillow"]


@dataclass(frozen=True)
class ImageExamples:
    """Labelled images.

    Attributes:
        images: One image per example: an array (height, width) or (height, width, channels) of
            uint8, the bytes or the path of an image file, or an image of Pillow.
        labels: One class per example; None for data without labels.
        source: Where they come from, for messages.
    """

    images: Sequence[Any]
    labels: list[str] | None
    source: str

    def __len__(self) -> int:
        return len(self.images)

    def select(self, indices: Sequence[int]) -> ImageExamples:
        """Returns the examples at the given positions.

        Args:
            indices: Positions, in the order wanted.
        """
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        return ImageExamples([self.images[i] for i in indices], labels, self.source)


def require_pillow() -> None:
    """Refuses to work on images without Pillow.

    Raises:
        DataError: It is not installed.
    """
    try:
        import PIL.Image  # noqa: F401
    except ImportError:
        raise DataError(
            "images are decoded and resized by the package 'Pillow'; run: "
            "pip install 'tutelage[images]'."
        ) from None


def open_image(image: Any, mode: str, place: str) -> Any:
    """Returns an image of Pillow.

    Args:
        image: What ``ImageExamples.images`` holds.
        mode: ``"RGB"``, or ``"L"`` for one channel.
        place: What error messages call the image.

    Raises:
        DataError: It is no image, or truncated.
    """
    from PIL import Image

    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    try:
        if isinstance(image, np.ndarray):
            return Image.fromarray(image.squeeze(-1) if image.shape[2:] == (1,) else image).convert(
                mode
            )
        if isinstance(image, Image.Image):
            return image.convert(mode)
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            return opened.convert(mode)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        SyntaxError,
        Image.DecompressionBombError,
    ):
        raise DataError(
            f"{place} is no image that Pillow can read, or truncated; copy it again or remove it."
        ) from None


def read_image_splits(section: DataSection) -> tuple[ImageExamples, ImageExamples]:
    """Reads the training and the evaluation images of a recipe.

    A ``.npz`` file may hold both. Where the recipe names no evaluation data, or the same folder
    twice, a part of the training examples is kept for evaluation, as ``eval_split`` says.

    Args:
        section: The recipe's data section.

    Raises:
        DataError: Data are missing, empty, unreadable or malformed.
    """
    if (
        section.eval is not None
        and section.eval_split is None
        and same_source(section.train, section.eval)
        and is_npz(Path(section.eval))
    ):
        return (
            read_images(section.train, section, split="train"),
            read_images(section.eval, section, split="eval"),
        )
    return read_splits(section, read_images)


def read_images(
    source: str, section: DataSection, *, split: Literal["train", "eval"] = "train"
) -> ImageExamples:
    """Reads labelled images.

    Args:
        source: A folder that holds one folder of image files per class; a ``.npz`` file (also
            with .xz), see ``read_npz``; a Parquet file of image files; or a name or path for
            `datasets`, optionally ``name:config``.
        section: The recipe's data section: columns and split names.
        split: Which split is read from a file or name that has several.

    Raises:
        DataError: The source is missing, empty, unreadable or malformed.
    """
    if not source:
        raise DataError("a path or name of data is empty; set data.train and data.eval.")
    require_pillow()
    path = Path(source).expanduser()
    if path.is_file() and is_npz(path):
        return ImageExamples(*read_npz(path, source, section, split), source)
    folders = _class_folders(path) if path.is_dir() else []
    if folders:
        return _read_folder(folders, source, section)
    if path.is_file() and file_type(path) != ".parquet":
        raise DataError(
            f"{source!r} is no data set of images; give a folder of class folders, or a .npz or "
            ".parquet file."
        )
    if not path.exists() and is_npz(path):
        raise DataError(f"there is no file or folder {source!r}; check the path.")
    columns = read_columns(source, section, split=split)
    images = column_of(columns, section.text, "text", source)
    if section.label is None:
        return ImageExamples(images, None, source)
    labels = column_of(columns, section.label, "label", source)
    return ImageExamples(
        images, [_class(label, row, source) for row, label in enumerate(labels, 1)], source
    )


def _class(label: Any, row: int, source: str) -> str:
    if not isinstance(label, str | int) or not str(label).strip():
        raise DataError(
            f"row {row} of {source!r} has the label {label!r}; give a class name or number."
        )
    return str(label).strip()


def _class_folders(path: Path) -> list[Path]:
    """Returns the class folders, none if the folder is one of the datasets library."""
    files = [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
    if any(file_type(p) in (*READERS, ".arrow") for p in files):
        return []
    return sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] not in "._")


def _read_folder(folders: list[Path], source: str, section: DataSection) -> ImageExamples:
    images: list[str] = []
    labels: list[str] = []
    for folder in folders:
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        if not files:
            raise DataError(
                f"the class folder {str(folder)!r} holds no image files; fill or remove it."
            )
        images += map(str, files)
        labels += [folder.name] * len(files)
    return ImageExamples(images, None if section.label is None else labels, source)
