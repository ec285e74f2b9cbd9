"""Errors of inner signals: against loops, and of a run's folder."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import tutelage
from families import make_any_student, make_inputs, make_model
from helpers import make_batch, pair, save_tiny, write_rows
from tutelage.cli import app
from tutelage.distill import LiveTeacher
from tutelage.errors import ArtefactError, StudyError
from tutelage.study import analyze, block_errors
from tutelage.train.recipe import recipe_from_dict
from tutelage.train.run import run_recipe


def inputs(seed: int = 0) -> dict[str, torch.Tensor]:
    batch = make_batch(seed=seed)
    del batch["labels"]
    return batch


def test_a_model_has_no_error_against_itself() -> None:
    _, teacher = pair("bert")
    found = block_errors(copy.deepcopy(teacher), teacher, [inputs()])
    assert len(found) == 2
    for block in found:
        assert set(block.signals) == {"context", "attention_output", "ffn_input", "block_output"}
        for error in block.signals.values():
            assert error.mse == error.relative == 0
            assert error.cosine == pytest.approx(1.0)
        assert block.attention_kl == pytest.approx([0.0] * 4, abs=1e-12)


def test_figures_are_those_of_a_loop_over_real_tokens() -> None:
    student, teacher = pair("bert", "binary-a4")
    student.eval()
    given = [inputs(0), inputs(1)]
    found = block_errors(student, teacher, given)
    sites = {"context", "attention_output", "ffn_input", "block_output", "attention_map"}
    live = LiveTeacher(teacher)
    pairs = []
    for batch in given:
        theirs = live.get(batch, None, sites)[1]
        with torch.no_grad(), tutelage.sites.Tap(student, live.sites, sites) as tap:
            student(**batch)
        pairs.append((tap.signals(), theirs, batch["attention_mask"]))
    for index, block in enumerate(found):
        for site in sites - {"attention_map"}:
            squares = norm = cosine = 0.0
            tokens = numbers = 0
            for own, other, mask in pairs:
                for row, token in mask.nonzero().tolist():
                    s = own[site][index][row, token].tolist()
                    t = other[site][index][row, token].tolist()
                    squares += sum((a - b) ** 2 for a, b in zip(s, t, strict=True))
                    norm += sum(b * b for b in t)
                    dot = sum(a * b for a, b in zip(s, t, strict=True))
                    cosine += dot / (sum(a * a for a in s) * sum(b * b for b in t)) ** 0.5
                    tokens, numbers = tokens + 1, numbers + len(s)
            error = block.signals[site]
            assert error.mse == pytest.approx(squares / numbers, rel=1e-6)
            assert error.relative == pytest.approx(squares / norm, rel=1e-6)
            assert error.cosine == pytest.approx(cosine / tokens, rel=1e-6)
        for head, kl in enumerate(block.attention_kl):
            total, count = 0.0, 0
            for own, other, mask in pairs:
                for row, token in mask.nonzero().tolist():
                    s = own["attention_map"][index][row, head, token].double()
                    t = other["attention_map"][index][row, head, token].double()
                    kept = t > 0
                    total += float((t[kept] * (t[kept] / s[kept]).log()).sum())
                    count += 1
            assert kl == pytest.approx(total / count, rel=1e-6)


@pytest.mark.parametrize("family", ["distilbert", "gpt2", "vit", "llama", "t5", "albert"])
def test_other_families(family: str) -> None:
    teacher = make_model(family)
    student = make_any_student(family)
    blocks = block_errors(student.eval(), teacher.eval(), [make_inputs(family)])
    assert blocks
    for block in blocks:
        assert all(error.mse > 0 for error in block.signals.values())
        assert all(math.isfinite(kl) and kl >= 0 for kl in block.attention_kl)


def test_there_must_be_a_batch() -> None:
    student, teacher = pair("bert")
    with pytest.raises(StudyError, match="no batch"):
        block_errors(student, teacher, [])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    values = {
        "model": {"name_or_path": str(save_tiny(folder / "model"))},
        "data": {
            "train": str(write_rows(folder / "train.tsv", rows=24)),
            "eval": str(write_rows(folder / "dev.tsv", rows=70, seed=1)),
            "max_length": 16,
        },
        "teacher": {"max_steps": 4, "learning_rate": 1e-3, "batch_size": 8},
        "student": {"max_steps": 4, "batch_size": 8},
        "output": str(folder / "out"),
    }
    run_recipe(recipe_from_dict(values))
    return folder / "out"


def test_a_folder_is_analyzed(done: Path) -> None:
    found = analyze(done, examples=40)
    written = json.loads((done / "analysis" / "blocks.json").read_text())
    assert written["examples"] == 40
    assert len(written["blocks"]) == len(found) == 2
    assert written["blocks"][1]["signals"]["block_output"]["mse"] > 0
    assert (done / "analysis" / "blocks.png").stat().st_size > 10_000
    everything = analyze(done, examples=1000)
    assert json.loads((done / "analysis" / "blocks.json").read_text())["examples"] == 70
    assert everything != found


def test_the_command(done: Path) -> None:
    shown: Any = CliRunner().invoke(app, ["analyze", str(done), "--examples", "8"])
    assert shown.exit_code == 0
    assert "cosine" in shown.output
    plain: Any = CliRunner().invoke(app, ["analyze", str(done), "--examples", "8", "--json"])
    assert len(json.loads(plain.output)) == 2


def test_says_what_is_missing(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no recipe\.yaml"):
        analyze(tmp_path)
    with pytest.raises(StudyError, match="0 examples"):
        analyze(done, examples=0)
    copied = tmp_path / "copy"
    shutil.copytree(done, copied)
    shutil.rmtree(copied / "teacher")
    with pytest.raises(ArtefactError, match=r"the teacher of .* is gone"):
        analyze(copied)
