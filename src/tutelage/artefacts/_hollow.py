"""A model made ready to receive packed tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn

from ..errors import ArtefactError
from ..nn import kind_of, pack_module, use_attention
from ..quantizers import Encoding
from ..scheme import ModuleSpec

__all__ = ["make_hollow", "not_stored", "refuse_other_tensors"]


def make_hollow(model: Any, modules: Mapping[str, ModuleSpec], encoding: Encoding = "bits") -> None:
    """Turns the modules of a map into packed ones with empty buffers, in place.

    Args:
        model: A full-precision model, on the meta device as a rule.
        modules: The resolved map of the model that was saved.
        encoding: How the files hold codes.

    Raises:
        ArtefactError: The map does not fit the model.
    """
    specs = _on_model(model, modules)
    packed = {f"{name}.weight" for name in specs}
    for target, source in list(model.all_tied_weights_keys.items()):
        # Packed weights are tied by the map; transformers would look for parameters.
        if target in packed or source in packed:
            del model.all_tied_weights_keys[target]
    with use_attention(model, keep=True):
        for name, spec in sorted(specs.items(), key=lambda item: item[1].shared_with or ""):
            _hollow(model, model.get_submodule(name), spec, encoding)


def _on_model(model: nn.Module, specs: Mapping[str, ModuleSpec]) -> dict[str, ModuleSpec]:
    """Names the modules as ``model`` does.

    A base model lacks the prefix of a model with a head, and has none of the head's modules.
    """
    names = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    headless = getattr(model, "base_model", None) is model

    def own(name: str) -> str:
        return name if name in names else name.removeprefix(prefix)

    found = {}
    for name, spec in specs.items():
        if own(name) not in names:
            if headless and not name.startswith(prefix):
                continue
            raise ArtefactError(
                f"the packed module {name!r} does not exist in {type(model).__name__}; the files "
                f"are of another architecture{_or_version(model)}."
            )
        if spec.shared_with is not None:
            spec = spec.model_copy(update={"shared_with": own(spec.shared_with)})
        found[own(name)] = spec
    return found


def _or_version(model: nn.Module) -> str:
    """Returns what else may be the cause where transformers itself renamed modules."""
    from transformers import __version__

    saved = getattr(model.config, "transformers_version", None)
    if saved in (None, __version__):
        return ""
    return f", or this transformers, {__version__}, names modules otherwise than {saved} did"


def _hollow(model: nn.Module, module: nn.Module, spec: ModuleSpec, encoding: Encoding) -> None:
    """Makes a module ready to receive packed tensors."""
    from .._prepare import attach_attention

    if spec.kind == "attention":
        attach_attention(module, spec)
        return
    if kind_of(module) != spec.kind:
        raise ArtefactError(
            f"a packed {spec.kind} was stored where the model has a {type(module).__name__}; the "
            "files are of another architecture."
        )
    quantizer = cast("Any", spec.weight).build()
    input = None if spec.input is None else spec.input.build()
    owner = None if spec.shared_with is None else model.get_submodule(spec.shared_with)
    made: Any = pack_module(module, spec.kind, quantizer, input, spec.arithmetic, owner)
    made.make_room(encoding)
    if spec.kind != "embedding":
        # transformers draws what no file holds, for which some models (Funnel) look at the shape of
        # a Linear; an embedding may have a scale that is computed there.
        made._is_hf_initialized = True


def not_stored(model: Any, state: Mapping[str, Tensor]) -> set[str]:
    """Returns which tensors are left out of the files: transformers makes or ties them.

    Args:
        model: A student, a packed model, or one made hollow.
        state: Its state dict; two tensors that are declared tied but are not the same are both
            stored.
    """
    made = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    ties = getattr(model, "all_tied_weights_keys", {})
    tied = {
        target
        for target, source in ties.items()
        if target in state and source in state and _same(state[target], state[source])
    }
    return tied | (made & set(state))


def _same(one: Tensor, other: Tensor) -> bool:
    # On the meta device nothing has been loaded yet, and what is declared tied will be.
    return one.is_meta or (one.data_ptr() == other.data_ptr() and one.shape == other.shape)


def refuse_other_tensors(model: nn.Module, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Refuses what transformers would fill with random numbers.

    Args:
        model: A model made hollow.
        stored: Name and shape of every tensor in the files.

    Raises:
        ArtefactError: A tensor is missing, or has another shape.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    shapes = {name.removeprefix(prefix): shape for name, shape in stored.items()} | dict(stored)
    state = model.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in not_stored(model, state) - set(shapes):
        del wanted[name]
    missing = sorted(set(wanted) - set(shapes))
    if missing:
        raise ArtefactError(
            f"the files hold no tensor {missing[0]!r} (nor {len(missing) - 1} others) that "
            f"{type(model).__name__} needs; load the architecture that was saved."
        )
    for name, shape in wanted.items():
        if shapes[name] != shape:
            raise ArtefactError(
                f"the tensor {name!r} is stored with shape {shapes[name]}, the model wants "
                f"{shape}; load the model with the settings it was saved with."
            )
