"""Resolving a scheme: which modules of a model are quantized, and how."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import nn

from .errors import SchemeError, UnsupportedModelError
from .nn import kind_of, why_unsupported
from .scheme import ModuleSpec, Scheme, WeightSpec
from .sites import SiteMap

__all__ = ["refuse_unsupported", "resolve"]


def resolve(model: nn.Module, scheme: Scheme, sites: SiteMap) -> dict[str, ModuleSpec]:
    """Returns the explicit map from module names to specs.

    Args:
        model: A full-precision model.
        scheme: What is quantized, and how.
        sites: The model's sites.

    Raises:
        SchemeError: Nothing matches, a rule matches nothing, rules disagree about a weight that
            modules share, or attention that is written by hand would have to be quantized.
    """
    candidates = _candidates(model, scheme)
    for rule in scheme.rules:
        if not any(rule.matches(name) for name in candidates):
            first = next(iter(candidates), "none")
            raise SchemeError(
                f"the rule {rule.pattern!r} matches none of the {len(candidates)} modules that "
                f"can be quantized, such as {first!r}; patterns must match a whole name."
            )
    modules = {name: spec for name, spec in candidates.items() if spec is not None}
    if not modules:
        raise SchemeError(
            f"the scheme {scheme.name!r} matches no module of {type(model).__name__}; "
            "check its rules."
        )
    if scheme.attention is not None:
        for block in sites.blocks:
            if not block.interface:
                raise SchemeError(
                    f"{block.attention!r} computes its attention by hand, outside transformers' "
                    "AttentionInterface, so that its products cannot be quantized; use "
                    f"Scheme.preset({scheme.name!r}).without_attention(), in a recipe "
                    "student.quantize_attention=false."
                )
            modules[block.attention] = ModuleSpec(kind="attention", attention=scheme.attention)
    return modules


def _candidates(model: nn.Module, scheme: Scheme) -> dict[str, ModuleSpec | None]:
    """Returns every module that can be quantized, with its spec, in the order of the model."""
    inside = _inside(model)
    words, head = _word_embeddings(model), _output_embeddings(model)
    groups = _sharing(model)
    tables = {id(module.weight) for module in model.modules() if id(module) in words}
    found: dict[str, ModuleSpec | None] = {}
    for name, module in model.named_modules():
        kind = kind_of(module)
        group = groups.get(id(module._parameters.get("weight")), [])
        if kind in ("linear", "embedding") and id(module.weight) in tables:
            found[name] = _of_table(model, scheme, name, group or [name])
        elif kind in ("linear", "conv1d") and module is head:
            found[name] = scheme.by_rule(name, cast("Any", kind))
        elif kind in ("linear", "conv1d") and id(module) in inside:
            spec = scheme.linear(name, cast("Any", kind))
            first = next((other for other in group if found.get(other) == spec), None)
            if first is not None and spec is not None and kind == "linear":
                spec = spec.model_copy(update={"shared_with": first})
            found[name] = spec
        elif kind == "conv2d" and id(module) in inside:
            found[name] = scheme.by_rule(name, "conv2d")
    return found


def _inside(model: nn.Module) -> set[int]:
    """Returns the modules of the base model, by identity."""
    base = getattr(model, "base_model", model)
    found = {id(module) for module in base.modules()}
    if base is model and any(hasattr(child, "base_model_prefix") for child in model.children()):
        # The base model of some models with a head goes by another name than their prefix.
        found -= {id(child) for child in model.children() if isinstance(child, nn.Linear)}
    return found


def _of_table(model: nn.Module, scheme: Scheme, name: str, group: list[str]) -> ModuleSpec | None:
    """Returns the spec of a module that uses the word embeddings: a lookup, or a tied head."""
    weight = _weight_of(scheme, group)
    if weight is None:
        return None
    owner = _owner(model, group)
    shared_with = None if name == owner else owner
    if isinstance(model.get_submodule(name), nn.Embedding):
        return ModuleSpec(kind="embedding", weight=weight, shared_with=shared_with)
    rule = scheme.rule_for(name)
    return ModuleSpec(
        kind="linear",
        weight=weight,
        input=scheme.input if rule is None else rule.input,
        arithmetic=scheme.arithmetic,
        shared_with=shared_with,
    )


def _weight_of(scheme: Scheme, group: list[str]) -> WeightSpec | None:
    """Returns how a weight that modules share is quantized; a rule about one is about all."""
    rules = {name: rule for name in group if (rule := scheme.rule_for(name)) is not None}
    if not rules:
        return scheme.embedding
    first, *others = rules
    for other in others:
        if rules[other].weight != rules[first].weight:
            raise SchemeError(
                f"{first!r} and {other!r} share one weight, but the rules "
                f"{rules[first].pattern!r} and {rules[other].pattern!r} give it different specs; "
                "write one rule that matches both."
            )
    return rules[first].weight


def _owner(model: nn.Module, group: list[str]) -> str:
    """Returns who holds the packed weight: the module that transformers ties the others to."""
    tables = [name for name in group if isinstance(model.get_submodule(name), nn.Embedding)]
    sources = set(getattr(model, "all_tied_weights_keys", {}).values())
    return next((name for name in tables if f"{name}.weight" in sources), tables[0])


def _word_embeddings(model: nn.Module) -> set[int]:
    """Returns the input embeddings of the model and of every model in it, by identity."""
    found = set()
    for module in model.modules():
        get = getattr(module, "get_input_embeddings", None)
        if get is None:
            continue
        try:
            words = get()
        except NotImplementedError:  # a model without tokens
            continue
        if isinstance(words, nn.Embedding):
            found.add(id(words))
    return found


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else cast("nn.Module | None", get())


def _holders(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yields module name, own name and parameter, a parameter as often as it is registered."""
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield name, key, parameter


