"""The model card that is stored with a packed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from .._prepare import Prepared
from .._summary import summary
from ..quantizers import Encoding

__all__ = ["model_card"]


def model_card(
    student: nn.Module,
    state: Prepared,
    metrics: Mapping[str, Any],
    encoding: Encoding = "bits",
    rest: Literal["float32", "bfloat16"] = "float32",
) -> str:
    """Returns the text of ``README.md``.

    Args:
        student: The student.
        state: What ``prepare`` left on it.
        metrics: Figures by name.
        encoding: How its codes are stored.
        rest: Dtype in which all that is not quantized is stored.
    """
    total = summary(student, encoding, rest)
    lines = [
        "---",
        "library_name: transformers",
        "tags: [tutelage, quantized]",
        "---",
        "",
        f"# {type(student).__name__}, {state.scheme.name}",
        "",
        f"Quantized with Tutelage: scheme `{state.scheme.name}`, "
        f"{total.packed_bytes:,} bytes of weights, {total.float_bytes / total.packed_bytes:.1f} "
        "times smaller than float32.",
        "",
        "```python",
        "import tutelage",
        *_usage(type(student).__name__),
        "```",
        "",
    ]
    if metrics:
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {name} | {_show(value)} |" for name, value in metrics.items()]
        lines.append("")
    return "\n".join(lines)


_PIPELINES = {
    "ForSequenceClassification": ("classify", "text-classification"),
    "ForTokenClassification": ("label", "token-classification"),
    "ForImageClassification": ("classify", "image-classification"),
    "ForCausalLM": ("generate", "text-generation"),
    "LMHeadModel": ("generate", "text-generation"),
}
"""From the end of a model's class to a variable and the pipeline of transformers."""


def _usage(name: str) -> list[str]:
    for end, (variable, task) in _PIPELINES.items():
        if name.endswith(end):
            call = f'{variable} = pipeline("{task}", "PATH/TO/THIS/FOLDER")'
            return ["from transformers import pipeline", "", call]
    return ["", 'model = tutelage.load("PATH/TO/THIS/FOLDER")']


def _show(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
