"""What compressed-tensors, and transformers with it, cannot hold or load."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import ExportError
from ._layers import QuantizedLayer

__all__ = ["is_plain", "refuse_layer", "refuse_model"]


def refuse_layer(layer: QuantizedLayer, quantized: bool) -> None:
    """Refuses what the format has no word for.

    Args:
        layer: A quantized module.
        quantized: Whether activations are to be quantized.

    Raises:
        ExportError: It has none for this module.
    """
    if layer.spec.kind == "conv1d":
        raise ExportError(
            f"{layer.name!r} is a Conv1D, and compressed-tensors holds Linears and embeddings; "
            "export to 'onnx' or 'openvino'."
        )
    input = layer.spec.input
    if not quantized or input is None:
        return
    if input.clip is not None or not input.signed:
        what = "clipped" if input.clip is not None else "unsigned"
        raise ExportError(
            f"compressed-tensors has no {what} activations, which the input of {layer.name!r} is; "
            "pass activations='float' to leave inputs in full precision."
        )


def is_plain(module: nn.Module) -> bool:
    """Whether a module holds a weight and a bias and nothing else.

    compressed-tensors makes parameters of all tensors of a module that it packs, and transformers
    then draws those that no file holds, such as the factor of an embedding.

    Args:
        module: A Linear or embedding.
    """
    tensors = {*module._parameters, *module._buffers}
    return tensors <= {"weight", "bias"}


def refuse_model(plain: Any, packed: Iterable[str]) -> None:
    """Refuses a model that transformers could not load with packed weights.

    Args:
        plain: A full-precision model, unusable afterwards.
        packed: Names of the Linears that are packed.

    Raises:
        ExportError: Loading would fail.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for entry in get_model_conversion_mapping(plain):
        if isinstance(entry, WeightConverter) and len(entry.target_patterns) > 1:
            raise _not_loaded(plain, f"splits {entry.source_patterns[0]!r} of older files")
    for name in packed:
        module = plain.get_submodule(name)
        if not is_plain(module):
            raise _not_loaded(plain, f"keeps more than a weight and a bias in {name!r}")
        del module._parameters["weight"]
    for module in plain.modules():
        module.__dict__.pop("_is_hf_initialized", None)
    for tensor in (*plain.parameters(), *plain.buffers()):
        tensor._is_hf_initialized = True  # as if read from a file: not to be drawn
    try:
        with torch.random.fork_rng(devices=[]):
            plain.initialize_weights()
    except AttributeError as error:
        raise _not_loaded(plain, "wants unpacked weights to be there as it loads") from error


def _not_loaded(plain: Any, what: str) -> ExportError:
    return ExportError(
        f"transformers could not load a packed {type(plain).__name__}: its code {what}; export to "
        "'onnx' or 'openvino'."
    )
