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
from helpers import make_batch, pair, tiny_run
from tutelage.cli import app
from tutelage.distill import LiveTeacher
from tutelage.errors import ArtefactError, StudyError
from tutelage.study import _output, analyze, block_errors
from tutelage.study._entries import ENTRIES
from tutelage.study._folder import RunFolder, spaced
from tutelage.study._rerun import retrain
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
    values = tiny_run(
        folder, eval_rows=70, teacher_steps=4, student={"max_steps": 4, "batch_size": 8}
    )
    run_recipe(recipe_from_dict(values))
    return folder / "out"


def test_a_folder_is_analyzed(done: Path) -> None:
    found = analyze(done, examples=40)
    assert list(found.data) == ["blocks", "activations"]
    written = json.loads((done / "analysis" / "blocks.json").read_text())
    assert written == json.loads(json.dumps(found.data["blocks"]))
    assert written["examples"] == 40
    assert len(written["blocks"]) == len(found.blocks) == 2
    assert written["blocks"][1]["signals"]["block_output"]["mse"] > 0
    everything = analyze(done, examples=1000, only=["blocks"])
    assert everything.data["blocks"]["examples"] == 70
    assert everything.blocks != found.blocks


def test_every_analysis_explains_itself_and_has_a_figure(done: Path) -> None:
    names = list(ENTRIES)
    found = analyze(done, only=names, retrain=True, examples=20, samples=4, points=3)
    assert list(found.data) == names
    for name in names:
        written = json.loads((done / "analysis" / f"{name}.json").read_text())
        assert written == json.loads(json.dumps(found.data[name]))
        assert written["title"]
        assert written["caption"].endswith(".")
        assert (done / "analysis" / f"{name}.png").stat().st_size > 10_000
    assert {file.name for file in found.files} == {
        f"{name}.{kind}" for name in names for kind in ("json", "png")
    }
    assert not list((done / "analysis").glob(".*"))
    assert found.data["stages"]["stages"][1]["assisted"]
    assert len(found.data["sharpness"]["per_sample"]) == 4
    assert len(found.data["oscillation"]["layers"][0]["flipped"]) == 4
    assert found.data["latents"]["first"] != found.data["latents"]["last"]
    assert "100.00 % of its codes equal" in found.data["surface"]["caption"]


def test_the_trained_again_student_is_the_packed_one(done: Path) -> None:
    before = sorted(str(path) for path in done.rglob("*"))
    run = RunFolder(done)
    again = retrain(run)
    assert again.equal == 1.0
    batch = inputs(5)
    with torch.no_grad():
        own, packed = (m(**batch).logits for m in (again.student, run.student))
    assert torch.equal(own, packed)
    assert sorted(str(path) for path in done.rglob("*")) == before
    made = run.trainable()
    with torch.no_grad():
        torch.testing.assert_close(made(**batch).logits, packed, atol=1e-4, rtol=1e-4)


def test_a_trainable_student_has_the_scheme_of_the_recipe(done: Path) -> None:
    run = RunFolder(done)
    values = run.recipe.model_dump()
    values["student"] |= {"learned_scales": True, "quantize_attention": False}
    run.recipe = recipe_from_dict(values)
    made = run.trainable()
    names = [name for name, _ in made.named_parameters()]
    assert any(name.endswith("log_gain") for name in names)
    assert not any("attention_quantizer" in name for name, _ in made.named_modules())


def test_sharpness_of_the_packed_student_is_that_of_the_trained_one(done: Path) -> None:
    packed, trained = (
        analyze(done, only=["sharpness"], samples=3, retrain=again).data["sharpness"]
        for again in (False, True)
    )
    values = [[sample[0] for sample in data["per_sample"]] for data in (packed, trained)]
    assert values[0] == pytest.approx(values[1], rel=0.02)
    assert packed["trace"]["value"] == pytest.approx(trained["trace"]["value"], rel=0.01)


def test_examples_are_evenly_spaced() -> None:
    assert spaced(10, 4) == [0, 2, 5, 7]
    assert spaced(3, 8) == [0, 1, 2]
    assert spaced(5, 1) == [0]


def test_without_matplotlib_there_are_no_figures(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(done, copied)
    monkeypatch.setattr(_output, "plots_missing", lambda: "no plots: it is missing.")
    said: list[str] = []
    analyze(copied, examples=4, report=said.append)
    assert said == ["no plots: it is missing."]
    assert (copied / "analysis" / "blocks.json").is_file()
    assert not (copied / "analysis" / "blocks.png").exists()


def test_the_command(done: Path) -> None:
    shown: Any = CliRunner().invoke(app, ["analyze", str(done), "--examples", "8"])
    assert shown.exit_code == 0
    assert "cosine" in shown.output
    some = ["--examples", "8", "--only", "activations, blocks", "--json"]
    plain: Any = CliRunner().invoke(app, ["analyze", str(done), *some])
    assert list(json.loads(plain.output)) == ["blocks", "activations"]


def test_says_what_is_missing(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no recipe\.yaml"):
        analyze(tmp_path)
    with pytest.raises(StudyError, match="0 examples"):
        analyze(done, examples=0)
    with pytest.raises(StudyError, match="0 samples"):
        analyze(done, samples=0)
    with pytest.raises(StudyError, match="4 points a side"):
        analyze(done, points=4)
    with pytest.raises(StudyError, match=r"no analysis 'sharpnes'.*Did you mean 'sharpness'"):
        analyze(done, only=["sharpnes"])
    with pytest.raises(StudyError, match=r"'surface' needs the latent weights.*--retrain"):
        analyze(done, only=["surface"])
    copied = tmp_path / "copy"
    shutil.copytree(done, copied)
    shutil.rmtree(copied / "teacher")
    with pytest.raises(ArtefactError, match=r"the teacher of .* is gone"):
        analyze(copied)
