"""What turns a function into one that repeats its work without Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ..errors import UnsupportedModelError

__all__ = ["CudaRecorder", "Recorder"]


class Recorder(Protocol):
    """Turns a function into one that repeats its work without Python."""

    def warm_up(self, function: Callable[[], None], times: int) -> None:
        """Runs a function, so that whatever is made on first use is there."""
        ...

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Returns what repeats the function's work on the tensors it was recorded with."""
        ...


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory; they never run at the same time."""

    def __init__(self) -> None:
        """Refuses a machine without CUDA.

        Raises:
            UnsupportedModelError: There is no CUDA device.
        """
        if not torch.cuda.is_available():
            raise UnsupportedModelError(
                "CUDA graphs need a CUDA device; use TrainStep on this machine."
            )
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, function: Callable[[], None], times: int) -> None:
        """Runs a function on a stream of its own.

        Args:
            function: The function.
            times: How often.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(times):
                function()
        torch.cuda.current_stream().wait_stream(stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Captures a function.

        Args:
            function: The function; it is not run.

        Returns:
            Replays it.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            function()
        return graph.replay
