"""Loading what a recipe names: configuration, classifier, tokenizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import RecipeError, TutelageError, UnsupportedModelError
from .data import Examples
from .tasks import EncodedDataset, TextTask, has_head

__all__ = ["encode_for", "load_classifier", "load_config", "load_tokenizer", "position_limit"]


@contextmanager
def _one_line(key: str, name: str) -> Iterator[None]:
    """Turns the many errors of loading into one line that names the recipe's key."""
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
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise RecipeError(
            f"the weights of {key} {name!r} are truncated or corrupt ({error}); copy or download "
            "the model again."
        ) from error


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
    with _one_line(key, name):
        return AutoConfig.from_pretrained(name)


def load_tokenizer(name: str, key: str = "model.name_or_path") -> Any:
    """Loads the tokenizer of a model.

    Args:
        name: A folder or a model name.
        key: The recipe's key, for messages.

    Raises:
        RecipeError: There is none.
        UnsupportedModelError: It cannot pad.
    """
    from transformers import AutoTokenizer

    with _one_line(f"the tokenizer of {key}", name):
        tokenizer = AutoTokenizer.from_pretrained(name)
    # Without its files transformers makes a tokenizer that knows special tokens only.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise RecipeError(
            f"{key} {name!r} holds no tokenizer; save one there with tokenizer.save_pretrained."
        )
    if tokenizer.pad_token_id is None:
        raise UnsupportedModelError(
            f"the tokenizer of {name!r} has no padding token; set its pad_token and save it there."
        )
    return tokenizer


def load_classifier(
    name: str, config: Any, task: TextTask, key: str = "model.name_or_path"
) -> nn.Module:
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
    from transformers import AutoModelForSequenceClassification as Auto

    if type(config) not in Auto._model_mapping:
        raise UnsupportedModelError(
            f"{key} {name!r} is of type {getattr(config, 'model_type', '?')!r}, for which "
            "transformers has no sequence classifier; give a text encoder such as BERT."
        )
    labels: dict[str, Any] = {"num_labels": task.num_labels, "problem_type": task.problem_type}
    if task.label_names:
        labels["id2label"] = task.id2label
        labels["label2id"] = {label: index for index, label in task.id2label.items()}
    with _one_line(key, name):
        model, info = Auto.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, **labels
        )
    missing = sorted(info["missing_keys"])
    own = f"{model.base_model_prefix}."
    inner = [k for k in missing if k.startswith(own) and ".pooler." not in k]
    lacking = missing if has_head(config) else inner
    if lacking:
        raise UnsupportedModelError(
            f"{key} {name!r} lacks the weight {lacking[0]!r} (and {len(lacking) - 1} more); give a "
            "complete model."
        )
    return model


def encode_for(
    model: nn.Module, task: TextTask, examples: Examples, tokenizer: Any, max_length: int
) -> EncodedDataset:
    """Tokenizes examples and keeps the columns that a model takes.

    Args:
        model: A text encoder.
        task: The task.
        examples: The examples.
        tokenizer: The model's tokenizer.
        max_length: Tokens after which a text is cut.
    """
    encoded = task.encode(examples, tokenizer, max_length)
    taken = inspect.signature(model.forward).parameters
    columns = {name: column for name, column in encoded.columns.items() if name in taken}
    return EncodedDataset(columns, encoded.labels)


def position_limit(model: nn.Module) -> int | None:
    """Returns how many tokens the position embeddings of a model allow.

    Args:
        model: A text encoder.

    Returns:
        The number, ``None`` if there are no such embeddings.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            # RoBERTa numbers its positions from padding_idx + 1.
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return None
