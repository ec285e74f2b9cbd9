"""What rounding the parts that are not quantized costs, on saved students and real sentences.

    python benchmarks/rest_dtype.py DIR [DIR ...] [--output FILE.json]

Position and type embeddings, norms, biases and head of a student are rounded in several ways; the
evaluation data of its recipe are run through each, and compared with float32: accuracy, share of
equal labels, and the mean KL divergence.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import tutelage
from tutelage.train.data import read_examples
from tutelage.train.recipe import load_recipe

ROWS = 32


def bfloat16(weight: Tensor) -> Tensor:
    """Rounds to bfloat16."""
    return weight.bfloat16().float()


def int8(weight: Tensor) -> Tensor:
    """Rounds to 8 bits with one scale a row, a vector being one row."""
    scale = weight.abs().amax(-1, keepdim=True) / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (weight / scale).round() * scale


WAYS: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "all bfloat16": (bfloat16, False),
    "embeddings bfloat16": (bfloat16, True),
    "embeddings int8": (int8, True),
    "all int8": (int8, False),
}
"""By name: how a parameter is rounded, and whether only embeddings are."""


@torch.no_grad()
def rounded(model: nn.Module, way: str) -> nn.Module:
    """Returns a copy of a packed model with its parameters rounded."""
    made = copy.deepcopy(model)
    round_, embeddings = WAYS[way]
    for name, parameter in made.named_parameters():
        if not embeddings or (parameter.dim() > 1 and "embeddings" in name):
            parameter.copy_(round_(parameter))
    return made


@torch.no_grad()
def logits(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Returns the logits of all batches."""
    return torch.cat([model(**batch).logits for batch in batches])


def measure(folder: Path) -> dict[str, object]:
    """Returns the figures of one student."""
    section = load_recipe(folder / "recipe.yaml").data
    examples = read_examples(section.eval, section, split="eval")
    model = tutelage.load(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = examples.texts
    labels = torch.tensor([model.config.label2id[str(label)] for label in examples.labels])
    batches = [
        dict(
            tokenizer(
                texts[start : start + ROWS],
                padding=True,
                truncation=True,
                max_length=section.max_length,
                return_tensors="pt",
            )
        )
        for start in range(0, len(texts), ROWS)
    ]
    base = logits(model, batches)
    found: dict[str, object] = {
        "folder": folder.name,
        "examples": len(texts),
        "accuracy": float((base.argmax(-1) == labels).float().mean()),
        "ways": {},
    }
    for way in WAYS:
        got = logits(rounded(model, way), batches)
        kl = nn.functional.kl_div(
            got.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction="batchmean"
        )
        found["ways"][way] = {
            "accuracy": float((got.argmax(-1) == labels).float().mean()),
            "labels_equal": float((got.argmax(-1) == base.argmax(-1)).float().mean()),
            "kl": float(kl),
            "largest_difference": float((got - base).abs().max()),
        }
    return found


def main() -> None:
    """Measures every folder and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = []
    for folder in args.folders:
        row = measure(folder)
        rows.append(row)
        print(f"{row['folder']}: {row['examples']} examples, float32 {row['accuracy']:.4f}")
        for way, figures in row["ways"].items():
            print(
                f"  {way:<20} accuracy {figures['accuracy']:.4f}  equal labels "
                f"{figures['labels_equal']:.4f}  KL {figures['kl']:.2e}  largest difference "
                f"{figures['largest_difference']:.3f}"
            )
    if args.output:
        args.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
