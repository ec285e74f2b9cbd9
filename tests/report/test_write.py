"""A report of a real, tiny run: what it shows, what it refuses, what it says is missing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_pages import make_run, read
from typer.testing import CliRunner

from helpers import save_tiny, write_rows
from tutelage.cli import app
from tutelage.errors import ArtefactError, OutputExistsError, RecipeError, TutelageError
from tutelage.report import Wanted, write_report
from tutelage.train.recipe import recipe_from_dict
from tutelage.train.run import run_recipe

NOTHING = Wanted(answers=False, speed=False, analysis=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = make_run(tmp_path_factory.mktemp("run"))
    write_report(run)
    return run


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "out"
    shutil.copytree(whole, copied)
    (copied / "report.html").unlink()
    return copied


def shown(folder: Path, wanted: Wanted = NOTHING) -> Any:
    return read(write_report(folder, wanted=wanted).file.read_text(encoding="utf-8"))


def test_everything_is_on_one_page(whole: Path) -> None:
    html = (whole / "report.html").read_text(encoding="utf-8")
    page = read(html)
    result = json.loads((whole / "result.json").read_text())
    accuracy = f"{100 * result['student']['metrics']['accuracy']:.1f} %"
    assert accuracy in page.texts["headline"]
    assert f"{result['ratio']:.1f} times smaller" in page.texts["headline"]
    done = page.texts["done"]
    assert "9 steps of 8, of them 6 under intervention (gradual)" in done
    for name in ("torch", "transformers", "python", "tutelage"):
        assert f"{name} {result['versions'][name]}" in done
    assert "max_length: 16" in done  # the recipe, with its defaults
    assert "weight_decay: 0" in done
    training = page.texts["training"]
    for said in ("logits", "attention scores", "attention map (TI-M)", "no intervention"):
        assert said in training
    assert "teacher's accuracy" in training
    comparison = page.texts["comparison"]
    for said in ("precision", "recall", "Who is right", "teacher \\ student", "macro F1"):
        assert said in comparison
    stored = (whole / "model.safetensors").stat().st_size
    assert f"{stored:,}" in page.texts["size"]
    assert "the student, tutelage.load" in page.texts["speed"]
    assert str(page.all("img")[0]["src"]).startswith("data:image/png;base64,")
    assert "bert.encoder.layer.1" in page.texts["inside"]
    assert "tutelage bench DIR" in page.texts["warnings"]


def test_equal_input_gives_equal_output_but_for_the_date(run: Path) -> None:
    def dateless() -> str:
        html = write_report(run, wanted=Wanted(speed=False)).file.read_text(encoding="utf-8")
        return re.sub(r"Written [^<]* UTC", "", html)

    assert dateless() == dateless()


def test_text_of_the_user_is_text(tmp_path: Path) -> None:
    labels = ["<b>a", 'b"', "c&amp;"]
    folder = tmp_path / "<i>x"
    folder.mkdir()
    run = make_run(folder, "teacher.max_steps=2", "student.max_steps=2", "student.eval_steps=null",
                   "schedule.steps=0")  # fmt: skip
    named = run.rename(folder / "<img src=x onerror=alert(1)>")
    config = json.loads((named / "config.json").read_text())
    for name in ("train.tsv", "dev.tsv"):
        file = folder / name
        lines = file.read_text().splitlines()
        for plain, hostile in zip("abc", labels, strict=True):
            lines = [re.sub(rf"\t{plain}$", f"\t{hostile}", line) for line in lines]
        file.write_text("\n".join(lines) + "\n")
    for place in (named / "config.json", named / "teacher/config.json"):
        config = json.loads(place.read_text())
        config["id2label"] = dict(enumerate(labels))
        config["label2id"] = {label: i for i, label in enumerate(labels)}
        place.write_text(json.dumps(config))
    page = shown(named, Wanted(speed=False, analysis=False))
    tags = {name for name, _ in page.tags}
    assert not {"i", "img"} & tags
    assert all("class" in attrs or not attrs for attrs in page.all("b"))
    for label in labels:
        assert label in page.texts["comparison"]
    assert "<img src=x onerror=alert(1)>" in page.texts[""]
    assert "<i>x" in page.texts["done"]


def test_a_folder_of_an_earlier_version(run: Path) -> None:
    (run / "training.json").unlink()
    (run / "teacher" / "training.json").unlink()
    result = json.loads((run / "result.json").read_text())
    del result["machine"]
    (run / "result.json").write_text(json.dumps(result))
    written = write_report(run, wanted=NOTHING)
    page = read(written.file.read_text(encoding="utf-8"))
    assert "holds no training.json" in page.texts["training"]
    assert "not recorded" in page.texts["done"]
    assert "no_log" in [finding.rule for finding in written.findings]
    assert not page.all("svg")


def test_what_is_not_wanted_is_said(run: Path) -> None:
    shutil.rmtree(run / "analysis")
    page = shown(run)
    assert "--no-answers" in page.texts["comparison"]
    assert "--no-speed" in page.texts["speed"]
    assert "--no-analysis" in page.texts["inside"]
    assert not (run / "analysis").exists()


def test_a_teacher_that_is_gone_is_said(run: Path) -> None:
    shutil.rmtree(run / "teacher")
    shutil.rmtree(run / "analysis")
    page = shown(run, Wanted())
    for section in ("comparison", "speed", "inside"):
        assert "the teacher of" in page.texts[section]
        assert "is gone" in page.texts[section]


def test_data_that_are_gone_are_said(run: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("dev.tsv", "moved.tsv"))
    page = shown(run, Wanted(speed=False))
    assert "moved.tsv" in page.texts["comparison"]
    assert "could not be loaded" in page.texts["comparison"]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "spoil", "message"),
    [
        ("result.json", lambda f: f.write_text("{"), "result.json is damaged"),
        ("training.json", lambda f: f.write_text("[]"), "training.json is damaged"),
        ("teacher/training.json", lambda f: f.write_text("{}"), "training.json is damaged"),
        ("recipe.yaml", lambda f: f.write_text("- 1"), "recipe.yaml"),
        ("recipe.yaml", lambda f: f.unlink(), "no recipe.yaml"),
        ("model.safetensors", truncate, "model.safetensors"),
        ("bench.json", lambda f: f.write_text("no"), "bench.json is damaged"),
        ("bench.json", lambda f: f.write_text('{"engines": [{}]}'), "bench.json is damaged"),
        ("bench.json", lambda f: f.write_text("[1]"), "holds no object"),
        ("analysis/blocks.json", lambda f: f.write_text("{"), "blocks.json is damaged"),
        ("analysis/blocks.json", lambda f: f.write_text("{}"), "blocks.json is damaged"),
        ("analysis/blocks.json", lambda f: f.write_text('{"title": 1}'), "its title is no text"),
        ("analysis/blocks.png", lambda f: f.write_text("GIF"), "no PNG image"),
    ],
)
def test_a_damaged_file_is_one_error_and_no_report(
    run: Path, file: str, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(run / file)
    with pytest.raises(TutelageError, match=message) as caught:
        write_report(run, wanted=NOTHING)
    assert "\n" not in str(caught.value)
    assert not (run / "report.html").exists()
    assert not list(run.glob(".report*"))


def test_refuses_what_is_no_run(tmp_path: Path, run: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no folder .*none; name one"):
        write_report(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtefactError, match=r"no result\.json of a finished run"):
        write_report(tmp_path / "empty")
    with pytest.raises(OutputExistsError, match=r"config\.json exists and is no report"):
        write_report(run, run / "config.json", wanted=NOTHING)
    with pytest.raises(OutputExistsError, match="is a folder"):
        write_report(run, run, wanted=NOTHING)
    with pytest.raises(ArtefactError, match=r"no folder .*nowhere to write"):
        write_report(run, tmp_path / "nowhere" / "r.html", wanted=NOTHING)
    (run / "recipe.yaml").write_text("model: {}")
    with pytest.raises(RecipeError, match="name_or_path"):
        write_report(run, wanted=NOTHING)


def test_a_text_about_reports_is_no_report(run: Path) -> None:
    other = run / "notes.md"
    other.write_text("Made with tutelage report.")
    with pytest.raises(OutputExistsError, match=r"notes\.md exists and is no report"):
        write_report(run, other, wanted=NOTHING)
    assert other.read_text() == "Made with tutelage report."
    written = write_report(run, wanted=NOTHING).file
    assert '<meta name="generator" content="tutelage report">' in written.read_text("utf-8")
    assert write_report(run, wanted=NOTHING).file == written  # a report is replaced


def test_figures_of_other_programs_are_shown_by_contract(run: Path) -> None:
    png = (run / "analysis" / "blocks.png").read_bytes()
    for name, title in (("zeta", "Last <one>"), ("sharpness", "How sharp")):
        values = {"title": title, "caption": f"Says {name}.", "figures": [1]}
        (run / "analysis" / f"{name}.json").write_text(json.dumps(values))
        (run / "analysis" / f"{name}.png").write_bytes(png)
    (run / "analysis" / "undrawn_one.json").write_text('{"caption": "Alone."}')
    page = shown(run)
    titles = [str(attrs["alt"]).split(":")[0] for attrs in page.all("img")]
    assert titles == [
        "Errors block by block",
        "Ranges of activations",
        "How sharp",
        "Last <one>",
    ]
    assert "Says zeta." in page.texts["inside"]
    assert "undrawn one: Alone. No figure was drawn." in page.texts["inside"]


def test_a_measurement_of_bench_is_shown(run: Path) -> None:
    def row(name: str, source: str, ms: float, ratio: float, **more: Any) -> dict[str, Any]:
        speed = {
            "ms": ms,
            "examples_per_s": 1.0,
            "ratio": ratio,
            "ratio_low": ratio - 0.1,
            "ratio_high": ratio + 0.1,
            "rounds_ms": [ms, 2 * ms, ms],
        }
        size = {"disk_bytes": (run / "model.safetensors").stat().st_size}
        plain = {"name": name, "title": f"T {name}", "source": source, "speeds": {"1x8": speed}}
        return plain | size | more

    bench = {
        "schema": 1,
        "folder": str(run),
        "model": "Bert",
        "teacher": None,
        "threads": 2,
        "rounds": 3,
        "new_tokens": None,
        "cases": ["1x8"],
        "best_int8": {"1x8": "torch-int8"},
        "engines": [
            row("student", "student", 2.0, 1.5),
            row("fp32", "teacher", 6.0, 0.5, weight_bytes=2**20),
            row("torch-int8", "teacher", 3.0, 1.0),
            {
                "name": "lost",
                "title": "T lost",
                "source": "teacher",
                "reason": "gone",
                "speeds": {},
            },
        ],
        "versions": {},
        "machine": {"processor": "P", "cores": 2},
    }
    (run / "bench.json").write_text(json.dumps(bench))
    written = write_report(run, wanted=NOTHING)
    page = read(written.file.read_text(encoding="utf-8"))
    speed = page.texts["speed"]
    assert "T student 2.00 ms 1.50 (1.40-1.60) 3.00" in speed
    assert "T torch-int8 3.00 ms 1, the fastest 2.00" in speed
    assert "T fp32 6.00 ms 0.50 (0.40-0.60) 1.00 1.00 MiB" in speed
    assert "T lost gone" in speed
    assert "1.50x" in page.texts["headline"]
    assert not {"no_bench", "old_bench"} & {f.rule for f in written.findings}
    bench["engines"][0]["disk_bytes"] = 1  # type: ignore[index]
    (run / "bench.json").write_text(json.dumps(bench))
    assert "old_bench" in {f.rule for f in write_report(run, wanted=NOTHING).findings}


def test_the_command(run: Path) -> None:
    arguments = ["report", str(run), "--no-speed", "--no-answers", "--no-analysis"]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0
    assert found.output.rstrip().endswith(f"the report is {run / 'report.html'}")
    assert "note: The student's speed was not measured. Run tutelage bench" in found.output
    other = run.parent / "other.html"
    found = CliRunner().invoke(app, [*arguments, "--output", str(other)])
    assert found.exit_code == 0
    read(other.read_text(encoding="utf-8"))


def test_a_run_that_begins_anew_drops_what_was_said_of_the_old_student(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", head=("a", "b", "c"))
    rows = str(write_rows(tmp_path / "rows.tsv"))
    values = {
        "model": {"name_or_path": str(tmp_path / "model")},
        "data": {"train": rows, "eval": rows, "eval_split": 6, "max_length": 16},
        "student": {"max_steps": 1, "batch_size": 8},
        "output": str(tmp_path / "out"),
    }
    run_recipe(recipe_from_dict(values))
    for name in ("analysis/blocks.json", "bench.json", "report.html", "mine.txt"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    run_recipe(recipe_from_dict(values), overwrite=True)
    left = {file.name for file in (tmp_path / "out").iterdir()}
    assert not {"analysis", "bench.json", "report.html"} & left
    assert "mine.txt" in left
