"""Turning a model into a student: resolving the scheme, changing modules in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from ._precision import upcast
from ._resolve import refuse_unsupported, resolve
from .errors import SchemeError, UnsupportedModelError
from .nn import AttentionQuantizer, QuantWeight, quantize_module, use_attention
from .scheme import ModuleSpec, Scheme
from .sites import SiteMap, discover

__all__ = [
    "Prepared",
    "attach_attention",
    "prepare",
    "prepared",
]

_STATE = "_tutelage"


@dataclass(frozen=True)
class Prepared:
    """What ``prepare`` leaves on a student.

    Attributes:
        scheme: The scheme that was asked for.
        modules: The resolved map: qualified module name to the way it is quantized.
        sites: Where the inner signals are.
    """

    scheme: Scheme
    modules: Mapping[str, ModuleSpec]
    sites: SiteMap


def prepared(model: nn.Module) -> Prepared | None:
    """Returns what ``prepare`` left on a model, ``None`` if it was never prepared."""
    return cast("Prepared | None", model.__dict__.get(_STATE))


def prepare(
    model: nn.Module, scheme: Scheme, calibration: Iterable[Mapping[str, Any]] | None = None
) -> nn.Module:
    """Makes a model quantized, in place: the student of quantization-aware training.

    Linear, ``Conv1D`` and embedding modules change their class, attention modules gain an
    ``attention_quantizer``; parameter names, hooks and training flags stay. Latent weights in
    half precision become float32. The model gets a configuration object of its own.

    An output head that is tied to the word embeddings stays tied: it is a quantized Linear on
    their codes and scales. An untied head of a language model stays in full precision.

    Args:
        model: A full-precision transformers model.
        scheme: What is quantized, and how.
        calibration: Batches for quantizers that learn their scales from data. No built-in
            quantizer does, so anything but ``None`` is refused.

    Returns:
        The same model.

    Raises:
        SchemeError: The scheme matches no module, one of its rules matches none, or rules
            disagree about a weight that modules share.
        SiteError: No attention was found in the model.
        UnsupportedModelError: The model was prepared before, or cannot be.

    Examples:
        >>> from transformers import BertConfig, BertModel
        >>> config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> student = prepare(BertModel(config), Scheme.preset("ternary-a8"))
        >>> student.encoder.layer[0].attention.self.query.weight.shape  # latent, as before
        torch.Size([16, 16])
    """
    if prepared(model) is not None or any(isinstance(m, QuantWeight) for m in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is prepared already; load the full-precision model again."
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} was loaded quantized; load the full-precision model instead."
        )
    if calibration is not None:
        raise SchemeError(
            f"the scheme {scheme.name!r} has no quantizer that learns from calibration data; "
            "leave out 'calibration'."
        )
    sites = discover(model)
    modules = resolve(model, scheme, sites)
    refuse_unsupported(model, modules)
    upcast(model)
    own_config(model)
    with use_attention(model, keep=True):
        _convert(model, modules)
    model.__dict__[_STATE] = Prepared(scheme, modules, sites)
    from .artefacts import attach_quantizer

    attach_quantizer(model, scheme, modules)
    return model


def own_config(model: nn.Module) -> None:
    """Gives a model configuration objects that no other model shares."""
    root = cast("Any", model).config
    memo: dict[int, Any] = {}
    copy.deepcopy(root, memo)
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is not None and id(config) in memo:
            module.__dict__["config"] = memo[id(config)]


def attach_attention(module: nn.Module, spec: ModuleSpec) -> None:
    """Adds the quantizers of Q, K, V and P to an attention module."""
    attention = cast("Any", spec.attention)
    module.add_module(
        "attention_quantizer",
        AttentionQuantizer(
            attention.query.build(),
            attention.key.build(),
            attention.value.build(),
            attention.attention_map.build(),
        ),
    )


def _convert(model: nn.Module, modules: Mapping[str, ModuleSpec]) -> None:
    # Owners of shared weights come first: the others use their quantizer.
    for name, spec in sorted(modules.items(), key=lambda item: item[1].shared_with is not None):
        module = model.get_submodule(name)
        if spec.kind == "attention":
            attach_attention(module, spec)
            continue
        if spec.shared_with is None:
            weight = cast("Any", spec.weight).build()
        else:
            weight = cast("Any", model.get_submodule(spec.shared_with)).weight_quantizer
        input = None if spec.input is None else spec.input.build()
        quantize_module(module, spec.kind, weight, input, spec.arithmetic)
        if spec.shared_with is None and cast("Any", spec.weight).learned_scale:
            weight.learn_scale(cast("QuantWeight", model.get_submodule(name)).weight_rows())
