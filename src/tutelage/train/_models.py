"""Loading what a recipe names: configuration and model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import RecipeError, UnsupportedModelError
from ._processors import load_tokenizer as load_tokenizer
from ._processors import one_line
from .tasks import Head, Task, TaskDataset, for_model

__all__ = ["auto_class", "encode_for", "load_config", "load_model", "load_tokenizer"]


def load_config(name: str, key: str = "model.name_or_path") -> Any:
    """Loads the configuration of a model.

    Args:
        name: A folder or a model name.
        key: The recipe's key, for messages.

    Raises:
        RecipeError: There is no such model.
    """
    from transformers import AutoConfig

    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise RecipeError(
            f"{key} {name!r} is a folder without config.json; name one written by save_pretrained."
        )
    if not path.exists() and (name[:1] in ("/", ".", "~") or name.count("/") > 1):
        raise RecipeError(f"{key}: there is no folder {name!r}; check the path.")
    with one_line(key, name):
        return AutoConfig.from_pretrained(name)


def auto_class(name: str, config: Any, head: Head, key: str = "model.name_or_path") -> Any:
    """Returns the class that loads a model with a head.

    Args:
        name: A folder or a model name.
        config: Its configuration.
        head: The head.
        key: The recipe's key, for messages.

    Raises:
        UnsupportedModelError: The model cannot have such a head.
    """
    import transformers

    auto: Any = getattr(transformers, head.auto)
    if type(config) not in auto._model_mapping:
        raise UnsupportedModelError(
            f"{key} {name!r} is of type {getattr(config, 'model_type', '?')!r}, for which "
            f"transformers has no {head.model}; give {head.example}."
        )
    return auto


def load_model(name: str, config: Any, task: Task, key: str = "model.name_or_path") -> nn.Module:
    """Loads a model in float32 with a head for the task, freshly drawn if it has none.

    Args:
        name: A folder or a model name.
        config: Its configuration.
        task: What the head is for.
        key: The recipe's key, for messages.

    Raises:
        RecipeError: The model could not be loaded.
        UnsupportedModelError: Weights are missing, or it cannot have such a head.
    """
    head = task.head
    auto = auto_class(name, config, head, key)
    with one_line(key, name):
        model, info = auto.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **task.model_settings
        )
    missing = sorted(info["missing_keys"])
    own = f"{model.base_model_prefix}."
    inner = [k for k in missing if k.startswith(own) and ".pooler." not in k]
    lacking = missing if head.on(config) else inner
    if lacking:
        raise UnsupportedModelError(
            f"{key} {name!r} lacks the weight {lacking[0]!r} (and {len(lacking) - 1} more); give a "
            "complete model."
        )
    return model


def encode_for(
    model: nn.Module, task: Task, examples: Any, processor: Any, max_length: int
) -> TaskDataset:
    """Makes inputs of examples and keeps those that a model takes.

    Args:
        model: A model with a head for the task.
        task: The task.
        examples: The examples.
        processor: The model's tokenizer or image processor.
        max_length: Tokens after which a text is cut.
    """
    return for_model(task.encode(examples, processor, max_length), model)
