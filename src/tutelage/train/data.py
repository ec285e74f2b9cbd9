"""Labelled text from files, class folders and the `datasets` library."""

from __future__ import annotations

import gzip
import io
import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import numpy as np

from tutelage.errors import DataError, nearest
from tutelage.train.recipe import DataSection

__all__ = ["Examples", "read_examples", "read_train_and_eval", "split_examples"]


@dataclass(frozen=True)
class Examples:
    """Labelled texts.

    Attributes:
        texts: One text per example.
        pairs: The second text of each example, or None.
        labels: One label per example: text for classes, real numbers for a regression.
        source: Where they come from, for messages.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[str] | list[float]
    source: str

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, indices: Sequence[int]) -> Examples:
        """Returns the examples at the given positions.

        Args:
            indices: Positions, in the order wanted.

        Returns:
            New examples of the same source.
        """
        labels: Any = [self.labels[i] for i in indices]
        pairs = None if self.pairs is None else [self.pairs[i] for i in indices]
        return Examples([self.texts[i] for i in indices], pairs, labels, self.source)


def read_train_and_eval(section: DataSection) -> tuple[Examples, Examples]:
    """Reads the training and the evaluation examples of a recipe.

    Where the recipe names no evaluation data, or the same file or folder twice, a part of the
    training examples is kept for evaluation, as `eval_split` says.

    Args:
        section: The recipe's data section.

    Returns:
        The training and the evaluation examples.

    Raises:
        DataError: If data are missing, empty, unreadable or malformed.
    """
    train = read_examples(section.train, section, split="train")
    if section.eval is not None and not _same(section.train, section.eval):
        return train, read_examples(section.eval, section, split="eval")
    if section.eval_split is None:
        raise DataError(
            f"'data.train' and 'data.eval' are both {section.train!r}; set data.eval_split, such "
            "as 0.1, to keep a part of it for evaluation."
        )
    stratify = not section.task.endswith("regression")
    return split_examples(train, section.eval_split, section.seed, stratify)


def read_examples(
    source: str, section: DataSection, *, split: Literal["train", "eval"] = "train"
) -> Examples:
    """Reads labelled texts.

    Args:
        source: A TSV, CSV, JSONL, JSON or Parquet file (each also with .gz); a folder that holds
            one folder of text files per class; or a name or path for `datasets`, optionally
            ``name:config``. TSV is read without quoting, CSV with the usual quoting.
        section: The recipe's data section: task, columns, encoding and split names.
        split: Which split is read from a `datasets` name.

    Returns:
        The examples, in the order of the source.

    Raises:
        DataError: If the source is missing, empty, unreadable or malformed.
    """
    if not source:
        raise DataError("a path or name of data is empty; set data.train and data.eval.")
    path = Path(source).expanduser()
    suffix = _suffix(path)
    if path.is_dir() and _class_folders(path):
        return _read_folder(path, source, section)
    if path.is_file():
        if suffix not in _READERS:
            raise DataError(
                f"the type of {source!r} is not known; name it {', '.join(sorted(_READERS))} "
                "(each also with .gz)."
            )
        columns = _READERS[suffix](_content(path, source), source, section)
    elif not path.exists() and (suffix in _READERS or source[0] in "./~" or "\\" in source):
        raise DataError(f"there is no file or folder {source!r}; check the path.")
    else:
        name = section.train_split if split == "train" else section.eval_split_name
        columns = _read_datasets(source, name)
    if not columns or not len(next(iter(columns.values()))):
        _refuse_empty(source)
    return _examples(columns, source, section)


def split_examples(
    examples: Examples, amount: float, seed: int, stratify: bool
) -> tuple[Examples, Examples]:
    """Draws a part of the examples for evaluation.

    Args:
        examples: What is split.
        amount: A number of examples (int), or a share between 0 and 1 (float).
        seed: Seed of the draw.
        stratify: Whether the part keeps the shares of the labels; every label then keeps at
            least one training example.

    Returns:
        The rest (for training) and the part drawn, both in their original order.

    Raises:
        DataError: If the part would be empty, or leave too little for training.
    """
    total = len(examples)
    count = amount if isinstance(amount, int) else round(amount * total)
    groups: dict[str, list[int]] = {}
    for index, label in enumerate(examples.labels):
        groups.setdefault(str(label) if stratify else "", []).append(index)
    if not 1 <= count <= total - len(groups):
        raise DataError(
            f"eval_split {amount} would draw {count} of the {total} examples of "
            f"{examples.source!r}; it must be between 1 and {max(0, total - len(groups))}, so "
            "that something is left to train on: change it, or give more data."
        )
    shares = {label: len(group) * count / total for label, group in groups.items()}
    quota = {label: min(int(shares[label]), len(group) - 1) for label, group in groups.items()}
    while sum(quota.values()) < count:
        room = [label for label, group in groups.items() if quota[label] < len(group) - 1]
        quota[max(room, key=lambda label: shares[label] - quota[label])] += 1
    random = np.random.default_rng(seed)
    drawn: set[int] = set()
    for label, group in groups.items():
        drawn.update(random.permutation(group)[: quota[label]].tolist())
    rest = [index for index in range(total) if index not in drawn]
    return examples.select(rest), examples.select(sorted(drawn))


def _examples(columns: dict[Any, Sequence[Any]], source: str, section: DataSection) -> Examples:
    texts = [str(cell) for cell in _cells(columns, section.text, "text", source)]
    pairs = None
    if section.text_pair is not None:
        pairs = [str(cell) for cell in _cells(columns, section.text_pair, "text_pair", source)]
    cells = _cells(columns, section.label, "label", source)
    labels: list[str] | list[float]
    if section.task.endswith("regression"):
        labels = [_number(cell, row, source) for row, cell in enumerate(cells, start=1)]
    else:
        labels = [_class(cell) for cell in cells]
    return Examples(texts, pairs, labels, source)


def _column(
    columns: dict[Any, Sequence[Any]], wanted: str | int, key: str, source: str
) -> Sequence[Any]:
    names = list(columns)
    if isinstance(wanted, int) and wanted < len(names):
        return columns[names[wanted]]
    if wanted in columns and not isinstance(wanted, int):
        return columns[wanted]
    if isinstance(names[0], int):
        raise DataError(
            f"{source!r} has no column {wanted!r}: it is read without header and has {len(names)} "
            f"columns; set data.{key} to a position from 0 to {len(names) - 1}."
        )
    hint = nearest(str(wanted), names)
    raise DataError(
        f"{source!r} has no column {wanted!r}.{hint} Set data.{key} to one of: "
        f"{', '.join(names)}; or data.header=false if the first line is an example."
    )


def _cells(
    columns: dict[Any, Sequence[Any]], wanted: str | int, key: str, source: str
) -> list[str | int | float]:
    cells: list[str | int | float] = []
    for row, value in enumerate(_column(columns, wanted, key, source), start=1):
        if _missing(value):
            raise DataError(f"row {row} of {source!r} has no {key}; add it or remove the row.")
        if not isinstance(value, str | int | float):
            raise DataError(
                f"row {row} of {source!r} holds a {type(value).__name__} as {key}; "
                f"set data.{key} to a column of text or numbers."
            )
        cells.append(value)
    return cells


def _missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))


def _class(value: str | int | float) -> str:
    # A column of integers with a gap is read as floating point: 1.0 is the label "1".
    whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if whole else value).strip()


def _number(value: str | int | float, row: int, source: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            f"row {row} of {source!r} has the label {value!r}, which is not a finite number; "
            "correct it, or set data.task=classification."
        )
    return number


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _same(first: str, second: str) -> bool:
    one, other = Path(first).expanduser(), Path(second).expanduser()
    return one.exists() and other.exists() and one.samefile(other)


def _refuse_empty(source: str) -> NoReturn:
    raise DataError(f"{source!r} holds no examples; give a file or folder that does.")


def _content(path: Path, source: str) -> bytes:
    try:
        raw = path.read_bytes()
        content = gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{source!r} cannot be read ({_line(error)}); copy or download it again."
        ) from None
    if not content.strip():
        _refuse_empty(source)
    return content


def _decode(content: bytes, source: str, section: DataSection) -> str:
    try:
        return content.decode(section.encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"line {line} of {source!r} is not valid {section.encoding}; "
            "set data.encoding to the file's encoding, such as latin-1."
        ) from None


def _read_tsv(content: bytes, source: str, section: DataSection) -> dict[Any, Sequence[Any]]:
    lines = _decode(content, source, section).split("\n")
    rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    if not rows:
        _refuse_empty(source)
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

    text = io.StringIO(_decode(content, source, section))
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
    for number, line in enumerate(_decode(content, source, section).split("\n"), start=1):
        if line.strip():
            records.append(_json(line, f"line {number} of {source!r}"))
    return _records(records, source)


def _read_json(content: bytes, source: str, section: DataSection) -> dict[Any, Sequence[Any]]:
    records = _json(_decode(content, source, section), repr(source))
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


_READERS: dict[str, Callable[[bytes, str, DataSection], dict[Any, Sequence[Any]]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _class_folders(path: Path) -> list[Path]:
    """Returns the class folders, none if data files lie beside them."""
    folders = sorted(p for p in path.iterdir() if p.is_dir() and p.name[0] not in "._")
    tables = (p for folder in (path, *folders) for p in folder.iterdir())
    if any(_suffix(p) in (*_READERS, ".arrow") for p in tables):
        return []
    return folders


def _read_folder(path: Path, source: str, section: DataSection) -> Examples:
    if section.task != "classification":
        raise DataError(
            f"the folder {source!r} holds class folders, which do not fit the task "
            f"{section.task!r}; give a file with columns, or set data.task=classification."
        )
    texts, labels = [], []
    for folder in _class_folders(path):
        files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
        if not files:
            raise DataError(
                f"the class folder {str(folder)!r} holds no text files; fill or remove it."
            )
        for file in files:
            texts.append(_decode(_content(file, str(file)), str(file), section))
            labels.append(folder.name)
    return Examples(texts, None, labels, source)


def _read_datasets(source: str, split: str) -> dict[Any, Sequence[Any]]:
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
    if hasattr(feature, "int2str"):
        values = [None if v is None or v < 0 else feature.int2str(v) for v in values]
    return values


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".")[:200] if lines else type(error).__name__
