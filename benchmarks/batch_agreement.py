"""Does a sentence's result depend on its batch? Measured on a saved student and real sentences.

    python benchmarks/batch_agreement.py DIR [--data FILE] [--output FILE.json]

Two questions. At equal shape: sentences stay where they are, all other sentences of the batch and
all padded tokens change; no bit of a logit may. Alone against batched: other shapes round
differently, and the label should agree all the same.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

import tutelage
from tutelage.train.data import read_examples
from tutelage.train.recipe import load_recipe

ROWS = 32


@torch.no_grad()
def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Returns the logits of a batch."""
    return model(**batch).logits


def equal_shape(model: nn.Module, tokenizer: object, texts: list[str], length: int) -> int:
    """Returns how many sentences change a bit when everything around them changes."""
    changed = 0
    vocabulary = len(tokenizer)
    for start in range(0, len(texts) - ROWS + 1, ROWS):
        batch = tokenizer(
            texts[start : start + ROWS],
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        before = logits(model, dict(batch))
        other = {key: value.clone() for key, value in batch.items()}
        padded = other["attention_mask"] == 0
        noise = torch.randint(1, vocabulary, padded.shape)
        other["input_ids"] = torch.where(padded, noise, other["input_ids"])
        odd = torch.arange(ROWS) % 2 == 1
        other["input_ids"][odd] = noise[odd]
        other["attention_mask"][odd] = 1
        after = logits(model, other)
        changed += int((before[~odd] != after[~odd]).any(-1).sum())
    return changed


def main() -> None:
    """Measures both and prints a line each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    section = load_recipe(args.folder / "recipe.yaml").data
    source = args.data or section.eval
    texts = read_examples(source, section, split="eval").texts
    model, tokenizer = tutelage.load(args.folder), AutoTokenizer.from_pretrained(args.folder)
    changed = equal_shape(model, tokenizer, texts, section.max_length)
    alone, batched = [], []
    for start in range(0, len(texts), ROWS):
        rows = texts[start : start + ROWS]
        settings = {"truncation": True, "max_length": section.max_length, "return_tensors": "pt"}
        batched.append(logits(model, dict(tokenizer(rows, padding=True, **settings))))
        alone += [logits(model, dict(tokenizer([row], **settings))) for row in rows]
    together, single = torch.cat(batched), torch.cat(alone)
    agreement = (together.argmax(-1) == single.argmax(-1)).float().mean().item()
    largest = (together - single).abs().max().item()
    tried = len(texts) // ROWS * ROWS // 2
    print(f"equal shape: {changed} of {tried} sentences changed a bit")
    print(
        f"alone against batches of {ROWS}: labels agree for {agreement:.4%} of {len(texts)} "
        f"sentences, largest difference of a logit {largest:.2g}"
    )
    if args.output:
        record = {
            "changed": changed,
            "tried": tried,
            "agreement": agreement,
            "sentences": len(texts),
            "largest_difference": largest,
            "torch": torch.__version__,
        }
        args.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
