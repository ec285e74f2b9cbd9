"""What makes transformers without this library refuse a packed model, whatever it is told.

Packed weights have another shape than the ones they replace, which is an error until somebody
passes ``ignore_mismatched_sizes=True``: transformers then draws random weights and warns. The
entry ``fusion_config`` of a configuration is read before any weight is; a fusion of an unknown
name is an error there that no argument turns off.
"""

from __future__ import annotations

from typing import Any

__all__ = ["guard", "lift"]

_REASON = "this model is packed by tutelage, import tutelage before from_pretrained"


def guard(config: Any) -> None:
    """Makes a configuration one that only this library loads.

    Args:
        config: Configuration of a student or packed model.
    """
    config.fusion_config = {**(getattr(config, "fusion_config", None) or {}), _REASON: True}


def lift(config: Any) -> None:
    """Undoes ``guard``; a configuration without a guard stays as it is.

    Args:
        config: Configuration of a model that is being loaded or copied.
    """
    fusions = getattr(config, "fusion_config", None)
    if not isinstance(fusions, dict) or _REASON not in fusions:
        return
    rest = {name: value for name, value in fusions.items() if name != _REASON}
    if rest:
        config.fusion_config = rest
    else:
        del config.fusion_config
