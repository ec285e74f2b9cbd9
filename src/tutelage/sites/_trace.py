"""Discovery of a model's sites from one traced forward pass, without tables of names."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SiteError, UnsupportedModelError
from ..nn import probe_of, use_attention
from ._map import BlockSites, SiteMap

__all__ = ["discover", "synthesize_inputs"]

_TOKENS = 8


@dataclass
class _LinearCall:
    name: str
    out: Tensor
    in_features: int
    out_features: int


@dataclass
class _AttentionCall:
    name: str
    query: Tensor
    key: Tensor
    value: Tensor


class _Recorder:
    def __init__(self, name: str, log: list[_LinearCall | _AttentionCall]) -> None:
        self.name, self.log = name, log

    def inputs(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.log.append(_AttentionCall(self.name, query, key, value))

    def scores(self, scores: Tensor) -> None:
        pass

    def attention_map(self, attention_map: Tensor) -> Tensor:
        return attention_map


def synthesize_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Makes a small valid input for ``model`` without drawing random numbers.

    Args:
        model: A transformers model whose main input is ``input_ids`` or ``pixel_values``.

    Returns:
        Keyword arguments of ``model.forward``, batch size 1, on the model's device.

    Raises:
        UnsupportedModelError: The main input is of another kind.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_ids":
        text = config.get_text_config()
        ids = torch.arange(1, _TOKENS + 1, device=device) % text.vocab_size
        mask = torch.ones(1, _TOKENS, dtype=torch.long, device=device)
        return {"input_ids": ids.unsqueeze(0), "attention_mask": mask}
    if main == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (1, config.num_channels, height, width)
        dtype = next(model.parameters()).dtype
        return {"pixel_values": torch.zeros(shape, device=device, dtype=dtype)}
    raise UnsupportedModelError(
        f"{type(model).__name__} takes {main!r} as its main input; only 'input_ids' and "
        "'pixel_values' can be traced."
    )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Any:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _trace(model: nn.Module) -> list[_LinearCall | _AttentionCall]:
    log: list[_LinearCall | _AttentionCall] = []

    def hook(name: str) -> Any:
        def record(module: nn.Linear, args: Any, out: Tensor) -> None:
            log.append(_LinearCall(name, out, module.in_features, module.out_features))

        return record

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(_evaluating(model))
        stack.enter_context(use_attention(model))
        for name, module in model.named_modules():
            stack.enter_context(probe_of(module, _Recorder(name, log)))
            if isinstance(module, nn.Linear):
                handle = module.register_forward_hook(hook(name))
                stack.callback(handle.remove)
        model(**synthesize_inputs(model))
    return log


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _block_of(model: nn.Module, attention: str) -> str:
    parts = attention.split(".")
    for end in range(len(parts), 1, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    raise SiteError(
        f"the attention module {attention!r} stands in no ModuleList of blocks; its block cannot "
        "be told."
    )


def _projection(
    calls: list[_LinearCall], tensor: Tensor, index: int, attention: str, role: str
) -> str:
    same = [call for call in calls if _storage(call.out) == _storage(tensor)]
    if same:
        return same[-1].name
    if len(calls) == 1:
        return calls[0].name
    if len(calls) == 3:
        return calls[index].name
    names = ", ".join(call.name for call in calls) or "none"
    raise SiteError(
        f"the {role} projection of {attention!r} was not found among the Linears before its "
        f"attention call ({names})."
    )


def discover(model: nn.Module) -> SiteMap:
    """Finds the blocks of ``model`` by tracing one small forward pass in eval mode.

    Weights, random state and training flags are left as they were.

    Args:
        model: A transformers model whose attention runs through ``AttentionInterface``.

    Returns:
        The sites of every attention call, in call order.

    Raises:
        SiteError: There is no attention call, or a part of a block could not be told.
        UnsupportedModelError: The model cannot be traced.
    """
    log = _trace(model)
    attention_at = [i for i, call in enumerate(log) if isinstance(call, _AttentionCall)]
    if not attention_at:
        raise SiteError(
            f"{type(model).__name__} has no attention site: no call of an attention function was "
            "seen in a forward pass; use a Transformer model."
        )
    blocks, calls_of = [], dict[str, int]()
    for number, at in enumerate(attention_at):
        call = log[at]
        assert isinstance(call, _AttentionCall)
        start = attention_at[number - 1] + 1 if number else 0
        stop = attention_at[number + 1] if number + 1 < len(attention_at) else len(log)
        before = [c for c in log[start:at] if isinstance(c, _LinearCall)]
        after = [c for c in log[at + 1 : stop] if isinstance(c, _LinearCall)]
        inside = [c for c in before if c.name.startswith(f"{call.name}.")]
        block = _block_of(model, call.name)
        _, heads, _, width = call.query.shape
        output = next((c for c in after if c.in_features == heads * width), None)
        if output is None or not output.name.startswith(f"{block}."):
            raise SiteError(
                f"the output projection of {call.name!r} was not found: no Linear with "
                f"{heads * width} inputs follows its attention call inside {block!r}."
            )
        rest = after[after.index(output) + 1 :]
        ffn = tuple(c.name for c in rest if c.name.startswith(f"{block}."))
        if not ffn:
            raise SiteError(f"no feed-forward Linear was found after attention in {block!r}.")
        tensors = {"query": call.query, "key": call.key, "value": call.value}
        projections = {
            role: _projection(inside, tensor, index, call.name, role)
            for index, (role, tensor) in enumerate(tensors.items())
        }
        blocks.append(
            BlockSites(
                block=block,
                attention=call.name,
                call=calls_of.get(call.name, 0),
                output=output.name,
                ffn=ffn,
                heads=heads,
                width=width,
                hidden=output.out_features,
                **projections,
            )
        )
        calls_of[call.name] = calls_of.get(call.name, 0) + 1
    linears = dict.fromkeys(c.name for c in log if isinstance(c, _LinearCall))
    return SiteMap(tuple(blocks), tuple(linears))
