"""Turning a model into a student: resolving the scheme, changing modules in place."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from .errors import SchemeError, UnsupportedModelError
from .nn import AttentionQuantizer, QuantEmbedding, QuantLinear, use_attention
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

    Linear and embedding modules change their class, attention modules gain an
    ``attention_quantizer``; parameter names, hooks and training flags stay. Latent weights in
    half precision become float32. The model gets a configuration object of its own.

    Args:
        model: A full-precision transformers model.
        scheme: What is quantized, and how.
        calibration: Batches for quantizers that learn their scales from data. No built-in
            quantizer does, so anything but ``None`` is refused.

    Returns:
        The same model.

    Raises:
        SchemeError: The scheme matches no module, or one of its rules matches none.
        SiteError: No attention was found in the model.
        UnsupportedModelError: The model was prepared before, or cannot be.
    """
    if prepared(model) is not None or any(isinstance(m, QuantLinear) for m in model.modules()):
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
    _refuse_patched(model, modules)
    _refuse_tied(model, modules)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters()):
        model.float()
    own_config(model)
    with use_attention(model, keep=True):
        _convert(model, modules)
    model.__dict__[_STATE] = Prepared(scheme, modules, sites)
    from .export import attach_quantizer

    attach_quantizer(model, scheme, modules)
    return model


def resolve(model: nn.Module, scheme: Scheme, sites: SiteMap) -> dict[str, ModuleSpec]:
    """Returns the explicit map from module names to specs.

    Args:
        model: A full-precision model.
        scheme: What is quantized, and how.
        sites: The model's sites.

    Raises:
        SchemeError: Nothing matches, or a rule matches nothing.
    """
    base = getattr(model, "base_model", model)
    inside = {id(module) for module in base.modules()}
    words = cast("Any", model).get_input_embeddings()
    modules: dict[str, ModuleSpec] = {}
    candidates: list[str] = []
    for name, module in model.named_modules():
        spec = None
        if isinstance(module, nn.Linear) and id(module) in inside:
            candidates.append(name)
            spec = scheme.linear(name)
        elif module is words and isinstance(module, nn.Embedding):
            candidates.append(name)
            spec = scheme.word_embedding(name)
        if spec is not None:
            modules[name] = spec
    for rule in scheme.rules:
        if not any(rule.matches(name) for name in candidates):
            raise SchemeError(
                f"the rule {rule.pattern!r} matches none of the {len(candidates)} modules that "
                f"can be quantized, such as {candidates[0]!r}; patterns must match a whole name."
            )
    if not modules:
        raise SchemeError(
            f"the scheme {scheme.name!r} matches no module of {type(model).__name__}; "
            "check its rules."
        )
    if scheme.attention is not None:
        for block in sites.blocks:
            modules[block.attention] = ModuleSpec(kind="attention", attention=scheme.attention)
    return modules


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
    for name, spec in modules.items():
        module = model.get_submodule(name)
        if spec.kind == "attention":
            attach_attention(module, spec)
        elif spec.kind == "embedding":
            weight = cast("Any", spec.weight).build()
            QuantEmbedding.from_embedding(cast("nn.Embedding", module), weight)
        else:
            weight = cast("Any", spec.weight).build()
            input = None if spec.input is None else spec.input.build()
            QuantLinear.from_linear(cast("nn.Linear", module), weight, input, spec.arithmetic)


def _refuse_patched(model: nn.Module, modules: Mapping[str, ModuleSpec]) -> None:
    for name, spec in modules.items():
        module = model.get_submodule(name)
        if spec.kind != "attention" and "forward" in module.__dict__:
            raise UnsupportedModelError(
                f"the forward of {name!r} was replaced on the instance, which would bypass "
                "quantization; load the model without device_map and without accelerate's hooks."
            )
        if spec.kind != "attention" and type(module) not in (nn.Linear, nn.Embedding):
            raise UnsupportedModelError(
                f"{name!r} is a {type(module).__name__}, not a plain Linear or Embedding; "
                "exclude it with a Rule."
            )
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            raise UnsupportedModelError(f"{name!r} has max_norm; exclude it with a Rule.")


def _refuse_tied(model: nn.Module, modules: Mapping[str, ModuleSpec]) -> None:
    owners: dict[int, str] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        other = owners.setdefault(id(weight), name)
        if other != name and (name in modules or other in modules):
            raise UnsupportedModelError(
                f"{other!r} and {name!r} share one weight and only one of them would be "
                f"quantized; keep it in full precision with Rule(pattern={other!r})."
            )
