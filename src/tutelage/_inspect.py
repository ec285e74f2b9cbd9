"""Which signals of a model were found: what ``tutelage inspect`` prints."""

from __future__ import annotations

import os

from torch import nn

from .errors import UnsupportedModelError
from .sites import BlockSites, Features, SiteMap, discover

__all__ = ["Inspection", "describe", "inspect_model", "report", "untrained"]

Inspection = tuple[nn.Module, SiteMap]


def untrained(name: str) -> nn.Module:
    """Builds a model from its configuration alone; its weights are random.

    Args:
        name: A folder or a model name.

    Raises:
        UnsupportedModelError: The configuration names no class of transformers.
        RecipeError: There is no such model.
    """
    import transformers

    from .train._models import load_config

    config = load_config(name, "the model")
    names = config.architectures or []
    made = next((getattr(transformers, n) for n in names if hasattr(transformers, n)), None)
    if made is not None:
        return made(config)
    if names:
        raise UnsupportedModelError(
            f"{os.fspath(name)!r} is a {names[0]}, which transformers "
            f"{transformers.__version__} does not have; load it in Python and call "
            "tutelage.sites.discover(model)."
        )
    return transformers.AutoModel.from_config(config)


def inspect_model(name: str) -> Inspection:
    """Returns a model of the same structure, with random weights, and its sites.

    Args:
        name: A folder or a model name.

    Raises:
        SiteError: A part of a block could not be told.
        UnsupportedModelError: The model cannot be traced.
        RecipeError: There is no such model.
    """
    model = untrained(name)
    return model, discover(model)


def _projection(block: BlockSites, name: str, features: Features) -> str:
    short = name.removeprefix(f"{block.block}.")
    if not features:
        return short
    shown = ",".join(f"{start}:{stop}" for start, stop in features[:2])
    return f"{short}[{shown}{',...' if len(features) > 2 else ''}]"


def describe(block: BlockSites) -> dict[str, str]:
    """Returns one attention call in words, names relative to its block.

    Args:
        block: The call and the modules around it.
    """
    kind = "causal self" if block.causal else block.kind
    said = {
        "attention": f"{kind}-attention, {block.heads} heads of {block.width}",
        "query": _projection(block, block.query, block.query_features),
        "key": _projection(block, block.key, block.key_features),
        "value": _projection(block, block.value, block.value_features),
        "output": _projection(block, block.output, ()),
    }
    if block.ffn:
        said["feed-forward"] = " ".join(_projection(block, name, ()) for name in block.ffn)
    limits = []
    if not block.has("attention_scores"):
        limits.append("its scores, and quantized products (it is written by hand)")
    if not block.has("attention_map"):
        limits.append("its attention map")
    if limits:
        said["out of reach"] = "; ".join(limits)
    return said


def report(inspection: Inspection) -> str:
    """Returns what was found as text; blocks of one kind are shown once.

    Args:
        inspection: A model and its sites.
    """
    model, sites = inspection
    lines = [
        f"{type(model).__name__}: {len(sites.blocks)} attention calls, {len(sites.linears)} Linears"
    ]
    kinds: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for block in sites.blocks:
        kinds.setdefault(tuple(describe(block).items()), []).append(block.block)
    for said, blocks in kinds.items():
        names = blocks[0] if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"
        lines += ["", f"{names} ({len(blocks)})"]
        lines += [f"  {role:<13} {text}" for role, text in said]
    return "\n".join(lines)
