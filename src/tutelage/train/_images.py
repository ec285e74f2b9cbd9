"""Labelled images from class folders, ``.npz`` files and the `datasets` library."""

from __future__ import annotations

import io
import itertools
import lzma
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ._readers import READERS, file_type, refuse_empty
from ._sections import DataSection
from .data import column_of, read_columns, read_splits, same_source

__all__ = ["ImageExamples", "open_image", "read_image_splits", "read_images", "require_pillow"]

Array = npt.NDArray[Any]


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
        and _is_npz(Path(section.eval))
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
            with .xz), see ``_read_npz``; a Parquet file of image files; or a name or path for
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
    if path.is_file() and _is_npz(path):
        return _read_npz(path, source, section, split)
    folders = _class_folders(path) if path.is_dir() else []
    if folders:
        return _read_folder(folders, source, section)
    if path.is_file() and file_type(path) != ".parquet":
        raise DataError(
            f"{source!r} is no data set of images; give a folder of class folders, or a .npz or "
            ".parquet file."
        )
    if not path.exists() and _is_npz(path):
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


def _is_npz(path: Path) -> bool:
    return path.name.lower().removesuffix(".xz").endswith(".npz")


def _read_npz(path: Path, source: str, section: DataSection, split: str) -> ImageExamples:
    """Reads a ``.npz`` file; nothing pickled is ever loaded.

    Its keys are ``images`` (examples, height, width[, channels]) of uint8 and ``labels``
    (examples,); or, for image files in one array of bytes, ``bytes`` (size,) of uint8 and
    ``offsets`` (examples + 1,), image i being ``bytes[offsets[i]:offsets[i + 1]]``. With several
    splits every key begins with the name of its split and an underscore: ``train_images``,
    ``test_labels``. ``classes`` may name the classes that whole-numbered labels count.
    """
    arrays = _arrays(path, source)
    prefix = _prefix(set(arrays), source, section, split)
    labels = None if section.label is None else _npz_labels(arrays, prefix, source)
    images: Sequence[Any]
    if f"{prefix}images" in arrays:
        images = list(_pixels(arrays[f"{prefix}images"], f"{prefix}images", source))
    elif {f"{prefix}bytes", f"{prefix}offsets"} <= set(arrays):
        images = _cut(arrays[f"{prefix}bytes"], arrays[f"{prefix}offsets"], source)
    else:
        raise DataError(
            f"{source!r} holds neither '{prefix}images' nor '{prefix}bytes' with "
            f"'{prefix}offsets' (it holds {', '.join(sorted(arrays)) or 'nothing'}); save the "
            "images under one of these keys."
        )
    if not len(images):
        refuse_empty(source)
    if labels is not None and len(labels) != len(images):
        raise DataError(
            f"{source!r} holds {len(images)} images and {len(labels)} labels; save one label for "
            "each image."
        )
    return ImageExamples(images, labels, source)


def _arrays(path: Path, source: str) -> dict[str, Array]:
    try:
        content = path.read_bytes()
        if path.name.lower().endswith(".xz"):
            content = lzma.decompress(content)
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (
        OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError,
        zipfile.BadZipFile, zlib.error, lzma.LZMAError,
    ) as error:  # fmt: skip
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{source!r} is no .npz file of plain arrays ({lines[0].rstrip('.')[:120]}); save it "
            "again with numpy.savez, or copy it again."
        ) from None


def _prefix(names: set[str], source: str, section: DataSection, split: str) -> str:
    """Returns how the keys of a split begin."""
    wanted = (section.train_split,) if split == "train" else (section.eval_split_name, "test")
    for name in wanted:
        if any(key.startswith(f"{name}_") for key in names):
            return f"{name}_"
    if names & {"images", "bytes"}:
        return ""
    raise DataError(
        f"{source!r} has no split {wanted[0]!r} (it holds {', '.join(sorted(names)) or 'nothing'})"
        f"; set data.{'train_split' if split == 'train' else 'eval_split_name'} to one of its "
        "splits."
    )


def _npz_labels(arrays: dict[str, Array], prefix: str, source: str) -> list[str]:
    labels = arrays.get(f"{prefix}labels")
    if labels is None or labels.ndim != 1 or labels.dtype.kind not in "iuU":
        what = "none" if labels is None else f"{labels.dtype} of shape {labels.shape}"
        raise DataError(
            f"{source!r} needs '{prefix}labels' of shape (examples,), whole numbers or text, and "
            f"holds {what}; add them, or set data.label=null."
        )
    classes = arrays.get("classes")
    if classes is None or labels.dtype.kind == "U":
        return [str(label) for label in labels.tolist()]
    wrong = labels[(labels < 0) | (labels >= len(classes))]
    if len(wrong):
        raise DataError(
            f"{source!r} has the label {wrong[0]}, but 'classes' names {len(classes)}; correct it."
        )
    return [str(classes[label]) for label in labels]


def _pixels(images: Array, key: str, source: str) -> Array:
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[3:] not in (
        (), (1,), (3,), (4,)
    ):  # fmt: skip
        raise DataError(
            f"{key!r} of {source!r} is {images.dtype} of shape {images.shape}; save uint8 of shape "
            "(examples, height, width, channels), channels last."
        )
    return images


def _cut(content: Array, offsets: Array, source: str) -> list[bytes]:
    fits = (
        content.dtype == np.uint8
        and content.ndim == offsets.ndim == 1
        and offsets.dtype.kind in "iu"
        and len(offsets) > 0
        and offsets[0] >= 0
        and bool((offsets[1:] > offsets[:-1]).all())
        and offsets[-1] <= len(content)
    )
    if not fits:
        raise DataError(
            f"the offsets of {source!r} do not cut its bytes into images; save uint8 bytes and "
            "increasing offsets, one more than images."
        )
    raw = content.tobytes()
    return [raw[start:end] for start, end in itertools.pairwise(offsets)]
