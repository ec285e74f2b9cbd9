"""Reading what files declare, bounded and strict, before anything is believed or allocated."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import ArtefactError

__all__ = ["LARGEST_TEXT", "Header", "Stored", "parse", "read_header", "read_json", "stored_digest"]

LARGEST_TEXT = 2**24
"""Bytes of JSON that are read at most, of a configuration as of a header of safetensors."""

_CHUNK = 2**20
_TYPES = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
}
"""From safetensors' names to torch's, and to bytes an element."""


@dataclass(frozen=True)
class Stored:
    """A tensor as a header declares it.

    Attributes:
        name: Its name.
        dtype: Name of the dtype in torch, such as ``"float32"``.
        shape: Its shape.
        start: Its first byte in the file.
        bytes: Its size.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        file: The file.
        bytes: Bytes before the first tensor.
        metadata: Text by name.
        tensors: In the order of the file; they fill the rest of it without gaps.
    """

    file: Path
    bytes: int
    metadata: dict[str, str]
    tensors: tuple[Stored, ...]


def parse(text: bytes | str) -> Any:
    """Returns the content of a JSON text.

    Args:
        text: The text; bytes are UTF-8.

    Raises:
        ValueError: It is no JSON, names a key twice, is nested too deeply, or holds NaN.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(decoded, object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("it names a key twice")
    return found


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def read_json(file: Path) -> Any:
    """Returns the content of a JSON file.

    Args:
        file: The file.

    Raises:
        ArtefactError: It cannot be read, is larger than ``LARGEST_TEXT``, or no JSON.
    """
    try:
        with file.open("rb") as handle:
            text = handle.read(LARGEST_TEXT + 1)
        if len(text) > LARGEST_TEXT:
            raise ArtefactError(
                f"{file} is larger than {LARGEST_TEXT:,} bytes; restore it from a good copy."
            )
        return parse(text)
    except ValueError as error:
        raise ArtefactError(f"{file} is no valid JSON ({error}).") from error
    except OSError as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(f"{file} could not be read ({error.strerror or error}).") from error


def read_header(file: Path) -> Header:
    """Returns the header of a safetensors file; reads no tensor.

    Args:
        file: The file.

    Raises:
        ArtefactError: The file is truncated, or what it declares is not what it holds.
    """
    try:
        if not file.is_file():
            raise ValueError("it is no file")
        size = file.stat().st_size
        with file.open("rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > min(LARGEST_TEXT, size - 8):
                raise ValueError(f"it declares a header of {length:,} bytes")
            entries = parse(handle.read(length))
        return _header(file, 8 + length, size, entries)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, struct.error) as error:
        raise ArtefactError(
            f"{file} is truncated or corrupt ({error}); restore it from a good copy."
        ) from error


def _header(file: Path, start: int, size: int, entries: dict[str, Any]) -> Header:
    metadata = entries.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata are no text")
    tensors = sorted(
        (_stored(name, entry, start) for name, entry in entries.items()),
        key=lambda tensor: (tensor.start, tensor.bytes),
    )
    end = start
    for tensor in tensors:
        if tensor.start != end:
            raise ValueError(f"the tensor {tensor.name!r} does not begin where the last one ends")
        end += tensor.bytes
    if end != size:
        raise ValueError(f"it declares {end:,} bytes and has {size:,}")
    return Header(file, start, metadata, tuple(tensors))


def _stored(name: str, entry: dict[str, Any], offset: int) -> Stored:
    dtype, width = _TYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    elements = 1
    for count in (begin, end, *shape):
        if type(count) is not int or not 0 <= count < 2**63:
            raise ValueError(f"the tensor {name!r} has a size that is none")
    for count in shape:
        elements = min(elements * count, 2**63)
    if end - begin != elements * width:
        raise ValueError(f"the tensor {name!r} has not the bytes of its shape")
    return Stored(name, dtype, shape, offset + begin, end - begin)


def stored_digest(handle: BinaryIO, tensor: Stored) -> str:
    """Returns the digest of a tensor in a file, in constant memory; equal to that of ``digest``.

    Args:
        handle: The file, opened to read bytes.
        tensor: What its header declares.

    Raises:
        ValueError: The file ends before the tensor does.
    """
    found = hashlib.sha256(f"torch.{tensor.dtype}{tensor.shape}".encode())
    handle.seek(tensor.start)
    left = tensor.bytes
    while left:
        chunk = handle.read(min(left, _CHUNK))
        if not chunk:
            raise ValueError(f"it ends within the tensor {tensor.name!r}")
        found.update(chunk)
        left -= len(chunk)
    return found.hexdigest()[:16]
