"""What a step must know of a model wrapped for several processes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..nn import QuantEmbedding, QuantLinear
from ..sites import Tap

__all__ = ["deferred", "gradient_group", "processes", "sum_over", "wrapped_forward"]


def gradient_group(model: nn.Module) -> Any:
    """Returns the group of processes over which a model averages its gradients.

    Args:
        model: A model, or one wrapped in ``DistributedDataParallel``, or one that went through
            ``torch.distributed.fsdp.fully_shard``.

    Returns:
        The group, ``None`` for a model of one process.

    Raises:
        UnsupportedModelError: The model is sharded in part, over a part of the processes only, or
            in another way than by ``fully_shard``.
    """
    wrapper = _wrapper(model)
    if wrapper == "ddp":
        return cast("Any", _inner(model)).process_group
    if wrapper != "fsdp":
        return None
    from torch.distributed.tensor import DTensor

    world = torch.distributed.group.WORLD
    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    if any(mesh.size() != processes(world) for mesh in meshes):
        raise UnsupportedModelError(
            "the student is sharded over a part of the processes, as in tensor or context "
            "parallelism; shard it with fully_shard over all of them."
        )
    return world


def _inner(model: nn.Module) -> nn.Module:
    return cast("nn.Module", getattr(model, "_orig_mod", model))  # compiled


def _wrapper(model: nn.Module) -> Literal["ddp", "fsdp"] | None:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    model = _inner(model)
    if isinstance(model, DistributedDataParallel):
        return "ddp"
    if isinstance(model, FSDPModule):
        return "fsdp"
    for name, module in model.named_modules():
        if isinstance(module, (FSDPModule, FullyShardedDataParallel)):
            raise UnsupportedModelError(
                f"{name or 'the model'!r} is sharded ({type(module).__name__}), but the student as "
                "a whole did not go through torch.distributed.fsdp.fully_shard; shard it, too."
            )
    return None


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
def deferred(model: nn.Module, on: bool) -> Iterator[None]:
    """Leaves gradients of the passes inside unsynchronised where ``on``.

    Args:
        model: The model, wrapped or not.
        on: Whether another micro-batch of the same step follows.
    """
    wrapper, inner = _wrapper(model) if on else None, cast("Any", _inner(model))
    if wrapper == "ddp":
        with inner.no_sync():
            yield
    elif wrapper == "fsdp":
        inner.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            inner.set_requires_gradient_sync(True)
    else:
        yield


@contextlib.contextmanager
def wrapped_forward(
    student: nn.Module, model: nn.Module, tap: Tap
) -> Iterator[Callable[[Any], Any]]:
    """Makes the forward pass of a student right inside what it is wrapped in.

    DDP looks for the parameters in use from the outputs of the forward pass. Where a stage
    replaces a signal, the student's own reaches the loss past those outputs: its parameters would
    count as unused and then receive a gradient all the same. So the student returns ``(output,
    anchor)`` inside the context, where the anchor depends on every recorded signal.

    FSDP may cast the weights before they are quantized: that is refused.

    Args:
        student: The module inside the wrapper.
        model: The wrapper, or the student itself.
        tap: Records the signals.

    Yields:
        What takes the student's output out of the wrapper's.

    Raises:
        UnsupportedModelError: Latent weights are cast to half precision.
    """
    wrapper = _wrapper(model)
    if wrapper is None:
        yield lambda output: output
        return

    def anchor(module: nn.Module, args: Any, output: Any) -> Any:
        # One element each, so that DDP, which copies what it returns, copies no signal.
        found = [t for signals in tap.signals().values() for t in signals if t.requires_grad]
        return output, [t[(0,) * t.dim()] for t in found]

    with contextlib.ExitStack() as stack:
        if wrapper == "ddp":
            stack.callback(student.register_forward_hook(anchor).remove)
            yield lambda output: output[0]
        else:
            for module in student.modules():
                if isinstance(module, (QuantLinear, QuantEmbedding)):
                    stack.callback(module.register_forward_pre_hook(_refuse_half).remove)
            yield lambda output: output


def _refuse_half(module: nn.Module, args: Any) -> None:
    weight = cast("Tensor", module.weight)
    if weight.dtype in (torch.bfloat16, torch.float16):
        raise UnsupportedModelError(
            f"fully_shard hands {weight.dtype} weights to the quantizers, whose codes would not be "
            "those of the latent weights; leave param_dtype out of its MixedPrecisionPolicy and "
            "use torch.autocast."
        )
