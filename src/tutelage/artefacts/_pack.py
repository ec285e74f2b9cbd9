"""The state dict that is shipped: packed codes, scales, and digests of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import SchemeError, nearest
from ..nn import PackedWeight, QuantWeight
from ..quantizers import ENCODINGS, Encoding, pack, recode
from ..scheme import ModuleSpec

__all__ = [
    "METADATA_KEY",
    "REST_DTYPES",
    "config_digest",
    "digest",
    "known_storage",
    "pack_state_dict",
    "repack_state_dict",
    "store_rest",
    "weights_digest",
]

METADATA_KEY = "tutelage"
"""Key of the safetensors metadata that holds the digests, as JSON."""


def digest(tensor: Tensor) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 of a tensor's shape, dtype and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


_FREE = {
    "_name_or_path",
    "id2label",
    "label2id",
    "problem_type",
    "tokenizer_class",
    "transformers_version",
    "use_cache",
}
"""Entries of ``config.json`` that say nothing of the function the model computes."""

_FREE_ONCE = {"architectures", "dtype"}
"""Entries that versions 1 and 2 of the format did not fix."""


def config_digest(config: Mapping[str, Any], version: int) -> str:
    """Returns a digest of ``config.json``: of all that determines what the model computes.

    Args:
        config: Its content; names of labels and the like may change, nothing else.
        version: Version of the packed format.
    """
    free = _FREE if version >= 3 else _FREE | _FREE_ONCE
    fixed = {key: value for key, value in config.items() if key not in free}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def weights_digest(tensors: Mapping[str, str]) -> str:
    """Returns the digest of all tensors that ``config.json`` carries.

    Args:
        tensors: Digest of every tensor, by name.
    """
    return hashlib.sha256(json.dumps(sorted(tensors.items())).encode()).hexdigest()[:16]


REST_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""How all that is not quantized can be stored, by name."""


def known_storage(encoding: str, rest: str) -> None:
    """Refuses names of storage that do not exist.

    Args:
        encoding: How codes become bytes.
        rest: Dtype of all that is not quantized.

    Raises:
        SchemeError: There is no such encoding or dtype.
    """
    for given, known, what in (
        (encoding, ENCODINGS, "encoding"),
        (rest, tuple(REST_DTYPES), "dtype of the rest"),
    ):
        if given not in known:
            names = " or ".join(map(repr, known))
            raise SchemeError(
                f"there is no {what} {given!r}; use {names}.{nearest(str(given), known)}"
            )


def store_rest(state: dict[str, Tensor], rest: str) -> None:
    """Rounds all that is not quantized to how it is stored, in place; scales stay float32.

    Args:
        state: The packed state dict.
        rest: ``"float32"`` or ``"bfloat16"``.
    """
    if rest == "float32":
        return
    made: dict[tuple[int, torch.Size], Tensor] = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.float32 and not name.endswith("weight_scale"):
            # Tensors that are one in memory stay one, lest they be stored twice.
            key = (tensor.data_ptr(), tensor.shape)
            state[name] = made.setdefault(key, tensor.to(REST_DTYPES[rest]))


def pack_state_dict(
    student: nn.Module, modules: Mapping[str, ModuleSpec], encoding: Encoding = "bits"
) -> dict[str, Tensor]:
    """Returns the state dict of a student with every quantized weight packed.

    A packed weight keeps its name, as uint8 with one dimension; its scales stand beside it as
    ``weight_scale``, float32, (rows, 1) or (1, 1). Rows are output features (of a ``Conv1D`` the
    columns of its weight) or table entries. A weight that modules share is there once, under the
    name of the module that the others are ``shared_with``.

    Args:
        student: A model made by ``tutelage.prepare``.
        modules: Its resolved map.
        encoding: How codes become bytes.
    """
    state = dict(student.state_dict())
    for name, spec in modules.items():
        if spec.weight is None:
            continue
        if spec.shared_with is not None:
            del state[f"{name}.weight"]
            continue
        module = cast("QuantWeight", student.get_submodule(name))
        quantized = module.quantized_weight()
        packed = pack(quantized.codes, module.weight_quantizer.grid, encoding)
        state[f"{name}.weight"] = packed.reshape(-1)
        state[f"{name}.weight_scale"] = quantized.scale.reshape(-1, 1).contiguous()
    return state


def repack_state_dict(model: nn.Module, encoding: Encoding = "bits") -> dict[str, Tensor]:
    """Returns the state dict of a packed model with its bytes in another encoding.

    Args:
        model: A packed model; it stays as it is.
        encoding: How codes become bytes.
    """
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight) and module.owner is module:
            rows = state[f"{name}.weight"].view(module.rows, -1)
            made = recode(rows, module.width, module.grid, module.encoding, encoding)
            state[f"{name}.weight"] = made.reshape(-1)
    return state
