"""Registers the packed format with transformers as soon as, and only if, transformers is used."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["install"]

_TARGET = "transformers.quantizers.auto"


def _register() -> None:
    # Where that module is what imports transformers, it registers at its own end.
    if f"{__package__}.artefacts._huggingface" not in sys.modules:
        from .artefacts import _huggingface

        _huggingface.register()


class _Loader(importlib.abc.Loader):
    """Runs the real loader, then registers."""

    def __init__(self, spec: importlib.machinery.ModuleSpec, loader: importlib.abc.Loader) -> None:
        self._spec, self._loader = spec, loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._spec.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()


class _Finder(importlib.abc.MetaPathFinder):
    """Waits for the import of transformers' quantizer registry, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec, spec.loader)
        return spec


def install() -> None:
    """Registers now if transformers is loaded, else when it is; idempotent."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
