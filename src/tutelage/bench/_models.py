"""Models in torch: loading them, and calling them in the one way that every engine imitates."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import BenchError

__all__ = ["ByPosition", "first_line", "is_decoder", "load_plain", "settings_of", "trace"]


def first_line(error: BaseException) -> str:
    """Returns one line about an exception.

    Args:
        error: The exception.
    """
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__


def class_of(folder: Path) -> Any:
    """Returns the transformers class of the model in a folder; imports its module.

    Args:
        folder: Holds a config.json.

    Raises:
        BenchError: There is no such model.
    """
    import json

    import transformers

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return getattr(transformers, config["architectures"][0])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise BenchError(
            f"{folder} holds no model of transformers; give --teacher the folder of the model "
            "that the student was trained from."
        ) from error


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Loads an unquantized model in eval mode.

    Args:
        folder: Written by ``save_pretrained``.
        dtype: Of its weights.

    Raises:
        BenchError: There is no such model, or it is quantized.
    """
    cls = class_of(folder)
    try:
        model = cls.from_pretrained(folder, dtype=dtype, local_files_only=True)
    except Exception as error:  # whatever an odd folder makes transformers raise
        raise BenchError(f"{folder} could not be loaded: {first_line(error)}") from error
    if getattr(model, "hf_quantizer", None) is not None:
        raise BenchError(f"{folder} holds a quantized model; give --teacher a plain one.")
    return cast("nn.Module", model.eval())


def settings_of(model: nn.Module) -> dict[str, Any]:
    """Returns how a model is called: no cache, and of a decoder the last logits only.

    Args:
        model: A transformers model.
    """
    known = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 1, "return_dict": True}
    return {name: value for name, value in wanted.items() if name in known} | {"return_dict": True}


def is_decoder(model: nn.Module) -> bool:
    """Whether a model generates text from text.

    Args:
        model: A transformers model.
    """
    able = getattr(model, "can_generate", None)
    return bool(able and able()) and getattr(model, "main_input_name", "") == "input_ids"


def main_output(outputs: Any) -> Tensor:
    """Returns the logits, or the first output of a model that has none.

    Args:
        outputs: What a transformers model returned.
    """
    if "logits" in outputs:
        return cast("Tensor", outputs["logits"])
    return next(v for v in outputs.values() if isinstance(v, Tensor))


class ByPosition(nn.Module):
    """A model that takes tensors by position and returns its main output.

    Args:
        model: A transformers model.
        names: Its arguments, in order.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.settings = settings_of(model)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Calls the model.

        Args:
            *inputs: In the order of ``names``.
        """
        return main_output(
            self.model(**dict(zip(self.names, inputs, strict=True)), **self.settings)
        )


def trace(model: nn.Module, inputs: dict[str, Tensor]) -> torch.export.ExportedProgram:
    """Traces a model, batch and length left open.

    Args:
        model: A transformers model.
        inputs: A sample of at least two examples.

    Raises:
        BenchError: It cannot be traced.
    """
    open_ = torch.export.Dim.DYNAMIC
    shapes = tuple(
        {0: open_} if tensor.is_floating_point() or tensor.dim() < 2 else {0: open_, 1: open_}
        for tensor in inputs.values()
    )
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its own
            return torch.export.export(
                ByPosition(model, tuple(inputs)),
                tuple(inputs.values()),
                dynamic_shapes={"inputs": shapes},
                strict=False,
            )
    except Exception as error:  # whatever a model's code makes the tracer raise
        raise BenchError(
            f"{type(model).__name__} cannot be traced ({first_line(error)})"
        ) from error
