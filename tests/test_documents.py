"""The examples in README.md and CONTRIBUTING.md run as they stand."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import tutelage
from helpers import rows, save_tiny
from tutelage import intervention
from tutelage.distill import losses
from tutelage.scheme import WEIGHT_QUANTIZERS

ROOT = Path(__file__).parent.parent


def blocks(name: str) -> list[str]:
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_TERMS", dict(losses._TERMS))
    monkeypatch.setattr(intervention._stages, "_STAGES", dict(intervention._stages._STAGES))
    before = dict(WEIGHT_QUANTIZERS)
    yield
    WEIGHT_QUANTIZERS.clear()
    WEIGHT_QUANTIZERS.update(before)


@pytest.mark.usefixtures("registries")
def test_extensions_of_contributing_work_together() -> None:
    names: dict[str, Any] = {}
    for block in blocks("CONTRIBUTING.md"):
        exec(block, names)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
    )
    teacher = BertForSequenceClassification(config)
    weight = tutelage.scheme.WeightSpec(kind="absmean")
    student = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme(weight=weight))
    distiller = tutelage.Distiller(student, teacher, names["mine"])
    batch = {
        "input_ids": torch.randint(0, 50, (2, 5)),
        "attention_mask": torch.ones(2, 5, dtype=torch.long),
    }
    stage = names["schedule"](0)
    assert stage == "fading_context"
    step = distiller.step(batch, stage, progress=torch.tensor(0.5))
    assert set(step.terms) == {"logits", "attention_scores", "hidden_cosine", "context_local"}
    step.loss.backward()


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "my-fine-tuned-bert", head=("a", "b", "c"))
    example = blocks("README.md")[0]
    assert "max_steps=300" in example
    exec(example.replace("max_steps=300", "max_steps=3"), {"tokenized": rows(8)})
    assert tutelage.load(tmp_path / "small-bert").config.id2label[0] == "a"


def test_the_readme_names_every_tested_family() -> None:
    from families import FAMILIES

    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Models")[1].lower()
    named = "".join(letter for letter in table if letter.isalnum() or letter == ",")
    missing = [name for name in FAMILIES if name.replace("-", "") not in named]
    assert not missing
