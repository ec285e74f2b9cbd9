"""Loading what makes a model's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import nn

from ..errors import RecipeError, TutelageError, UnsupportedModelError

__all__ = [
    "IMAGE_PROCESSOR_FILES",
    "load_image_processor",
    "load_tokenizer",
    "one_line",
    "position_limit",
]


IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""Where transformers stores an image processor."""


@contextmanager
def one_line(key: str, name: str) -> Iterator[None]:
    """Turns the many errors of loading into one line that names the recipe's key.

    Args:
        key: The recipe's key.
        name: Its value.

    Raises:
        RecipeError: Loading failed.
    """
    try:
        yield
    except TutelageError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise RecipeError(
            f"{key} {name!r} could not be loaded ({lines[0].strip().rstrip('.:')[:200]}); give a "
            "folder written by save_pretrained, or a model name that can be reached."
        ) from error
    except SafetensorError as error:
        raise RecipeError(
            f"the weights of {key} {name!r} are truncated or corrupt ({error}); copy or download "
            "the model again."
        ) from error


def load_tokenizer(
    name: str, key: str = "model.name_or_path", *, padding: bool = True, **settings: Any
) -> Any:
    """Loads the tokenizer of a model.

    Args:
        name: A folder or a model name.
        key: The recipe's key, for messages.
        padding: Whether it must have a padding token.
        **settings: Passed to ``AutoTokenizer.from_pretrained``.

    Raises:
        RecipeError: There is none.
        UnsupportedModelError: It cannot pad.
    """
    from transformers import AutoTokenizer

    with one_line(f"the tokenizer of {key}", name):
        tokenizer = AutoTokenizer.from_pretrained(name, **settings)
    # Without its files transformers makes a tokenizer that knows special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise RecipeError(
            f"{key} {name!r} holds no tokenizer; save one there with tokenizer.save_pretrained."
        )
    if padding and tokenizer.pad_token_id is None:
        raise UnsupportedModelError(
            f"the tokenizer of {name!r} has no padding token; set its pad_token and save it there."
        )
    return tokenizer


def load_image_processor(name: str, config: Any, key: str = "model.name_or_path") -> Any:
    """Loads the image processor of a model.

    It runs on Pillow, so that results do not depend on whether torchvision is installed. A local
    folder without one gets a default: bilinear resizing to the size that the model's configuration
    names, values scaled to [0, 1], then normalised with mean 0.5 and standard deviation 0.5 in
    every channel. The student is stored with it.

    Args:
        name: A folder or a model name.
        config: The model's configuration.
        key: The recipe's key, for messages.

    Raises:
        RecipeError: It could not be loaded, or the configuration names no size.
    """
    from transformers import ViTImageProcessorPil

    # The lazy name at the top asks for torchvision in transformers 5.17.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    folder = Path(name)
    if not folder.is_dir() or any((folder / file).is_file() for file in IMAGE_PROCESSOR_FILES):
        with one_line(f"the image processor of {key}", name):
            return AutoImageProcessor.from_pretrained(name, backend="pil")
    size = getattr(config, "image_size", None)
    if size is None:
        raise RecipeError(
            f"{key} {name!r} holds no preprocessor_config.json, and its configuration names no "
            "image_size; save its image processor there with save_pretrained."
        )
    height, width = size if isinstance(size, list | tuple) else (size, size)
    half = [0.5] * int(getattr(config, "num_channels", 3))
    size = {"height": int(height), "width": int(width)}
    return ViTImageProcessorPil(size=size, image_mean=half, image_std=half)


def position_limit(model: nn.Module) -> int | None:
    """Returns how many tokens a model takes.

    Args:
        model: A model of text.

    Returns:
        The length of its position embeddings, or what its configuration names as the largest;
        ``None`` if there is neither.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            # RoBERTa numbers its positions from padding_idx + 1.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    named = getattr(cast("Any", model).config.get_text_config(), "max_position_embeddings", None)
    return named if isinstance(named, int) and named > 0 else None
