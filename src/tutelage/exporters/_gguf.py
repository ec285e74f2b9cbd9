"""Students as GGUF files for llama.cpp, with ternary blocks of 256 weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .._files import staged_files
from ..artefacts._artefact import processor_of
from ..errors import ExportError, OutputExistsError
from ._gguf_models import Layout, layout_of
from ._gguf_vocab import write_vocabulary
from ._layers import QuantizedLayer, quantized_layers, twin

if TYPE_CHECKING:
    import numpy as np

__all__ = ["write"]

_BLOCK = 256
"""Weights in a block, each with a scale in half precision."""


def write(
    student: nn.Module,
    path: str | Path,
    *,
    processor: Any = None,
    overwrite: bool = False,
    encoding: Literal["tq2_0", "tq1_0"] = "tq2_0",
    pre_tokenizer: str | None = None,
) -> Path:
    """Writes a GGUF file.

    It holds Llama decoders and BERT encoders, the latter with or without a head that classifies
    texts. Ternary and binary weights become ternary blocks with the scale of their row rounded to
    half precision: 2.06 bits a weight (``"tq2_0"``) or 1.69 (``"tq1_0"``). llama.cpp quantizes
    activations in its own way, to 8 bits in blocks of 256, and not inside attention. An embedding
    that is not quantized is stored in half precision, everything else in float32.

    Args:
        student: A model made by ``tutelage.prepare``, or a packed one from ``tutelage.load``.
        path: File to write.
        processor: Tokenizer to store; by default the one beside the weights that the model was
            loaded from. Without any, llama.cpp takes token ids only.
        overwrite: Replace a file.
        encoding: ``"tq2_0"``, or the smaller ``"tq1_0"``, which takes longer to unpack.
        pre_tokenizer: The name that llama.cpp has for the way a byte-level BPE tokenizer cuts
            text; by default recognized.

    Returns:
        The file.

    Raises:
        ExportError: gguf is not installed, the architecture is another, a quantized row is not a
            multiple of 256 long, a weight is neither ternary nor binary, or the tokenizer cannot
            be expressed.
        OutputExistsError: The file exists.
        UnsupportedModelError: The model is neither prepared nor packed.
    """
    gguf = _gguf()
    path = Path(path)
    if encoding not in ("tq2_0", "tq1_0"):
        raise ExportError(f"encoding is {encoding!r}; use 'tq2_0' or 'tq1_0'.")
    if path.is_dir() or (path.exists() and not overwrite):
        remedy = "name a file." if path.is_dir() else "name another one, or pass overwrite=True."
        raise OutputExistsError(f"{path} exists; {remedy}")
    layers = quantized_layers(student)
    plain = twin(student)
    layout = layout_of(plain)
    for layer in layers.values():
        _check(layer)
    kind = gguf.GGMLQuantizationType[encoding.upper()]
    file_type = gguf.LlamaFileType[f"MOSTLY_{encoding.upper()}"]
    with staged_files(path.absolute().parent) as stage:
        writer = gguf.GGUFWriter(stage / path.name, layout.architecture)
        writer.add_file_type(file_type)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        layout.write_settings(writer)
        processor = processor if processor is not None else processor_of(student)
        write_vocabulary(writer, processor, layout, pre_tokenizer)
        _write_tensors(writer, layout, plain, layers, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ExportError(
            "the format 'gguf' needs the package gguf; pip install 'tutelage[gguf]'."
        ) from error
    return gguf


def _check(layer: QuantizedLayer) -> None:
    width = layer.codes.shape[1]
    if not {int(code) for code in (layer.grid.lo, layer.grid.hi)} <= {-1, 0, 1}:
        raise ExportError(
            f"the weight of {layer.name!r} has codes from {layer.grid.lo} to {layer.grid.hi}, GGUF "
            "has blocks for -1, 0 and 1; use another scheme, or export to 'openvino' or 'onnx'."
        )
    if width % _BLOCK:
        raise ExportError(
            f"the rows of {layer.name!r} are {width} weights long, GGUF has ternary blocks of "
            f"{_BLOCK}; export to 'openvino', 'onnx' or 'compressed-tensors'."
        )


def _write_tensors(
    writer: Any, layout: Layout, plain: nn.Module, layers: dict[str, QuantizedLayer], kind: Any
) -> None:
    """Adds every tensor of the model that llama.cpp has a name for."""
    state = plain.state_dict()
    for name in layout.stored(state):
        target, owner = layout.name_of(name), name.removesuffix(".weight")
        order = layout.row_order(name)
        layer = layers.get(owner) if name.endswith(".weight") else None
        if layer is not None:
            codes, scale = layer.codes, layer.scale.expand(len(layer.codes), 1)
            if order is not None:
                codes, scale = codes[order], scale[order]
            writer.add_tensor(target, _blocks(codes, scale, kind, owner), raw_dtype=kind)
            continue
        tensor = state[name].detach().float()
        tensor = tensor if order is None else tensor[order]
        half = target in ("token_embd.weight", "output.weight")
        writer.add_tensor(target, tensor.to(torch.float16 if half else torch.float32).numpy())


def _blocks(codes: Tensor, scale: Tensor, kind: Any, name: str) -> np.ndarray[Any, Any]:
    """Returns ternary blocks, after a check that they are the codes and the rounded scales."""
    import numpy as np
    from gguf import quants

    half = scale.half().float()
    if float((half - scale).abs().max()) > float(scale.max()) * 2**-11:
        raise ExportError(
            f"the scales of {name!r}, up to {float(scale.max()):.3g}, are outside half precision, "
            "in which GGUF holds them; export to 'onnx' or 'openvino'."
        )
    values = (codes.float() * half).numpy()
    packed = quants.quantize(values, kind)
    if not np.array_equal(quants.dequantize(packed, kind), values):
        raise ExportError(
            f"gguf did not keep the weights of {name!r} as they are; use another version of it."
        )
    return packed
