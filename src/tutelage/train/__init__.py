"""Training: the trainer, recipes, tasks and metrics. Loads transformers when used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._arguments import QATArguments as QATArguments
    from ._optim import BertAdam as BertAdam
    from ._trainer import QATTrainer as QATTrainer

_LAZY = {"QATArguments": "_arguments", "BertAdam": "_optim", "QATTrainer": "_trainer"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
