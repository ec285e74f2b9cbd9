"""Students that ``fully_shard`` spreads over processes: gathering, storing and loading them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._prepare import prepared
from ..errors import UnsupportedModelError

__all__ = [
    "Unsharded",
    "check_plugin",
    "is_sharded",
    "load_full",
    "load_optimizer",
    "non_finite",
    "save_optimizer",
    "shard_of",
]


def is_sharded(model: nn.Module) -> bool:
    """Returns whether a model went through ``fully_shard``.

    Args:
        model: Any model.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def check_plugin(plugin: Any, student: nn.Module) -> None:
    """Refuses what does not fit students, and completes accelerate's settings of FSDP.

    Args:
        plugin: Accelerate's ``FullyShardedDataParallelPlugin``.
        student: The student, not sharded yet.

    Raises:
        UnsupportedModelError: Version 1, or activation checkpointing.
    """
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise UnsupportedModelError(
            "QATTrainer shards with FSDP version 2 only; set fsdp_config={'version': 2}."
        )
    if plugin.activation_checkpointing:
        raise UnsupportedModelError(
            "QATTrainer does not recompute activations; leave activation_checkpointing out of "
            "fsdp_config."
        )
    # Autocast does the rounding: weights must reach the quantizers as they are.
    plugin.mixed_precision_policy = None
    if plugin.transformer_cls_names_to_wrap is None:
        state = prepared(student)
        assert state is not None
        blocks = {type(student.get_submodule(b.block)).__name__ for b in state.sites.blocks}
        plugin.transformer_cls_names_to_wrap = sorted(blocks)


class Unsharded:
    """A copy of a student without weights, which the gathered ones are put in to be saved."""

    def __init__(self, student: nn.Module) -> None:
        """Copies the structure.

        Args:
            student: The student, not sharded yet.
        """
        self._empty = copy.deepcopy(student).to("meta")

    def gather(self, student: nn.Module) -> nn.Module:
        """Returns a student with all weights on the host in process 0, an empty one elsewhere.

        All processes must call it.

        Args:
            student: The sharded student.
        """
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        tensors = get_model_state_dict(student, options=options)
        full = copy.deepcopy(self._empty)
        if tensors:
            full.load_state_dict(tensors, assign=True)
            cast("Any", full).tie_weights()
        return full


def load_full(student: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads whole tensors, the same in all processes, into a sharded student.

    Args:
        student: The sharded student.
        tensors: Its state dict.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    options = StateDictOptions(full_state_dict=True, strict=True)
    set_model_state_dict(student, dict(tensors), options=options)


def shard_of(value: Any) -> Any:
    """Returns what this process holds of a sharded tensor, in the same memory; others as they are.

    Args:
        value: A tensor or anything else.
    """
    from torch.distributed.tensor import DTensor

    return value.to_local() if isinstance(value, DTensor) else value


def non_finite(student: nn.Module) -> list[str]:
    """Returns the names of parameters with a NaN or infinite element, the same in all processes.

    Args:
        student: A student; if sharded, all processes must call it.
    """
    named = dict(student.named_parameters())
    local = [shard_of(parameter) for parameter in named.values()]
    broken = torch.stack([~torch.isfinite(tensor).all() for tensor in local]).int()
    if is_sharded(student):
        torch.distributed.all_reduce(broken, torch.distributed.ReduceOp.MAX)
    return [name for name, flag in zip(named, broken.tolist(), strict=True) if flag]


def _file(folder: Path, rank: int) -> Path:
    return folder / ("optimizer.pt" if rank == 0 else f"optimizer-{rank}.pt")


def save_optimizer(optimizer: torch.optim.Optimizer, folder: Path, rank: int) -> None:
    """Writes this process's part of the optimizer state.

    Args:
        optimizer: Its parameters are sharded.
        folder: Where to.
        rank: This process.
    """
    state = optimizer.state_dict()
    state["state"] = {
        index: {key: shard_of(value) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    torch.save(state, _file(folder, rank))


def load_optimizer(optimizer: torch.optim.Optimizer, folder: Path, rank: int) -> None:
    """Loads what ``save_optimizer`` wrote, into as many processes as wrote it.

    Args:
        optimizer: Its parameters are sharded.
        folder: The checkpoint.
        rank: This process.
    """
    from torch.distributed.tensor import DTensor

    state = torch.load(_file(folder, rank), map_location="cpu", weights_only=True)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        parameter = parameters[index]
        if not isinstance(parameter, DTensor):
            continue
        mesh, placements = parameter.device_mesh, parameter.placements
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dim() > 0:
                values[name] = DTensor.from_local(
                    value.to(parameter.device),
                    mesh,
                    placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
    optimizer.load_state_dict(state)
