"""Readers: the content of a file, or a `datasets` name, to columns by name or position."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import DataError
from ._sections import DataSection

__all__ = ["READERS", "decode", "file_type", "read_content", "read_datasets", "refuse_empty"]


def file_type(path: Path) -> str:
    """Returns the suffix that tells the format, without .gz."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def refuse_empty(source: str) -> NoReturn:
    """Raises the error about data without examples."""
    raise DataError(f"{source!r} holds no examples; give a file or folder that does.")


def read_content(path: Path, source: str) -> bytes:
    """Returns the bytes of a file, unzipped; refuses an empty or unreadable one."""
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{source!r} cannot be read ({_line(error)}); copy or download it again."
        ) from None
    if not content.strip():
        refuse_empty(source)
    return content


def decode(content: bytes, source: str, section: DataSection) -> str:
    """Returns text in the encoding that the recipe names."""
    try:
        return content.decode(section.encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"line {line} of {source!r} is not valid {section.encoding}; "
            "set data.encoding to the file's encoding, such as latin-1."
        ) from None


def _read_tsv(content: bytes, source: str, section: DataSection) -> dict[Any, Sequence[Any]]:
    lines = decode(content, source, section).split("\n")
    rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    if not rows:
        refuse_empty(source)
    width = len(rows[0])
    for row, fields in enumerate(rows, start=0 if section.header else 1):
        if len(fields) > width:
            raise DataError(
                f"row {row} of {source!r} has {len(fields)} fields where {width} are expected; "
                "remove the tab within a field."
            )
        fields.extend([""] * (width - len(fields)))
    return _table(list(zip(*rows, strict=True)), source, section)


def _read_csv(content: bytes, source: str, section: DataSection) -> dict[Any, Sequence[Any]]:
    import pandas as pd

    text = io.StringIO(decode(content, source, section))
    try:
        frame = pd.read_csv(text, header=None, dtype=str, keep_default_na=False)
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{source!r} is not valid CSV ({_line(error)}); correct that row, or name the file "
            ".tsv if tabs separate its columns."
        ) from None
    return _table([frame[column].tolist() for column in frame], source, section)


def _table(
    columns: Sequence[Sequence[Any]], source: str, section: DataSection
) -> dict[Any, Sequence[Any]]:
    if not section.header:
        return dict(enumerate(columns))
    names = [str(column[0]).strip() for column in columns]
    if len(set(names)) < len(names):
        raise DataError(
            f"the header of {source!r} names a column twice ({', '.join(names)}); rename one, or "
            "set data.header=false if the first line is an example."
        )
    return {name: column[1:] for name, column in zip(names, columns, strict=True)}


def _read_jsonl(content: bytes, source: str, section: DataSection) -> dict[Any, Sequence[Any]]:
    records = []
    for number, line in enumerate(decode(content, source, section).split("\n"), start=1):
        if line.strip():
            records.append(_json(line, f"line {number} of {source!r}"))
    return _records(records, source)


def _read_json(content: bytes, source: str, section: DataSection) -> dict[Any, Sequence[Any]]:
    records = _json(decode(content, source, section), repr(source))
    return _records(records if isinstance(records, list) else [None], source)


def _json(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON ({_line(error)}); correct it.") from None


def _records(records: list[Any], source: str) -> dict[Any, Sequence[Any]]:
    names: dict[str, None] = {}
    for row, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise DataError(
                f"row {row} of {source!r} is not an object with named fields; write each example "
                'as {"text": ..., "label": ...}, in a list in .json, one a line in .jsonl.'
            )
        names.update(dict.fromkeys(record))
    return {name: [record.get(name) for record in records] for name in names}


def _read_parquet(content: bytes, source: str, section: DataSection) -> dict[Any, Sequence[Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(content))
        return {name: table[name].to_pylist() for name in table.column_names}
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise DataError(
            f"{source!r} is not a valid Parquet file ({_line(error)}); copy or download it again."
        ) from None


READERS: dict[str, Callable[[bytes, str, DataSection], dict[Any, Sequence[Any]]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
"""From suffix to a reader of (content, source, section); add yours here."""


def read_datasets(source: str, split: str) -> dict[Any, Sequence[Any]]:
    """Returns the columns of a split that the datasets library loads."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source!r} is no file or folder, and names of data sets need the package 'datasets'; "
            "check the path, or run: pip install 'tutelage[data]'."
        ) from None
    path, config = (source, None) if Path(source).exists() else _name_and_config(source)
    try:
        if (Path(source) / "state.json").exists() or (Path(source) / "dataset_dict.json").exists():
            found = datasets.load_from_disk(source)
            table = found[split] if isinstance(found, dict) else found
        else:
            table = datasets.load_dataset(path, config, split=split)
        return {name: _values(table, name) for name in table.column_names}
    except Exception as error:  # The library raises of any kind, also what its builders raise.
        raise DataError(
            f"the split {split!r} of {source!r} could not be loaded by datasets "
            f"({type(error).__name__}: {_line(error)}); check the path, the name and the split."
        ) from None


def _name_and_config(source: str) -> tuple[str, str | None]:
    name, _, config = source.partition(":")
    return name, config or None


def _values(table: Any, name: str) -> list[Any]:
    """Returns a column as a list, class numbers as names (None where there is none)."""
    feature, values = table.features[name], list(table[name])
    inner = getattr(feature, "feature", None)
    if hasattr(feature, "int2str"):
        values = [None if v is None or v < 0 else feature.int2str(v) for v in values]
    elif inner is not None and hasattr(inner, "int2str"):
        values = [None if row is None else [inner.int2str(v) for v in row] for row in values]
    return values


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".")[:200] if lines else type(error).__name__
