"""Where the bytes of a packed model are, or would be: what ``tutelage size`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from ._planned import Rest, bytes_of, header_bytes, planned_tensors
from ._resolve import refuse_unsupported, resolve
from .errors import ArtefactError
from .quantizers import Encoding
from .scheme import ModuleSpec, Scheme

__all__ = ["SizePart", "SizeReport", "planned_size", "size_of", "stored_size"]

KINDS = (
    "Linear codes",
    "embedding codes",
    "scales",
    "biases",
    "norms",
    "other embeddings",
    "head",
    "other weights",
    "file header and digests",
)
"""What a byte of a weight file is for; other embeddings are those of positions and types."""


@dataclass(frozen=True)
class SizePart:
    """One line of a report.

    Attributes:
        kind: What the bytes are for.
        tensors: Tensors of that kind.
        values: Numbers they hold; codes are counted one by one.
        bytes: Their size.
    """

    kind: str
    tensors: int
    values: int
    bytes: int


@dataclass(frozen=True)
class SizeReport:
    """The bytes of a model by kind; the parts add up to its weight files, to the byte.

    Attributes:
        model: Folder or name.
        stored: Whether the files exist; what they would be if not.
        scheme: Name of the scheme.
        encoding: How codes are stored.
        rest: Dtype of all that is not quantized.
        parts: One for every kind there is.
        float_bytes: The same model at 4 bytes a parameter.
        files: Bytes of the other files of the folder, by name.
    """

    model: str
    stored: bool
    scheme: str
    encoding: str
    rest: str
    parts: tuple[SizePart, ...]
    float_bytes: int
    files: dict[str, int]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(part.bytes for part in self.parts)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return asdict(self) | {"weight_bytes": self.weight_bytes}


def size_of(
    name: str,
    scheme: Scheme | None = None,
    encoding: Encoding | None = None,
    rest: Rest | None = None,
) -> SizeReport:
    """Returns the bytes of a saved student, or those that a model would take as one.

    Args:
        name: Folder of a saved student; or folder or name of a full-precision model, of which the
            configuration alone is read.
        scheme: How a full-precision model would be quantized, by default ``"ternary-a8"``.
        encoding: How its codes would be stored, by default ``"bits"``.
        rest: Dtype of what would not be quantized, by default ``"float32"``.

    Raises:
        ArtefactError: The student's files are corrupt, or it is to be given another scheme.
        SchemeError: The scheme matches no module.
        UnsupportedModelError: The model is not one of transformers.
        RecipeError: There is no such model.
    """
    if _is_packed(Path(name)):
        if (scheme, encoding, rest) != (None, None, None):
            raise ArtefactError(
                f"{name} is packed already; give scheme, encoding and rest for the full-precision "
                "model."
            )
        return stored_size(name)
    made = scheme or Scheme.preset("ternary-a8")
    return planned_size(name, _on_meta(name), made, encoding or "bits", rest or "float32")


def _is_packed(folder: Path) -> bool:
    from .artefacts._reader import read_json

    if not (folder / "config.json").is_file():
        return False
    config = read_json(folder / "config.json")
    section = config.get("quantization_config") if isinstance(config, dict) else None
    return isinstance(section, dict) and section.get("quant_method") == "tutelage"


def _on_meta(name: str) -> nn.Module:
    from ._inspect import untrained

    with torch.device("meta"):
        return untrained(name)


def stored_size(name: str) -> SizeReport:
    """Returns the bytes of a saved student; reads headers and configuration, no tensor.

    Args:
        name: Its folder.

    Raises:
        ArtefactError: The files are corrupt or of two saves.
    """
    from .artefacts._artefact import packed_config, weight_files
    from .artefacts._huggingface import PackedConfig
    from .artefacts._reader import read_header
    from .artefacts._verify import verify_config

    folder = Path(name)
    section = PackedConfig(**packed_config(folder)["quantization_config"])
    headers = [read_header(file) for file in weight_files(folder)]
    for header in headers:
        verify_config(header)
    specs = section.specs()
    model = _on_meta(name)
    sorter = _Sorter(model, specs)
    for header in headers:
        for tensor in header.tensors:
            sorter.add(tensor.name, tensor.shape, tensor.bytes)
        sorter.add_header(header.bytes)
    weights = {header.file.name for header in headers}
    files = {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.iterdir())
        if file.is_file() and file.name not in weights
    }
    scheme = str(section.scheme.get("name", "custom"))
    return SizeReport(
        name, True, scheme, section.encoding, section.rest, sorter.parts(), _floats(model), files
    )


def planned_size(
    name: str, model: nn.Module, scheme: Scheme, encoding: Encoding = "bits", rest: Rest = "float32"
) -> SizeReport:
    """Returns the bytes that a full-precision model would take as a saved student.

    Args:
        name: Shown in the report.
        model: The model, on any device, meta included; it stays as it is.
        scheme: How it would be quantized.
        encoding: How codes would be stored.
        rest: Dtype of what would not be quantized.

    Raises:
        SchemeError: The scheme matches no module.
        UnsupportedModelError: The model cannot be prepared.
    """
    # Products inside attention take no bytes, and need no sites that way.
    specs = resolve(model, scheme.without_attention(), cast("Any", None))
    refuse_unsupported(model, specs)
    tensors = planned_tensors(model, specs, encoding, rest)
    sorter = _Sorter(model, specs)
    for key, (dtype, shape) in tensors.items():
        sorter.add(key, shape, bytes_of(dtype, shape))
    sorter.add_header(header_bytes(tensors))
    return SizeReport(name, False, scheme.name, encoding, rest, sorter.parts(), _floats(model), {})


def _floats(model: nn.Module) -> int:
    return 4 * sum(parameter.numel() for parameter in model.parameters())


class _Sorter:
    """Adds tensors up by kind."""

    def __init__(self, model: nn.Module, specs: Mapping[str, ModuleSpec]) -> None:
        self._specs = {name: spec for name, spec in specs.items() if spec.weight is not None}
        self._modules = dict(model.named_modules())
        self._state = model.state_dict()
        base = getattr(model, "base_model", model)
        self._inside = {id(module) for module in base.modules()}
        self._sums = {kind: [0, 0, 0] for kind in KINDS}

    def add(self, name: str, shape: tuple[int, ...], size: int) -> None:
        kind = self._kind(name)
        values = torch.Size(shape).numel()
        if kind.endswith("codes"):
            values = self._state[name].numel()
        self._count(kind, 1, values, size)

    def add_header(self, size: int) -> None:
        self._count(KINDS[-1], 0, 0, size)

    def _count(self, kind: str, *more: int) -> None:
        self._sums[kind] = [a + b for a, b in zip(self._sums[kind], more, strict=True)]

    def _kind(self, name: str) -> str:
        owner, _, leaf = name.rpartition(".")
        if owner in self._specs and leaf == "weight_scale":
            return "scales"
        if owner in self._specs and leaf == "weight":
            return "embedding codes" if self._specs[owner].kind == "embedding" else "Linear codes"
        module = self._modules.get(owner)
        if module is None:
            return "other weights"
        if id(module) not in self._inside and owner not in self._specs:
            return "head"
        if "norm" in type(module).__name__.lower():
            return "norms"
        if leaf == "bias":
            return "biases"
        if isinstance(module, nn.Embedding) or "position" in leaf or leaf.endswith("token"):
            return "other embeddings"
        return "other weights"

    def parts(self) -> tuple[SizePart, ...]:
        return tuple(SizePart(kind, *sums) for kind, sums in self._sums.items() if any(sums))
