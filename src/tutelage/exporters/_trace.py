"""A student as a graph of torch operations, from which the graph formats are made.

The full-precision twin is traced with other modules in the place of the quantized ones. They
call the quantizers of the scheme itself, so that a graph rounds as the student does.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._prepare import attach_attention
from ..errors import ExportError, UnsupportedModelError
from ..nn import use_attention
from ._fused import fuse_attention
from ._layers import QuantizedLayer, module_specs, quantized_layers, twin

__all__ = ["Graph", "graph_of", "outputs_of", "sample_inputs"]

Substitute = Callable[[QuantizedLayer, nn.Module], nn.Module]
"""From a quantized layer and the module of the twin to the module that is traced."""


@dataclass(frozen=True)
class Graph:
    """A model that takes tensors by position, and what it takes and returns.

    Attributes:
        module: From the inputs to a tuple of the outputs.
        inputs: Names of the inputs.
        outputs: Names of the outputs.
        layers: The quantized weights, by module name.
    """

    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: dict[str, QuantizedLayer]

    def program(self) -> torch.export.ExportedProgram:
        """Traces the model, with the batch and the number of tokens left open.

        Raises:
            ExportError: It cannot be traced.
        """
        model = cast("_ByPosition", self.module).model
        example = tuple(sample_inputs(model, self.inputs, batch=2, tokens=9).values())
        dynamic = torch.export.Dim.DYNAMIC
        shapes = tuple(
            {0: dynamic} if tensor.dim() > 2 else {0: dynamic, 1: dynamic} for tensor in example
        )
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about its own
                program = torch.export.export(
                    self.module, example, dynamic_shapes={"inputs": shapes}, strict=False
                )
        except Exception as error:  # whatever a model's code makes the tracer raise
            raise ExportError(
                f"{type(model).__name__} cannot be traced to a graph with open batch and length "
                f"({_first_line(error)}); deploy it with tutelage.load."
            ) from error
        _name_axes_of_extremes(program.graph)
        return program


def _name_axes_of_extremes(graph: torch.fx.Graph) -> None:
    # torch's converter to ONNX knows no minimum over all axes.
    whole = (torch.ops.aten.amin.default, torch.ops.aten.amax.default)
    for node in graph.nodes:
        if node.target in whole and len(node.args) == 1:
            x = cast("torch.fx.Node", node.args[0])
            node.args = (x, list(range(x.meta["val"].dim())))


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


class _ByPosition(nn.Module):
    def __init__(self, model: nn.Module, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.inputs, self.outputs = model, inputs, outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        made = outputs_of(self.model, dict(zip(self.inputs, inputs, strict=True)))
        return tuple(made[name] for name in self.outputs)


def outputs_of(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """Runs a transformers model without a cache.

    Args:
        model: The model.
        inputs: Its inputs.

    Returns:
        Its outputs by name.
    """
    cached = "use_cache" in inspect.signature(model.forward).parameters
    return model(**inputs, return_dict=True, **({"use_cache": False} if cached else {}))


def graph_of(
    student: nn.Module, substitute: Substitute, *, attention: bool, fused: bool = False
) -> Graph:
    """Makes the model that is traced; the student stays as it is.

    Args:
        student: A student or packed model, on the CPU.
        substitute: Called for every quantized layer; what it returns takes its place.
        attention: Quantize the products inside attention as the student does.
        fused: Leave attention that is not quantized in one operator.

    Raises:
        ExportError: The model takes or returns something that has no place in a graph.
        UnsupportedModelError: The model is neither a student nor packed.
    """
    config = cast("Any", student).config
    inputs = _input_names(student)
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"{type(student).__name__} has an encoder and a decoder, which is no single graph; "
            "deploy it with tutelage.load."
        )
    if any(tensor.device.type != "cpu" for tensor in student.parameters()):
        raise ExportError(f"{type(student).__name__} is not on the CPU; export student.cpu().")
    layers, specs = quantized_layers(student), module_specs(student)
    quantized = {name: spec for name, spec in specs.items() if spec.kind == "attention"}
    model = twin(student)
    with use_attention(model, keep=True):
        for name in quantized if attention else ():
            attach_attention(model.get_submodule(name), quantized[name])
    if fused:
        fuse_attention(model)
    for name, layer in layers.items():
        model.set_submodule(name, substitute(layer, model.get_submodule(name)))
    model.eval()
    outputs = _output_names(student, inputs)
    return Graph(_ByPosition(model, inputs, outputs), inputs, outputs, layers)


def _input_names(model: nn.Module) -> tuple[str, ...]:
    config = cast("Any", model).config
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values":
        return ("pixel_values",)
    if main != "input_ids":
        raise ExportError(
            f"{type(model).__name__} takes {main!r}; models of 'input_ids' and 'pixel_values' "
            "can be exported as graphs, deploy this one with tutelage.load."
        )
    known = inspect.signature(model.forward).parameters
    names = ["input_ids"]
    if "attention_mask" in known:
        names.append("attention_mask")
    if "token_type_ids" in known and getattr(config, "type_vocab_size", 0) > 1:
        names.append("token_type_ids")
    return tuple(names)


def _output_names(model: nn.Module, inputs: tuple[str, ...]) -> tuple[str, ...]:
    try:
        with torch.no_grad():
            made = outputs_of(model, sample_inputs(model, inputs))
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever a model makes of inputs it does not take
        raise ExportError(
            f"{type(model).__name__} does not run on {', '.join(inputs)} alone "
            f"({_first_line(error)}); deploy it with tutelage.load."
        ) from error
    names = [
        name
        for name, value in made.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0
    ]
    if any(name.endswith("logits") for name in names):
        names = [name for name in names if name.endswith("logits")]
    return tuple(names)


def sample_inputs(
    model: nn.Module, names: tuple[str, ...], *, batch: int = 3, tokens: int = 11, seed: int = 0
) -> dict[str, Tensor]:
    """Makes inputs whose second row is padded at its end, the third at its start.

    The global random state stays as it is.

    Args:
        model: A transformers model, on the CPU.
        names: Its inputs.
        batch: Rows.
        tokens: Columns of a text; no more than the model has positions for.
        seed: Other numbers give other inputs.

    Raises:
        ExportError: The configuration does not say how large an image is.
    """
    config = cast("Any", model).config
    made = torch.Generator().manual_seed(seed)
    if names == ("pixel_values",):
        size = getattr(config, "image_size", None)
        if size is None:
            raise ExportError(
                f"the configuration of {type(model).__name__} has no image_size; set it to the "
                "size that shall be exported."
            )
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (batch, getattr(config, "num_channels", 3), height, width)
        return {"pixel_values": torch.randn(shape, generator=made)}
    text = config.get_text_config()
    mask = torch.ones(batch, tokens, dtype=torch.long)
    if batch > 1:
        mask[1, max(1, tokens // 2) :] = 0
    if batch > 2:
        mask[2, : tokens // 3] = 0
    ids = torch.randint(text.vocab_size, (batch, tokens), generator=made)
    pad = getattr(text, "pad_token_id", None)
    if pad is not None:
        ids = torch.where(ids == pad, (pad + 1) % text.vocab_size, ids)
        ids = torch.where(mask == 0, pad, ids)
    types = (torch.arange(tokens) >= tokens // 2).long().expand(batch, tokens).contiguous()
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}
    return {name: every[name] for name in names}