def _sharing(model: nn.Module) -> dict[int, list[str]]:
    """Returns the modules whose ``weight`` is one and the same parameter, by its identity."""
    found: dict[int, list[str]] = {}
    for name, key, parameter in _holders(model):
        if key == "weight":
            found.setdefault(id(parameter), []).append(name)
    return {key: names for key, names in found.items() if len(names) > 1}


def refuse_unsupported(model: nn.Module, modules: Mapping[str, ModuleSpec]) -> None:
    """Refuses a resolved map that the model cannot follow.

    Args:
        model: A full-precision model.
        modules: The resolved map.

    Raises:
        UnsupportedModelError: A module was patched, is of a class that cannot be changed, or
            shares its weight with one that would not be quantized in the same way.
    """
    weights = {name: spec for name, spec in modules.items() if spec.weight is not None}
    for name in weights:
        module = model.get_submodule(name)
        if "forward" in module.__dict__:
            raise UnsupportedModelError(
                f"the forward of {name!r} was replaced on the instance, which would bypass "
                "quantization; load the model without device_map and without accelerate's hooks."
            )
        reason = why_unsupported(module)
        if reason is not None:
            raise UnsupportedModelError(f"{name!r} {reason}; exclude it with a Rule.")
    _refuse_shared(model, weights)
    _refuse_two_names(model, weights)


def _refuse_shared(model: nn.Module, weights: Mapping[str, ModuleSpec]) -> None:
    owners = {id(model.get_submodule(name).weight): name for name in reversed(list(weights))}
    for name, key, parameter in _holders(model):
        owner = owners.get(id(parameter))
        if owner is None or owner == name:
            continue
        if name not in weights or key != "weight":
            raise UnsupportedModelError(
                f"{owner!r} and {name!r} share one weight and only one of them would be "
                f"quantized; keep it in full precision with Rule(pattern={owner!r})."
            )
        together = {weights[name].shared_with or name, weights[owner].shared_with or owner}
        if len(together) > 1:
            raise UnsupportedModelError(
                f"{owner!r} and {name!r} share one weight that would be quantized in two ways; "
                "write one Rule that matches both."
            )


def _refuse_two_names(model: nn.Module, weights: Mapping[str, ModuleSpec]) -> None:
    owners = {id(model.get_submodule(name)): name for name in weights}
    for name, module in model.named_modules(remove_duplicate=False):
        first = owners.get(id(module), name)
        if first != name:
            raise UnsupportedModelError(
                f"{first!r} and {name!r} are one module under two names, which cannot be saved "
                f"packed; keep it in full precision with Rule(pattern={first!r})."
            )
