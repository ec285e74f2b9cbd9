"""Augmented examples in the folder of a run: made once, then read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ArtefactError, CheckpointError
from .augment import Augmenter
from .data import Examples

__all__ = ["augmented"]

_FINGERPRINT = b"tutelage.augment"


def augmented(
    examples: Examples, augmenter: Augmenter, file: Path, report: Callable[[str], None]
) -> Examples:
    """Returns examples with their altered copies, from a file if an interrupted run made it.

    Args:
        examples: The training examples.
        augmenter: Makes the copies.
        file: A Parquet file in the folder of the run; it appears whole or not at all.
        report: Told what happens.

    Raises:
        ArtefactError: The file is damaged.
        CheckpointError: The file was made of other examples or with other settings.
        DataError: No word of any text can be replaced.
        NonFiniteLossError: An output of the model is NaN or infinite.
    """
    fingerprint = _fingerprint(examples, augmenter)
    if file.is_file():
        report(f"the augmented examples in {file} are complete already")
        return _read(file, fingerprint, examples.source)
    report(f"augmenting the training examples with {augmenter.section.model}")
    made = augmenter.expand(examples, report)
    _write(made, file, fingerprint)
    return made


def _fingerprint(examples: Examples, augmenter: Augmenter) -> bytes:
    digest = hashlib.sha256()
    settings = [augmenter.section.model_dump(), augmenter.seed]
    for part in (settings, examples.texts, examples.pairs, examples.labels):
        digest.update(json.dumps(part).encode() + b"\n")
    return digest.hexdigest().encode()


def _write(examples: Examples, file: Path, fingerprint: bytes) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {"text": examples.texts, "text_pair": examples.pairs, "label": examples.labels}
    table = pa.table({name: values for name, values in columns.items() if values is not None})
    stage = file.with_name(f".{file.name}.partial-{os.getpid()}")
    pq.write_table(table.replace_schema_metadata({_FINGERPRINT: fingerprint}), stage)
    os.replace(stage, file)


def _read(file: Path, fingerprint: bytes, source: str) -> Examples:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file)
    except (pa.ArrowException, OSError) as error:
        raise ArtefactError(
            f"{file} is damaged ({str(error).splitlines()[0]}); remove it and train with --resume."
        ) from None
    if (table.schema.metadata or {}).get(_FINGERPRINT) != fingerprint:
        raise CheckpointError(
            f"{file} was made of other training examples or settings; restore them, or start anew "
            "with --overwrite."
        )
    columns: dict[str, Any] = {name: table[name].to_pylist() for name in table.column_names}
    return Examples(columns["text"], columns.get("text_pair"), columns["label"], source)
