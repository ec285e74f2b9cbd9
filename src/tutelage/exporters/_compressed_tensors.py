"""Students as folders that transformers loads by itself, in the format of compressed-tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int8, Int32
from torch import Tensor, nn

from ..artefacts import staged_directory, write_failures_as_os_error
from ..errors import ExportError
from ..quantizers import Grid
from ..scheme import ActivationSpec
from ._ct_limits import is_plain, refuse_layer, refuse_model
from ._layers import QuantizedLayer, quantized_layers, twin
from ._processors import store_processor

__all__ = ["write"]

_PACKED = "pack-quantized"
_BYTES = "int-quantized"


def write(
    student: nn.Module,
    path: str | Path,
    *,
    processor: Any = None,
    overwrite: bool = False,
    activations: Literal["quantized", "float"] = "quantized",
) -> Path:
    """Writes a folder in the format ``pack-quantized`` of compressed-tensors.

    ``from_pretrained`` of transformers loads it where compressed-tensors is installed; this
    library is not needed. The weights are bit for bit codes * scale: those of Linears in 2 bits,
    four-level ones in 4, embeddings in 8, and one float32 scale a row; convolutions that embed
    patches, and embeddings with a factor of their own (Gemma), in float32. A tied head is stored
    a second time. Inputs of Linears are quantized as they run, as the student does it but in
    steps of amax / (2^(bits - 1) - 0.5), which is how compressed-tensors computes them; products
    inside attention are not. Weights are unpacked to float32 at the first forward.

    Args:
        student: A model made by ``tutelage.prepare``, or a packed one from ``tutelage.load``.
        path: Folder to write.
        processor: Tokenizer or image processor to store; by default the one beside the weights
            that the model was loaded from.
        overwrite: Replace a folder that is not empty.
        activations: ``"float"`` leaves inputs of Linears in full precision.

    Returns:
        The folder.

    Raises:
        ExportError: The format cannot hold a module of the model or quantize an activation as
            the student does, or transformers could not load the result.
        OutputExistsError: The folder is not empty.
        UnsupportedModelError: The model is neither prepared nor packed.
    """
    if activations not in ("quantized", "float"):
        raise ExportError(
            f"activations is {activations!r}; use 'quantized' or 'float' (full precision)."
        )
    layers = quantized_layers(student)
    for layer in layers.values():
        refuse_layer(layer, activations == "quantized")
    with staged_directory(Path(path), overwrite=overwrite) as stage:
        plain: Any = twin(student)
        packed = {name: layer for name, layer in layers.items() if _is_packed(layer, plain)}
        state = _untied(plain, packed)
        for name, layer in packed.items():
            del state[f"{name}.weight"]
            state |= {f"{name}.{key}": value for key, value in _tensors(layer).items()}
        groups = _groups(packed, plain.base_model_prefix, activations == "quantized")
        formats = {group["format"] for group in groups.values()}
        plain.config.quantization_config = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "ignore": [],
            "config_groups": groups,
        }
        refuse_model(plain, [n for n, layer in packed.items() if layer.spec.kind == "linear"])
        plain.config.architectures = [type(plain).__name__]
        plain.config.save_pretrained(stage)
        if plain.can_generate():
            plain.generation_config.save_pretrained(stage)
        _save(state, stage / "model.safetensors")
        store_processor(student, processor, stage)
    return Path(path)


def _is_packed(layer: QuantizedLayer, plain: nn.Module) -> bool:
    """Whether a weight is packed; others are stored in float32."""
    if layer.spec.kind == "embedding":
        return is_plain(plain.get_submodule(layer.name))
    return layer.spec.kind == "linear"


def _untied(plain: Any, packed: Mapping[str, QuantizedLayer]) -> dict[str, Tensor]:
    """Returns what to store of a full-precision model, packed weights included.

    Modules that share a packed weight no longer do: tying is by a name that packed ones lack.
    """
    weights = {f"{name}.weight" for name in packed}
    if weights & _tied_names(plain):
        plain.config.tie_word_embeddings = False
        with torch.device("meta"):
            alone = type(plain)(plain.config)
        left = sorted(weights & _tied_names(alone))
        if left:
            raise ExportError(
                f"{type(plain).__name__} always ties {left[0]!r} to another weight, which "
                "compressed-tensors cannot; export to 'onnx' or 'openvino'."
            )
        ties = {}
    else:
        ties = dict(getattr(plain, "all_tied_weights_keys", None) or {})
    left_out = set(ties) | set(getattr(plain, "_keys_to_ignore_on_save", None) or ())
    return {
        name: tensor.detach().clone().contiguous()
        for name, tensor in plain.state_dict().items()
        if name not in left_out
    }


def _tied_names(model: Any) -> set[str]:
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return set(ties) | set(ties.values())


def _tensors(layer: QuantizedLayer) -> dict[str, Tensor]:
    scale = {"weight_scale": layer.scale.expand(len(layer.codes), 1).clone()}
    if layer.spec.kind == "embedding":
        # transformers wants a weight of that name in an embedding, so bytes it is.
        return {"weight": layer.codes.clone(), **scale}
    return {
        "weight_packed": pack_int32(layer.codes, _word(layer.grid)),
        "weight_shape": torch.tensor(layer.codes.shape),
        **scale,
    }


def _word(grid: Grid) -> int:
    """Returns the bits of the shortest signed word for the codes, of those ``pack_int32`` takes."""
    return next(n for n in (2, 4, 8) if -(2 ** (n - 1)) <= grid.lo and grid.hi < 2 ** (n - 1))


def pack_int32(codes: Int8[Tensor, "rows width"], bits: int) -> Int32[Tensor, "rows words"]:
    """Packs signed codes into 32-bit words, the first of a row into the lowest bits.

    Args:
        codes: Codes in [-2^(bits - 1), 2^(bits - 1) - 1]; 2^(bits - 1) is added to each.
        bits: 2, 4 or 8: words of other lengths straddle, in ways that differ by version.

    Returns:
        One row of words for every row; unused bits of the last word are zero.
    """
    per_word = 32 // bits
    rows, width = codes.shape
    lanes = nn.functional.pad(codes.long() + 2 ** (bits - 1), (0, -width % per_word))
    shifts = torch.arange(0, 32, bits)
    words = (lanes.reshape(rows, -1, per_word) << shifts).sum(-1)
    return torch.where(words < 2**31, words, words - 2**32).to(torch.int32)


def _groups(
    packed: Mapping[str, QuantizedLayer], prefix: str, quantized: bool
) -> dict[str, dict[str, Any]]:
    """Returns the groups of modules that are quantized alike."""
    found: dict[str, dict[str, Any]] = {}
    for name, layer in packed.items():
        input = layer.spec.input if quantized else None
        inputs = None if input is None else _input(input, layer.codes.shape[1])
        bytes_only = layer.spec.kind == "embedding"
        group = {
            "format": _BYTES if bytes_only else _PACKED,
            "weights": {
                "num_bits": 8 if bytes_only else _word(layer.grid),
                "type": "int",
                "symmetric": True,
                "strategy": "channel",
                "dynamic": False,
            },
            "input_activations": inputs,
        }
        entry = found.setdefault(repr(group), {"targets": [], **group})
        entry["targets"].append(_target(name, prefix))
    return {f"group_{index}": group for index, group in enumerate(found.values())}


def _target(name: str, prefix: str) -> str:
    """Returns a pattern for a module, in a model with a head and in one without."""
    if not prefix:
        return f"re:{re.escape(name)}$"
    return f"re:({re.escape(prefix)}\\.)?{re.escape(name.removeprefix(f'{prefix}.'))}$"


def _input(spec: ActivationSpec, width: int) -> dict[str, Any]:
    # Its strategy "token" takes one scale for all rows of an input with two dimensions.
    by_row = {"strategy": "group", "group_size": width}
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": True,
        "dynamic": True,
        **(by_row if spec.granularity == "row" else {"strategy": "tensor"}),
    }


def _save(state: dict[str, Tensor], file: Path) -> None:
    from safetensors.torch import save_file

    with write_failures_as_os_error():
        save_file(state, file, metadata={"format": "pt"})
