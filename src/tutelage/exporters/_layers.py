"""What exporters read off a student: its quantized weights, and its full-precision twin."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int8
from torch import Tensor, nn

from .._prepare import prepared
from ..artefacts._guard import lift
from ..errors import UnsupportedModelError
from ..nn import PackedWeight, QuantWeight
from ..quantizers import Grid, unpack
from ..scheme import ModuleSpec

__all__ = ["QuantizedLayer", "module_specs", "quantized_layers", "twin"]


@dataclass(frozen=True)
class QuantizedLayer:
    """One quantized Linear, ``Conv1D``, patch embedding or embedding table.

    Attributes:
        name: Qualified module name.
        spec: How it is quantized.
        grid: The codes that are possible.
        codes: Int8, (rows, width); rows are output features or table entries.
        scale: Float32, (rows, 1) or (1, 1); codes * scale is the weight.
        bias: Float32, (rows,), or ``None``.
    """

    name: str
    spec: ModuleSpec
    grid: Grid
    codes: Int8[Tensor, "rows width"]
    scale: Float[Tensor, "scales 1"]
    bias: Float[Tensor, " rows"] | None

    @property
    def values(self) -> Float[Tensor, "rows width"]:
        """The quantized weight in float32."""
        return self.codes.float() * self.scale


def module_specs(model: nn.Module) -> dict[str, ModuleSpec]:
    """Returns the resolved module map of a student or packed model.

    Args:
        model: A model made by ``tutelage.prepare`` or ``tutelage.load``.

    Raises:
        UnsupportedModelError: It is neither.
    """
    state = prepared(model)
    if state is not None:
        return dict(state.modules)
    from ..artefacts._huggingface import PackedQuantizer

    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, PackedQuantizer):
        return cast("Any", quantizer.quantization_config).specs()
    raise UnsupportedModelError(
        f"{type(model).__name__} is neither a student nor a packed model; call "
        "tutelage.prepare(model, scheme) or tutelage.load(folder)."
    )


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Returns every module with a quantized weight, by name.

    A module that shares the weight of another is there too, with the same codes and scale.

    Args:
        model: A student or packed model.

    Raises:
        UnsupportedModelError: It is neither.
    """
    found = {}
    for name, spec in module_specs(model).items():
        if spec.weight is None:
            continue
        module = model.get_submodule(name)
        bias = cast("Tensor | None", getattr(module, "bias", None))
        grid: Grid
        if isinstance(module, PackedWeight):
            packed, scale = module.packed()
            grid = module.grid
            codes = unpack(packed, module.width, grid)
        else:
            weight = cast("QuantWeight", module)
            grid = weight.weight_quantizer.grid
            quantized = weight.quantized_weight()
            codes, scale = quantized.codes.to(torch.int8), quantized.scale.reshape(-1, 1)
        found[name] = QuantizedLayer(
            name,
            spec,
            grid,
            codes.detach(),
            scale.detach().float(),
            None if bias is None else bias.detach().float(),
        )
    return found


def twin(model: nn.Module) -> nn.Module:
    """Returns a plain full-precision model whose weights are the quantized values.

    Same class, same parameter names, no module of this library in it; activations are not
    quantized. Other exporters replace its weights by codes.

    Args:
        model: A student or packed model, on the CPU.

    Returns:
        A new model in eval mode, float32.

    Raises:
        UnsupportedModelError: The model is neither a student nor packed.
    """
    layers = quantized_layers(model)
    source = cast("Any", model)
    config = copy.deepcopy(source.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    lift(config)
    config._attn_implementation_internal = None
    with torch.random.fork_rng(devices=[]):
        made = cast("Any", type(model))(config)
    made.generation_config = copy.deepcopy(getattr(source, "generation_config", None))
    wanted = made.state_dict()
    state = {name: tensor for name, tensor in model.state_dict().items() if name in wanted}
    for name, layer in layers.items():
        target = wanted[f"{name}.weight"]
        values = layer.values
        state[f"{name}.weight"] = (
            values.t() if layer.spec.kind == "conv1d" else values.reshape(target.shape)
        )
    made.load_state_dict(state, strict=True)
    return cast("nn.Module", made.float().eval())
