"""The files of a stored teacher: shards of flat tensors, and a manifest with their checksums."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ArtefactError, DataError
from ._cache_codec import Codec, bytes_of, decode, encode
from ._cache_layout import Layout

__all__ = ["FORMAT_VERSION", "Manifest", "Shards", "Writer", "digest"]

FORMAT_VERSION = 1
_MANIFEST = "teacher.json"
_SHARD_BYTES = 256 * 2**20


@dataclass
class Manifest:
    """What a stored teacher says of itself.

    Attributes:
        key: What it was made from; see ``CachedTeacher``.
        codec: How signals are written. Logits are always float32.
        padding: ``"drop"`` or ``"keep"``.
        layouts: Layout by signal; ``"logits"`` among them.
        shards: Size in bytes and SHA-256 by file name.
        version: Version of the format.
    """

    key: dict[str, Any]
    codec: Codec
    padding: str
    layouts: dict[str, Layout] = field(default_factory=dict)
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def codec_of(self, signal: str) -> Codec:
        """Returns the codec of a signal.

        Args:
            signal: Its name.
        """
        return "float32" if signal == "logits" else self.codec

    def write(self, folder: Path) -> None:
        """Writes the manifest.

        Args:
            folder: The folder.
        """
        body = json.dumps(asdict(self), sort_keys=True)
        (folder / _MANIFEST).write_text(
            json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "teacher": body})
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest and checks every shard against it.

        Args:
            folder: The folder.

        Raises:
            ArtefactError: It is no stored teacher, of another version, edited, or damaged.
        """
        file = folder / _MANIFEST
        try:
            outer = json.loads(file.read_text())
            body = outer["teacher"]
            same = hashlib.sha256(body.encode()).hexdigest() == outer["sha256"]
            data = json.loads(body)
            version = data["version"]
        except FileNotFoundError:
            raise ArtefactError(
                f"{folder} holds no stored teacher ({_MANIFEST} is missing); make one with "
                "tutelage.CachedTeacher.build."
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(file) from error
        if not same:
            raise _damaged(file)
        if version != FORMAT_VERSION:
            raise ArtefactError(
                f"{folder} is a stored teacher of version {version}, this is version "
                f"{FORMAT_VERSION}; build it anew."
            )
        data["layouts"] = {
            name: Layout(item["blocks"], tuple(item["dims"]))
            for name, item in data["layouts"].items()
        }
        made = cls(**data)
        for name, expected in made.shards.items():
            shard = folder / name
            if not shard.is_file() or shard.stat().st_size != expected["bytes"]:
                raise _damaged(shard)
            if digest(shard) != expected["sha256"]:
                raise _damaged(shard)
        return made


def _damaged(file: Path) -> ArtefactError:
    return ArtefactError(f"{file} is missing, truncated or changed; build the stored teacher anew.")


def digest(file: Path) -> str:
    """Returns the SHA-256 of a file.

    Args:
        file: The file.
    """
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Writer:
    """Collects samples and writes them into shards of a folder."""

    def __init__(self, folder: Path, manifest: Manifest, max_bytes: int | None) -> None:
        """Starts with nothing.

        Args:
            folder: Where to.
            manifest: Filled in while shards are written.
            max_bytes: Largest size of all shards.
        """
        self._folder, self._manifest, self._limit = folder, manifest, max_bytes
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        self._pending = 0
        self.bytes = 0

    def refuse(self, expected: int, how: str) -> None:
        """Refuses a size above the limit.

        Args:
            expected: Bytes.
            how: Says where the number is from.

        Raises:
            DataError: It is above.
        """
        if self._limit is not None and expected > self._limit:
            raise DataError(
                f"the stored teacher would take {how} {expected / 2**20:,.1f} MiB, more than the "
                f"{self._limit / 2**20:,.1f} MiB allowed; use codec='float16' or codec='int8', "
                "fewer loss terms or samples, or a larger max_bytes."
            )

    def add(self, sample: int, tokens: int, mark: int, signals: dict[str, Tensor]) -> None:
        """Adds signals of one sample.

        Args:
            sample: Its id.
            tokens: Its number of tokens.
            mark: Fingerprint of its inputs.
            signals: (blocks, *dims) by name, without padding.

        Raises:
            DataError: The limit is passed, or a number cannot be written.
        """
        row = {"sample": sample, "tokens": tokens, "mark": mark}
        for name, value in row.items():
            self._parts[name].append(torch.tensor([value], dtype=torch.int64))
        for name, layout in self._manifest.layouts.items():
            present = name in signals
            self._parts[f"{name}.present"].append(torch.tensor([present]))
            if not present:
                continue
            codec = self._manifest.codec_of(name)
            codes, scale = encode(codec, signals[name])
            self._parts[f"{name}.codes"].append(codes)
            if scale is not None:
                self._parts[f"{name}.scale"].append(scale)
            size = bytes_of(codec, layout.size(tokens), layout.rows(tokens))
            self.bytes += size
            self._pending += size
        self.refuse(self.bytes, "at least")
        if self._pending >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Writes what was collected."""
        if not self._parts:
            return
        from safetensors.torch import save_file

        name = f"shard-{len(self._manifest.shards):05d}.safetensors"
        rows = len(self._parts["sample"])
        for key in [key for key in self._parts if key.endswith(".present")]:
            missing = rows - len(self._parts[key])
            self._parts[key] = [torch.zeros(missing, dtype=torch.bool), *self._parts[key]]
        save_file(
            {key: torch.cat(parts) for key, parts in self._parts.items()}, self._folder / name
        )
        file = self._folder / name
        self._manifest.shards[name] = {"bytes": file.stat().st_size, "sha256": digest(file)}
        self._parts.clear()
        self._pending = 0


@dataclass(frozen=True)
class _Entry:
    shard: int
    codes: int
    scale: int


class Shards:
    """Memory-mapped shards: numbers are read from disk when a sample is asked for."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Maps the shards and indexes their samples.

        Args:
            folder: Where they are.
            manifest: Their manifest, checked.

        Raises:
            ArtefactError: A shard cannot be read.
        """
        from safetensors import SafetensorError, safe_open

        self._manifest = manifest
        self._tensors: list[dict[str, Tensor]] = []
        self.tokens: dict[int, int] = {}
        self.marks: dict[int, int] = {}
        self._index: dict[str, dict[int, _Entry]] = {name: {} for name in manifest.layouts}
        for number, name in enumerate(manifest.shards):
            try:
                with safe_open(folder / name, "pt") as opened:
                    tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise _damaged(folder / name) from error
            self._tensors.append(tensors)
            self._read(number, tensors)

    def _read(self, number: int, tensors: dict[str, Tensor]) -> None:
        samples, tokens = tensors["sample"].tolist(), tensors["tokens"].tolist()
        self.tokens.update(zip(samples, tokens, strict=True))
        self.marks.update(zip(samples, tensors["mark"].tolist(), strict=True))
        for name, layout in self._manifest.layouts.items():
            if f"{name}.present" not in tensors:
                continue
            scaled = self._manifest.codec_of(name) == "int8"
            codes = scale = 0
            present = tensors[f"{name}.present"].tolist()
            for sample, count, here in zip(samples, tokens, present, strict=True):
                if here:
                    self._index[name][sample] = _Entry(number, codes, scale)
                    codes += layout.size(count)
                    scale += layout.rows(count) if scaled else 0

    def has(self, signal: str, sample: int) -> bool:
        """Whether a signal of a sample is stored.

        Args:
            signal: Its name.
            sample: Id of the sample.
        """
        return sample in self._index.get(signal, {})

    def __len__(self) -> int:
        """Returns the number of samples."""
        return len(self.tokens)

    def read(self, signal: str, sample: int, out: Tensor) -> None:
        """Decodes a signal of a sample.

        Args:
            signal: Its name.
            sample: Id of the sample.
            out: (blocks, *dims) of the sample; written to.
        """
        layout, count = self._manifest.layouts[signal], self.tokens[sample]
        entry = self._index[signal][sample]
        tensors = self._tensors[entry.shard]
        codes = tensors[f"{signal}.codes"][entry.codes : entry.codes + layout.size(count)]
        scale = None
        if self._manifest.codec_of(signal) == "int8":
            scale = tensors[f"{signal}.scale"][entry.scale : entry.scale + layout.rows(count)]
        decode(codes, scale, layout.shape(count), out)
