"""Saving a student as a small model, and loading it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from .._files import staged_directory, staged_files, write_failures_as_os_error, write_text
from .._prepare import prepared
from .._summary import summary
from ..errors import ArtefactError, UnsupportedModelError
from ..quantizers import Encoding
from ._card import model_card
from ._huggingface import (
    QUANT_METHOD,
    READABLE_VERSIONS,
    PackedQuantizer,
    of_unknown_version,
    stored_as,
)
from ._reader import read_json
from ._verify import verify_files

__all__ = [
    "load",
    "packed_config",
    "processor_of",
    "save",
    "weight_bytes",
    "weight_files",
    "write_artefact",
]


def save(
    student: nn.Module,
    path: str | Path,
    *,
    processor: Any = None,
    metrics: dict[str, Any] | None = None,
    overwrite: bool = False,
    encoding: Encoding = "bits",
    rest: Literal["float32", "bfloat16"] = "float32",
) -> Path:
    """Writes a student as packed safetensors with its configuration, tokenizer and model card.

    The folder appears whole or not at all. It loads with ``tutelage.load`` and, once tutelage is
    imported, with ``from_pretrained`` and ``pipeline``.

    Args:
        student: A model made by ``tutelage.prepare``, or a packed one from ``tutelage.load``, which
            is written anew, in another encoding for instance.
        path: Folder to write.
        processor: Tokenizer or image processor to store; by default the one beside the weights
            that the model was loaded from, where they are a local folder.
        metrics: Figures for the model card, by name.
        overwrite: Replace a folder that is not empty.
        encoding: ``"bits"`` stores a ternary weight in 2 bits, ``"base3"`` five of them in a
            byte, which is 1.6 bits; what loads is the same either way.
        rest: Dtype in which embeddings, norms, biases and heads that are not quantized are
            stored. With ``"bfloat16"`` the model that loads has them rounded; scales stay float32.

    Returns:
        The folder.

    Raises:
        UnsupportedModelError: The model is neither prepared nor packed, or spread over processes.
        SchemeError: There is no such encoding or dtype, or no ternary weight for base 3.
        OutputExistsError: The folder is not empty.
        ArtefactError: Writing failed; nothing is left behind.
    """
    path = Path(path)
    _require_student(student)
    with staged_directory(path, overwrite=overwrite) as stage:
        _write(student, stage, processor, metrics or {}, encoding, rest)
    return path


def write_artefact(
    student: nn.Module, folder: Path, *, processor: Any, metrics: Mapping[str, Any]
) -> None:
    """Writes the same files as ``save`` into a folder that may hold others.

    Args:
        student: A model made by ``tutelage.prepare``.
        folder: Folder to write into; files of the same names are replaced.
        processor: As in ``save``.
        metrics: As in ``save``.

    Raises:
        ArtefactError: Writing failed.
    """
    _require_student(student)
    with staged_files(folder) as stage:
        _write(student, stage, processor, metrics)


def _require_student(student: nn.Module) -> None:
    quantizer = getattr(student, "hf_quantizer", None)
    if prepared(student) is None and not isinstance(quantizer, PackedQuantizer):
        raise UnsupportedModelError(
            f"{type(student).__name__} is not prepared; call tutelage.prepare(model, scheme)."
        )
    _refuse_sharded(student)


def _refuse_sharded(student: nn.Module) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    from torch.distributed.tensor import DTensor

    for name, parameter in student.named_parameters():
        if isinstance(parameter.data, DTensor):
            raise UnsupportedModelError(
                f"{name!r} is spread over processes (fully_shard), and this one holds a part of "
                "it; save with QATTrainer.save_model, which gathers the weights."
            )


def _write(
    student: nn.Module,
    stage: Path,
    processor: Any,
    metrics: Mapping[str, Any],
    encoding: Encoding = "bits",
    rest: Literal["float32", "bfloat16"] = "float32",
) -> None:
    model = cast("Any", student)
    with stored_as(model, encoding, rest), write_failures_as_os_error():
        model.save_pretrained(stage)
    processor = processor if processor is not None else processor_of(model)
    if processor is not None:
        processor.save_pretrained(stage)
    else:
        _copy_image_processor(model, stage)
    card = model_card(type(student).__name__, *_figures(student, stage, encoding, rest), metrics)
    write_text(stage / "README.md", card)


def _figures(
    student: nn.Module, stage: Path, encoding: Encoding, rest: Literal["float32", "bfloat16"]
) -> tuple[str, int, int]:
    """Returns the name of the scheme, and the bytes of the weights, packed and in float32."""
    state = prepared(student)
    if state is not None:
        total = summary(student, encoding, rest)
        return state.scheme.name, total.packed_bytes, total.float_bytes
    from .._size import stored_size

    found = stored_size(str(stage))
    return found.scheme, found.weight_bytes, found.float_bytes


def processor_of(model: Any) -> Any:
    """Returns the tokenizer beside the weights a model was loaded from, ``None`` without one.

    Args:
        model: A transformers model.

    Raises:
        ArtefactError: There is one that cannot be read.
    """
    source = Path(str(getattr(model, "name_or_path", "") or ""))
    if not (source / "tokenizer_config.json").is_file():
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True)
    except Exception as error:  # whatever an odd file makes transformers raise
        raise ArtefactError(
            f"the tokenizer in {source} could not be read ({type(error).__name__}); pass a good "
            "one as processor."
        ) from error


def _copy_image_processor(model: Any, stage: Path) -> None:
    # A copy of the file needs no Pillow, which transformers wants to make the object.
    source = Path(str(getattr(model, "name_or_path", "") or "")) / "preprocessor_config.json"
    if source.is_file():
        shutil.copyfile(source, stage / source.name)


def load(path: str | Path) -> nn.Module:
    """Loads a packed model for inference.

    Args:
        path: Folder written by ``tutelage.save``, ``student.save_pretrained`` or a trainer.

    Returns:
        The model in eval mode, of the transformers class that was saved.

    Raises:
        ArtefactError: The folder is missing, incomplete, corrupt, edited, or holds something else.
    """
    path = Path(path)
    config = packed_config(path)
    import transformers

    from ._huggingface import register

    register()
    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "(none)"
    cls = getattr(transformers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise ArtefactError(f"{path} holds a {name!r}, which is no model of transformers.")
    if (path / "adapter_config.json").exists():
        raise ArtefactError(
            f"{path} holds an adapter, which would be added to the packed model; remove "
            "adapter_config.json."
        )
    verify_files(weight_files(path))
    try:
        model = cast("Any", cls).from_pretrained(path, local_files_only=True, use_safetensors=True)
    except ArtefactError:
        raise
    except Exception as error:  # whatever an odd file makes transformers raise
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtefactError(f"{path} could not be loaded: {line}") from error
    return cast("nn.Module", model.eval())


def weight_files(path: Path) -> list[Path]:
    """Returns the weight files of a packed model.

    Raises:
        ArtefactError: There are none.
    """
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise ArtefactError(
            f"{path} holds no model.safetensors; a training checkpoint is resumed, not loaded."
        )
    return files


def weight_bytes(path: str | Path) -> int:
    """Returns the bytes of a packed model's weights on disk.

    Args:
        path: Folder written by ``save``.
    """
    return sum(file.stat().st_size for file in weight_files(Path(path)))


def packed_config(path: Path) -> dict[str, Any]:
    """Returns the content of ``config.json`` of a packed model.

    Raises:
        ArtefactError: It is missing, no JSON, or that of something else.
    """
    file = path / "config.json"
    if not path.is_dir():
        raise ArtefactError(f"there is no folder {path}; name one written by tutelage.save.")
    if not file.is_file():
        raise ArtefactError(f"{path} holds no config.json; name a folder written by tutelage.save.")
    config = read_json(file)
    section = config.get("quantization_config") if isinstance(config, dict) else None
    method = section.get("quant_method") if isinstance(section, dict) else None
    if not isinstance(section, dict) or method != QUANT_METHOD:
        raise ArtefactError(
            f"{path} is no packed model (quant_method is {method!r}); load it with from_pretrained."
        )
    if section.get("version") not in READABLE_VERSIONS:
        raise ArtefactError(f"{path} {of_unknown_version(section.get('version'))}")
    return cast("dict[str, Any]", config)
