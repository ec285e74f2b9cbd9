"""The model card that is stored with a packed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["model_card"]


def model_card(
    architecture: str, scheme: str, bytes: int, float_bytes: int, metrics: Mapping[str, Any]
) -> str:
    """Returns the text of ``README.md``.

    Args:
        architecture: Class of the model.
        scheme: Name of its scheme.
        bytes: Of the stored weights.
        float_bytes: Of the same in float32.
        metrics: Figures by name.
    """
    lines = [
        "---",
        "library_name: transformers",
        "tags: [tutelage, quantized]",
        "---",
        "",
        f"# {architecture}, {scheme}",
        "",
        f"Quantized with Tutelage: scheme `{scheme}`, "
        f"{bytes:,} bytes of weights, {float_bytes / bytes:.1f} "
        "times smaller than float32.",
        "",
        "```python",
        "import tutelage",
        *_usage(architecture),
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
