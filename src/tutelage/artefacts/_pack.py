"""The state dict that is shipped: packed codes, scales, and digests of every tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..nn import QuantWeight
from ..quantizers import pack
from ..scheme import ModuleSpec

__all__ = ["METADATA_KEY", "config_digest", "digest", "pack_state_dict"]

METADATA_KEY = "tutelage"
"""Key of the safetensors metadata that holds the digests, as JSON."""


def digest(tensor: Tensor) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 of a tensor's shape, dtype and bytes."""
    tensor = tensor.detach().cpu().contiguous()
    head = f"{tensor.dtype}{tuple(tensor.shape)}".encode()
    body = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(head + body).hexdigest()[:16]


_FREE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "problem_type",
    "tokenizer_class",
    "transformers_version",
    "use_cache",
}
"""Entries of ``config.json`` that say nothing of the function the model computes."""


def config_digest(config: Mapping[str, Any]) -> str:
    """Returns a digest of ``config.json``: of all that determines what the model computes.

    Args:
        config: Its content; names of labels and the like may change, nothing else.
    """
    fixed = {key: value for key, value in config.items() if key not in _FREE}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def pack_state_dict(student: nn.Module, modules: Mapping[str, ModuleSpec]) -> dict[str, Tensor]:
    """Returns the state dict of a student with every quantized weight packed.

    A packed weight keeps its name, as uint8 with one dimension; its scales stand beside it as
    ``weight_scale``, float32, (rows, 1) or (1, 1). Rows are output features (of a ``Conv1D`` the
    columns of its weight) or table entries. A weight that modules share is there once, under the
    name of the module that the others are ``shared_with``.

    Args:
        student: A model made by ``tutelage.prepare``.
        modules: Its resolved map.
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
        state[f"{name}.weight"] = pack(quantized.codes, module.weight_quantizer.grid).reshape(-1)
        state[f"{name}.weight_scale"] = quantized.scale.reshape(-1, 1).contiguous()
    return state
