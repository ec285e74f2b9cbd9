"""Packed artefacts: saving, loading, and the plug-in for transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._files import refuse_existing as refuse_existing
from .._files import staged_directory as staged_directory
from .._files import write_failures_as_os_error as write_failures_as_os_error
from .._files import write_text as write_text
from ._pack import known_storage as known_storage
from ._pack import pack_state_dict as pack_state_dict

if TYPE_CHECKING:
    from ._artefact import load as load
    from ._artefact import processor_of as processor_of
    from ._artefact import save as save
    from ._artefact import weight_bytes as weight_bytes
    from ._artefact import write_artefact as write_artefact
    from ._huggingface import attach_quantizer as attach_quantizer

_LAZY = {
    "attach_quantizer": "_huggingface",
    "load": "_artefact",
    "processor_of": "_artefact",
    "save": "_artefact",
    "weight_bytes": "_artefact",
    "write_artefact": "_artefact",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
