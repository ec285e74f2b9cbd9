"""Every Python block of the pages runs, in order, in one namespace a page."""

from __future__ import annotations

import copy
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pages import PAGES, ROOT, Block, blocks, label

import tutelage
from helpers import make_tokenizer, pair, rows, save_tiny, tiny
from tutelage import intervention
from tutelage.distill import losses
from tutelage.scheme import WEIGHT_QUANTIZERS

NOT_RUN = {
    "docs/training.md": ["compiling takes a minute", "needs a CUDA device"],
}
"""Blocks that the pages say cannot run here: add one for a good reason only."""

METHODS = ROOT / "docs" / "adding-a-method.md"
WITH_EXAMPLES = [page for page in PAGES if blocks(page, "python") and page != METHODS]


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(losses, "_TERMS", dict(losses._TERMS))
    monkeypatch.setattr(intervention._stages, "_STAGES", dict(intervention._stages._STAGES))
    before = dict(WEIGHT_QUANTIZERS)
    yield
    WEIGHT_QUANTIZERS.clear()
    WEIGHT_QUANTIZERS.update(before)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "my-fine-tuned-bert", head=("a", "b", "c"))
    lines = [f'"w{row % 9} w{row % 3 + 30}",{"abc"[row % 3]}' for row in range(40)]
    (tmp_path / "my.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return tmp_path


@pytest.fixture
def namespace(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of a module, so that a page may define a dataclass."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    return vars(module)


def given(page: Path) -> dict[str, Any]:
    """Returns what a page takes for given, and makes the student that it speaks of."""
    if page.name in ("deploy.md", "getting-started.md"):
        student = tutelage.prepare(tiny(), tutelage.Scheme.preset("ternary-a8"))
        tutelage.save(student, "small-bert", processor=make_tokenizer())
    found: dict[str, Any] = {"tokenized": rows(8)}
    if page.name in ("training.md", "deploy.md"):
        student, teacher = pair(dropout=0.0)
        found |= {
            "torch": torch,
            "tutelage": tutelage,
            "student": student,
            "teacher": teacher,
            "schedule": tutelage.Schedule.gradual(6),
            "dataset": rows(32),
            "collator": transformers.default_data_collator,
            "arguments": tutelage.QATArguments("runs/page", max_steps=8, use_cpu=True),
        }
    return found


def run(block: Block, namespace: dict[str, Any]) -> None:
    short = re.sub(r"max_steps=\d{2,}", "max_steps=3", block.text)
    lines = "\n" * block.line + short
    exec(compile(lines, label(block.page), "exec"), namespace)


@pytest.mark.usefixtures("registries", "folder")
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=label)
def test_examples_of_a_page(page: Path, namespace: dict[str, Any]) -> None:
    namespace |= given(page)
    for block in blocks(page, "python"):
        if block.reason is None:
            run(block, namespace)


def test_what_is_not_run() -> None:
    found = {label(page): [b.reason for b in blocks(page) if b.reason] for page in PAGES}
    assert {page: reasons for page, reasons in found.items() if reasons} == NOT_RUN


@pytest.mark.usefixtures("registries", "folder")
def test_the_methods_that_are_added_work_together(namespace: dict[str, Any]) -> None:
    for block in blocks(METHODS, "python"):
        run(block, namespace)
    made = namespace
    assert made["trainer"].state.global_step == 8
    weight = tutelage.scheme.WeightSpec(kind="fading-absmean")
    student = copy.deepcopy(made["teacher"]).requires_grad_(True)
    tutelage.prepare(student, tutelage.Scheme(weight=weight))
    distiller = tutelage.Distiller(student, made["teacher"], made["mine"])
    batch = transformers.default_data_collator(made["data"][:3])
    stage = made["constant"](0)
    assert stage == "fading_context"
    step = distiller.step(batch, stage, progress=torch.tensor(0.5))
    assert set(step.terms) == {"logits", "attention_scores", "hidden_cosine", "context_local"}
    step.loss.backward()
    w = student.bert.encoder.layer[0].intermediate.dense.weight
    assert w.grad is not None
    x = torch.tensor([[0.5, -4.0]], requires_grad=True)
    made["FadingAbsmean"]()(x).sum().backward()
    edge = 2.25  # mean |x|
    expected = torch.tensor([[1.0, torch.tensor(-(4.0 - edge) / edge).exp().item()]])
    torch.testing.assert_close(x.grad, expected)


def test_the_readme_names_every_tested_family() -> None:
    from families import FAMILIES

    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Models")[1].lower()
    named = "".join(letter for letter in table if letter.isalnum() or letter == ",")
    missing = [name for name in FAMILIES if name.replace("-", "") not in named]
    assert not missing
