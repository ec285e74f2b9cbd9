"""What an engine has to offer to be measured."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from ..errors import BenchError
from ._cases import Inputs
from ._workspace import Workspace

__all__ = ["Engine", "Runner"]


class Runner(ABC):
    """A model loaded by an engine, ready to run."""

    def prepare(self, inputs: Inputs) -> Any:
        """Returns inputs in the engine's own form; not part of the time.

        Args:
            inputs: Arrays by name.
        """
        return inputs

    @abstractmethod
    def run(self, prepared: Any) -> Any:
        """Computes the outputs; this is what is timed.

        Args:
            prepared: What ``prepare`` returned.
        """

    @abstractmethod
    def output(self, inputs: Inputs) -> np.ndarray:
        """Returns the main output, float32.

        Args:
            inputs: Arrays by name.
        """

    @abstractmethod
    def check(self) -> str:
        """Says how the Linear layers are computed, after the model ran once.

        Raises:
            BenchError: They are not computed as the name of the engine promises.
        """

    @abstractmethod
    def weight_bytes(self) -> int:
        """Returns the bytes of the weights that are kept in memory."""

    def generate(self, prompt: Inputs, tokens: int) -> None:
        """Generates greedily with a key-value cache, if ``generates``.

        Args:
            prompt: Arrays by name.
            tokens: How many, exactly.
        """
        raise NotImplementedError

    @property
    def generates(self) -> bool:
        """Whether ``generate`` is there."""
        return False


class Engine(ABC):
    """A way to run a model.

    Attributes:
        name: As in ``--engines``.
        title: What is run, in words.
        source: Whose weights: ``"student"`` or ``"teacher"``.
        int8: Whether others are compared with the fastest of this kind.
        library: Modules that must be importable.
        extra: Extra of this package that installs them.
        tolerance: Largest relative error of the outputs on a sample, against plain torch.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    source: ClassVar[Literal["student", "teacher"]] = "teacher"
    int8: ClassVar[bool] = False
    library: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    tolerance: ClassVar[float] = 0.5

    def require(self) -> None:
        """Checks that the library is there.

        Raises:
            BenchError: It is not.
        """
        if any(importlib.util.find_spec(module) is None for module in self.library):
            raise BenchError(f"not installed: pip install 'tutelage[{self.extra}]'")

    def convert(self, work: Workspace) -> None:  # noqa: B027
        """Writes what ``load`` reads into ``work.folder(name)``; nothing by default.

        Args:
            work: Where things are.

        Raises:
            BenchError: The model cannot be converted.
        """

    @abstractmethod
    def load(self, work: Workspace) -> Runner:
        """Loads the model; this is what the load time measures.

        Args:
            work: Where things are.
        """

    def files(self, work: Workspace) -> list[Path]:
        """Returns the files whose size is reported.

        Args:
            work: Where things are.
        """
        return [f for f in work.folder(self.name).rglob("*") if f.is_file() and f.suffix != ".json"]
