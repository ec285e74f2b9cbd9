"""Labelled images in ``.npz`` files."""

from __future__ import annotations

import io
import itertools
import lzma
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ._readers import refuse_empty
from ._sections import DataSection

__all__ = ["is_npz", "read_npz"]

Array = npt.NDArray[Any]


def is_npz(path: Path) -> bool:
    """Returns whether a file is named as one of arrays."""
    return path.name.lower().removesuffix(".xz").endswith(".npz")


def read_npz(
    path: Path, source: str, section: DataSection, split: str
) -> tuple[Sequence[Any], list[str] | None]:
    """Reads a ``.npz`` file; nothing pickled is ever loaded.

    Its keys are ``images`` (examples, height, width[, channels]) of uint8 and ``labels``
    (examples,); or, for image files in one array of bytes, ``bytes`` (size,) of uint8 and
    ``offsets`` (examples + 1,), image i being ``bytes[offsets[i]:offsets[i + 1]]``. With several
    splits every key begins with the name of its split and an underscore: ``train_images``,
    ``test_labels``. ``classes`` may name the classes that whole-numbered labels count.

    Args:
        path: The file, also with .xz.
        source: What error messages call it.
        section: The recipe's data section: split names, and whether there are labels.
        split: ``"train"`` or ``"eval"``.

    Returns:
        The images, arrays or bytes; and their labels, None for data without labels.

    Raises:
        DataError: The file is corrupt, pickled, or laid out in another way.
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
    return images, labels


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
