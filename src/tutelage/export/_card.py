"""The model card that is stored with a packed model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from .._prepare import Prepared
from .._summary import summary

__all__ = ["model_card"]


def model_card(student: nn.Module, state: Prepared, metrics: Mapping[str, Any]) -> str:
    """Returns the text of ``README.md``.

    Args:
        student: The student.
        state: What ``prepare`` left on it.
        metrics: Figures by name.
    """
    total = summary(student)
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
        "from transformers import pipeline",
        "",
        'classify = pipeline("text-classification", "PATH/TO/THIS/FOLDER")',
        "```",
        "",
    ]
    if metrics:
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {name} | {_show(value)} |" for name, value in metrics.items()]
        lines.append("")
    return "\n".join(lines)


def _show(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)
