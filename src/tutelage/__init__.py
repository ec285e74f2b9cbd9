"""Ultra-low-bit quantization-aware training of Transformers with Teacher Intervention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import _plugin
from . import errors as errors
from . import intervention as intervention
from . import quantizers as quantizers
from ._prepare import prepare as prepare
from ._summary import Summary as Summary
from ._summary import summary as summary
from .distill import CachedTeacher as CachedTeacher
from .distill import Distiller as Distiller
from .distill import GraphedTrainStep as GraphedTrainStep
from .distill import LiveTeacher as LiveTeacher
from .distill import StepOutput as StepOutput
from .distill import TrainStep as TrainStep
from .distill import losses as losses
from .distill import with_sample_ids as with_sample_ids
from .errors import TutelageError as TutelageError
from .intervention import Schedule as Schedule
from .nn import fuse as fuse
from .scheme import Scheme as Scheme

if TYPE_CHECKING:
    from .artefacts import load as load
    from .artefacts import save as save
    from .exporters import export as export
    from .train import QATArguments as QATArguments
    from .train import QATTrainer as QATTrainer

__version__ = "0.1.0"

_LAZY = {
    "export": "exporters",
    "load": "artefacts",
    "save": "artefacts",
    "QATArguments": "train",
    "QATTrainer": "train",
}

_plugin.install()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
