"""Whole encoder blocks in one compiled call."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..kernels import encoder_block, native
from ._attention import ATTENTION_NAME
from ._fused_plan import BlockPlan, UnfusableError, read_plan
from ._layouts import LAYOUTS, BlockLayout

__all__ = ["fuse", "fused_blocks"]

_HARMLESS = {"output_hidden_states", "return_dict", "use_cache"}
_TOLERANCE = 0.02


class FusedBlock(nn.Module):
    """A block that runs in one call wherever nothing inside it is asked for.

    Training, hooks on its inner modules, attention maps among the outputs, cross-attention,
    caches, autocast and other devices take the block's own forward.
    """

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kw: Any
    ) -> Any:
        """Computes the block.

        Args:
            hidden_states: (batch, tokens, hidden).
            attention_mask: Additive, (batch or 1, 1, queries or 1, keys), or ``None``.
            *args: As the block takes them.
            **kw: As the block takes them.
        """
        state = cast("BlockPlan", self.__dict__["_fused"])
        if not _can_run(self, state, hidden_states, attention_mask, args, kw):
            return super().forward(hidden_states, attention_mask, *args, **kw)
        if not state.is_current():
            renewed = read_plan(self, _layout(self))
            renewed.in_tuple = state.in_tuple
            state = self.__dict__["_fused"] = renewed
        y = encoder_block(
            hidden_states,
            attention_mask,
            state.tensors,
            state.shapes,
            state.settings,
            state.numbers,
        )
        return (y,) if state.in_tuple else y


def _can_run(
    block: nn.Module,
    state: BlockPlan,
    x: Tensor,
    mask: Any,
    args: tuple[Any, ...],
    kw: dict[str, Any],
) -> bool:
    if block.training or x.device.type != "cpu" or x.dtype != torch.float32 or x.dim() != 3:
        return False
    if torch.is_autocast_enabled("cpu") or any(arg is not None for arg in args):
        return False
    if any(v is not None and v is not False and k not in _HARMLESS for k, v in kw.items()):
        return False
    config: Any = state.attention.config
    if config._attn_implementation != ATTENTION_NAME or _hooked(state.inner):
        return False
    if mask is None:
        return True
    batch, tokens = x.shape[:2]
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.float32
        and mask.dim() == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, tokens)
        and mask.shape[3] == tokens
        and (tokens == 1 or mask.stride(3) == 1)
    )


def _hooked(modules: list[nn.Module]) -> bool:
    from transformers.utils.output_capturing import _active_collector

    wanted = _active_collector.get()
    if wanted is not None and any(key != "hidden_states" and key[0] != "_" for key in wanted):
        return True
    for module in modules:
        if module._forward_pre_hooks or "_tutelage_probe" in module.__dict__:
            return True
        for hook in module._forward_hooks.values():
            # transformers leaves these in place; they act only where a collector wants them.
            if getattr(hook, "__module__", "") != "transformers.utils.output_capturing":
                return True
    return False


def fuse(model: nn.Module) -> nn.Module:
    """Makes the encoder blocks of a packed model run in one compiled call each, in place.

    Linears compute the same integers as before, bit for bit. Softmax, layer norm and GELU are
    the kernel's own, within a few units in the last place of torch's, so that a rounding may
    turn out otherwise: every block is tried on made-up input and must come within 2 % of the
    root mean square of the plain block, else nothing is changed.

    Args:
        model: A model from ``tutelage.load``, on the CPU. Blocks of BERT, RoBERTa, XLM-RoBERTa,
            CamemBERT, ELECTRA, DistilBERT, ViT and DeiT are known.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: No kernel for it runs here, the model has no block that is known,
            one of them is not quantized in a way that the kernel computes, or a block did not
            compute the same.
    """
    if not native().has_block:
        raise UnsupportedModelError(
            f"encoder blocks are fused only where AVX-512 VNNI kernels are active, and here "
            f"{native().reason}; use the model as it is, tutelage doctor says more."
        )
    blocks = {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in LAYOUTS and not isinstance(module, FusedBlock)
    }
    if not blocks:
        known = ", ".join(LAYOUTS)
        raise UnsupportedModelError(
            f"{type(model).__name__} has no encoder block that can be fused ({known}); use the "
            "model as it is."
        )
    read = {}
    for name, block in blocks.items():
        try:
            read[name] = read_plan(block, LAYOUTS[type(block).__name__])
        except UnfusableError as error:
            raise UnsupportedModelError(
                f"the block {name!r} cannot be fused: {error}; use the model as it is."
            ) from None
    plain = {name: type(block) for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            _replace(name, block, read[name])
    except Exception:
        for name, block in blocks.items():
            block.__class__ = plain[name]
            block.__dict__.pop("_fused", None)
        raise
    return model


def fused_blocks(model: nn.Module) -> int:
    """Returns how many blocks of a model are fused.

    Args:
        model: Any model.
    """
    return sum(isinstance(module, FusedBlock) for module in model.modules())


_CLASSES: dict[type, type] = {}


def _restore(plain: type) -> Any:
    made: Any = _class(plain)
    return made.__new__(made)


def _reduce(self: nn.Module, protocol: Any) -> Any:
    return _restore, (type(self).__bases__[1],), self.__dict__


def _class(plain: type) -> type:
    if plain not in _CLASSES:
        body = {"__reduce_ex__": _reduce, "__module__": __name__}
        _CLASSES[plain] = type(f"Fused{plain.__name__}", (FusedBlock, plain), body)
    return _CLASSES[plain]


def _layout(block: nn.Module) -> BlockLayout:
    return LAYOUTS[type(block).__bases__[1].__name__]


def _replace(name: str, block: nn.Module, state: BlockPlan) -> None:
    """Changes the class of a block and compares it with what it was."""
    hidden = state.shapes[1]
    made = torch.Generator().manual_seed(0)
    x = torch.randn(2, 7, hidden, generator=made)
    mask = torch.zeros(2, 1, 7, 7)
    mask[1, :, :, 5:] = torch.finfo(torch.float32).min
    training = block.training
    block.eval()
    with torch.no_grad():
        expected = block(x, mask)
        state.in_tuple = isinstance(expected, tuple)
        block.__dict__["_fused"] = state
        block.__class__ = _class(type(block))
        got = block(x, mask)
    block.train(training)
    want, have = (y[0] if state.in_tuple else y for y in (expected, got))
    error = ((have - want).norm() / want.norm()).item()
    if not error <= _TOLERANCE:
        raise UnsupportedModelError(
            f"the fused block {name!r} is {error:.3f} of the root mean square away from the plain "
            "one; use the model as it is, and report its architecture."
        )
