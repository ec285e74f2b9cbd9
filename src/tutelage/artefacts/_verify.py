"""Packed files are compared with the digests they carry before a model is built from them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ArtefactError
from ._pack import METADATA_KEY, config_digest, weights_digest
from ._reader import Header, parse, read_header, read_json, stored_digest

__all__ = ["metadata_of", "verify_config", "verify_files"]


def verify_config(header: Header) -> dict[str, str]:
    """Compares the ``config.json`` beside a packed file with the digest that the file carries.

    Args:
        header: The header of the packed file.

    Returns:
        The digest of every tensor of the model, by name.

    Raises:
        ArtefactError: The file carries no digests, edited ones, or those of another configuration.
    """
    file = header.file
    if METADATA_KEY not in header.metadata:
        raise ArtefactError(f"{file} carries no digests; save the model again.")
    config = read_json(file.parent / "config.json")
    try:
        record = parse(header.metadata[METADATA_KEY])
        if record is None:
            raise ArtefactError(f"{file} carries no digests; save the model again.")
        section = _section(config)
        version = section.get("version")
        version = version if type(version) is int else 0
        same = record["config"] == config_digest(config, version)
        if version >= 3:
            same = same and section["weights"] == weights_digest(record["tensors"])
        if not same:
            raise ArtefactError(
                f"{file.parent / 'config.json'} is not the one that {file.name} was saved "
                "with; restore both files from one save."
            )
        return dict(record["tensors"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtefactError(
            f"{file} is truncated or corrupt ({error}); restore it from a good copy."
        ) from error


def _section(config: Any) -> dict[str, Any]:
    section = config.get("quantization_config") if isinstance(config, dict) else None
    return section if isinstance(section, dict) else {}


def verify_files(files: Iterable[Path], weights: str | None = None) -> dict[str, tuple[int, ...]]:
    """Compares packed files, and the ``config.json`` beside them, with the digests they carry.

    First every header and the configuration, then tensor by tensor, in constant memory.

    Args:
        files: The safetensors files of one model.
        weights: The digest of all tensors by a configuration that was read before; ``None`` for
            that of the folder.

    Returns:
        Name and shape of every tensor.

    Raises:
        ArtefactError: A file is truncated, edited or incomplete.
    """
    headers = [read_header(file) for file in files]
    records = [verify_config(header) for header in headers]
    expected = records[0] if records else {}
    for header, record in zip(headers, records, strict=True):
        if record != expected or weights not in (None, weights_digest(record)):
            raise ArtefactError(
                f"{header.file} is of another save than the other files; restore all of them from "
                "one save."
            )
    seen: dict[str, tuple[int, ...]] = {}
    for header in headers:
        _verify_tensors(header, expected, seen)
    missing = sorted(set(expected) - set(seen))
    if missing:
        raise ArtefactError(
            f"the tensor {missing[0]!r} is missing from the files; restore them from a good copy."
        )
    return seen


def _verify_tensors(
    header: Header, expected: dict[str, str], seen: dict[str, tuple[int, ...]]
) -> None:
    file = header.file
    try:
        with file.open("rb") as handle:
            for tensor in header.tensors:
                if tensor.name in seen:
                    raise ValueError(f"the tensor {tensor.name!r} is in another file, too")
                if stored_digest(handle, tensor) != expected.get(tensor.name):
                    raise ArtefactError(
                        f"the tensor {tensor.name!r} in {file} was changed after it was saved; "
                        "restore the file from a good copy."
                    )
                seen[tensor.name] = tensor.shape
    except (ValueError, OSError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(
            f"{file} is truncated or corrupt ({error}); restore it from a good copy."
        ) from error


def metadata_of(tensors: dict[str, str], config: dict[str, Any], version: int) -> dict[str, str]:
    """Returns the metadata of the files of one save.

    Args:
        tensors: Digest of every tensor, by name.
        config: What ``config.json`` will hold.
        version: Version of the packed format.
    """
    record = {
        "tensors": dict(sorted(tensors.items())),
        "config": config_digest(config, version),
    }
    return {METADATA_KEY: json.dumps(record)}
