"""What a step must know of a model wrapped for several processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..sites import Tap

__all__ = ["anchored", "deferred", "gradient_group", "processes", "sum_over"]


def gradient_group(model: nn.Module | None) -> Any:
    """Returns the group of processes over which a model averages its gradients.

    Args:
        model: A wrapped model, such as ``DistributedDataParallel``.

    Returns:
        The group, ``None`` for a model of one process.
    """
    if model is None or not torch.distributed.is_available():
        return None
    if not torch.distributed.is_initialized():
        return None
    from torch.nn.parallel import DistributedDataParallel

    model = cast("nn.Module", getattr(model, "_orig_mod", model))  # compiled
    return model.process_group if isinstance(model, DistributedDataParallel) else None


def processes(group: Any) -> int:
    """Returns the number of processes in a group.

    Args:
        group: See ``gradient_group``.
    """
    return 1 if group is None else torch.distributed.get_world_size(group)


def sum_over(
    group: Any, counts: Mapping[str, Tensor | int], device: torch.device
) -> dict[str, Tensor | int]:
    """Adds up counts over processes, with one small collective operation.

    Args:
        group: See ``gradient_group``.
        counts: Numbers by name; the same names in every process.
        device: Where tensors are.
    """
    if processes(group) == 1:
        return dict(counts)
    # torch.tensor(n, device=...) would wait for the device.
    parts = [
        value.to(device, torch.int64)
        if isinstance(value, Tensor)
        else torch.full((), value, dtype=torch.int64, device=device)
        for value in counts.values()
    ]
    total = torch.stack(parts)
    torch.distributed.all_reduce(total, group=group)
    return dict(zip(counts, total.unbind(), strict=True))


@contextlib.contextmanager
def deferred(model: nn.Module | None, on: bool) -> Iterator[None]:
    """Leaves gradients of the passes inside unsynchronised where ``on``.

    Args:
        model: The wrapped model.
        on: Whether another micro-batch of the same step follows.
    """
    no_sync = getattr(model, "no_sync", None)
    if on and gradient_group(model) is not None and callable(no_sync):
        with no_sync():
            yield
    else:
        yield


@contextlib.contextmanager
def anchored(
    student: nn.Module, model: nn.Module | None, tap: Tap
) -> Iterator[Callable[[Any], Any]]:
    """Lets DDP see which parameters the recorded signals depend on.

    It looks for them from the outputs of the forward pass. Where a stage replaces a signal, the
    student's own reaches the loss past those outputs: its parameters would count as unused and
    then receive a gradient all the same. So the student returns ``(output, anchor)`` inside the
    context, where the anchor depends on every recorded signal.

    Args:
        student: The module inside the wrapper.
        model: The wrapper.
        tap: Records the signals.

    Yields:
        What takes the student's output out of the wrapper's.
    """
    if gradient_group(model) is None:
        yield lambda output: output
        return

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        # One element each, so that DDP, which copies what it returns, copies no signal.
        found = [t for signals in tap.signals().values() for t in signals if t.requires_grad]
        return output, [t[(0,) * t.dim()] for t in found]

    handle = student.register_forward_hook(hook)
    try:
        yield lambda output: output[0]
    finally:
        handle.remove()
