"""A small valid input for any model, made without drawing random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError

__all__ = ["DECODER_TOKENS", "TOKENS", "synthesize_inputs"]

TOKENS = 8
DECODER_TOKENS = 6
"""Different, so that the length of an axis tells whose positions it counts."""

_PIXELS = 64
"""Height and width for models that take images of any size."""


def _ids(vocabulary: int, length: int, device: torch.device) -> Tensor:
    return (torch.arange(1, length + 1, device=device) % vocabulary).unsqueeze(0)


def _image(config: Any) -> Any:
    """Returns the configuration, or the part of it, that knows the size of an image."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return next((c for c in (config, *parts) if getattr(c, "image_size", None) is not None), None)


def synthesize_inputs(model: nn.Module) -> dict[str, Tensor]:
    """Makes a small valid input for ``model`` without drawing random numbers.

    Args:
        model: A transformers model whose main input is ``input_ids``, ``pixel_values`` or
            ``input_features``.

    Returns:
        Keyword arguments of ``model.forward``, batch size 1, on the model's device.

    Raises:
        UnsupportedModelError: The main input is of another kind.
    """
    config: Any = model.config
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    main = getattr(model, "main_input_name", "input_ids")
    made: dict[str, Tensor] = {}
    image = _image(config)
    if main == "input_ids":
        vocabulary = config.get_text_config().vocab_size
        made["input_ids"] = _ids(vocabulary, TOKENS, device)
        made["attention_mask"] = torch.ones(1, TOKENS, dtype=torch.long, device=device)
    elif main == "pixel_values":
        size = _PIXELS if image is None else image.image_size
        height, width = size if isinstance(size, list | tuple) else (size, size)
        shape = (1, getattr(image or config, "num_channels", 3), height, width)
        made["pixel_values"] = torch.zeros(shape, device=device, dtype=dtype)
    elif main == "input_features" and hasattr(config, "max_source_positions"):
        shape3 = (1, config.num_mel_bins, 2 * config.max_source_positions)
        made["input_features"] = torch.zeros(shape3, device=device, dtype=dtype)
    else:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes {main!r} as its main input; only 'input_ids', "
            "'pixel_values' and the log-mel 'input_features' of Whisper can be traced."
        )
    if getattr(config, "is_encoder_decoder", False):
        vocabulary = config.get_text_config(decoder=True).vocab_size
        made["decoder_input_ids"] = _ids(vocabulary, DECODER_TOKENS, device)
    return made
