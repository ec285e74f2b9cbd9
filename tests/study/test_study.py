"""Studies: the grid, its runs, what survives a kill, and the tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from helpers import save_tiny, write_rows
from tutelage.cli import app
from tutelage.errors import RecipeError, SchemeError, StudyError, TutelageError
from tutelage.study import METHODS, Study, count_runs, load_study, run_study, summary_of
from tutelage.study import _run as module
from tutelage.study._grid import Cell, cells, evaluation_steps
from tutelage.study._load import study_from_dict
from tutelage.study._records import Point, Record, Records
from tutelage.study._summary import summarize
from tutelage.study._write import rows
from tutelage.train.run import run_recipe

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    save_tiny(folder / "model")
    write_rows(folder / "train.tsv", rows=24)
    write_rows(folder / "dev.tsv", rows=20, seed=1)
    return folder


@pytest.fixture
def make(tmp_path: Path, sources: Path) -> Callable[..., Study]:
    def study(**changes: Any) -> Study:
        values = {
            "tasks": {
                "toy": {
                    "model": {"name_or_path": str(sources / "model")},
                    "data": {
                        "train": str(sources / "train.tsv"),
                        "eval": str(sources / "dev.tsv"),
                        "max_length": 16,
                    },
                    "teacher": {"max_steps": 6, "learning_rate": 1e-3, "batch_size": 8},
                    "student": {"batch_size": 8},
                }
            },
            "schemes": ["ternary-a8"],
            "methods": ["full-kd", "ti-g"],
            "budgets": [6],
            "learning_rates": [1e-3],
            "seeds": [0],
            "baseline": "full-kd",
            "points": 3,
            "output": str(tmp_path / "study"),
        }
        return study_from_dict({**values, **changes})

    return study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": []}, "at least 1"),
        ({"methods": ["full-kd", "ti-k"]}, r"no method 'ti-k'.*Did you mean"),
        ({"methods": {"full-kd": {"optimiser": 1}}}, "'full-kd' has 'optimiser'"),
        ({"baseline": "ti-o"}, "'baseline' is 'ti-o'; name one of the methods: full-kd, ti-g"),
        ({"tasks": {"toy": {"modle": {}}}}, "'toy' has 'modle'"),
        ({"tasks": {"../up": {}}}, "tasks"),
        ({"seeds": [1, 1]}, "'seeds' lists a value twice"),
        ({"budget": [3]}, "budget"),
        ({"learning_rates": [-1.0]}, "learning_rates"),
    ],
)
def test_refuses_a_malformed_study(
    make: Callable[..., Study], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(StudyError, match=message) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


def test_reads_yaml_and_overrides(tmp_path: Path, make: Callable[..., Study]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(make().model_dump()))
    assert load_study(file) == make()
    assert load_study(file, ["seeds=[3, 4]"]).seeds == [3, 4]
    with pytest.raises(RecipeError, match="there is no study"):
        load_study(tmp_path / "none.yaml")
    file.write_text("- 1\n")
    with pytest.raises(StudyError, match="holds a list"):
        load_study(file)


def test_an_override_names_a_part_of_the_tasks_and_methods(make: Callable[..., Study]) -> None:
    own = {"base": "ti-g", "student": {"ramp": 0.5}}
    tree = make(methods={"full-kd": None, "own": own, "ti-o": None}).model_dump()
    tree["tasks"]["other"] = tree["tasks"]["toy"]
    whole = study_from_dict(tree)
    part = study_from_dict(tree, ["methods=[own, full-kd, ti-m]", "tasks=[other]"])
    assert list(part.methods) == ["own", "full-kd", "ti-m"]
    assert part.methods["own"] == own
    assert part.method("ti-m") == METHODS["ti-m"]
    assert part.tasks == {"other": whole.tasks["other"]}
    assert {cell.key for cell in cells(part) if cell.method != "ti-m"} < {
        cell.key for cell in cells(whole)
    }


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods=[full-kd, onw]", "'methods' has no 'onw'; use some of .*Did you mean 'own'"),
        ("tasks=[ptq]", "'tasks' has no 'ptq'; use some of toy"),
        ("tasks=[[toy]]", "'tasks' has no"),
        ("tasks=[]", "at least 1"),
        ("tasks=toy", "tasks"),
    ],
)
def test_an_override_that_names_what_is_not_there(
    make: Callable[..., Study], override: str, message: str
) -> None:
    tree = make(methods={"full-kd": None, "own": {"base": "ti-g"}}).model_dump()
    with pytest.raises(StudyError, match=message):
        study_from_dict(tree, [override])


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_part_of_a_recipe(make: Callable[..., Study], name: str) -> None:
    found = cells(make(methods=list(dict.fromkeys(["full-kd", name]))))
    assert {cell.method for cell in found} == {"full-kd", name}
    recipe = found[-1].recipe
    assert (recipe.schedule_steps == 0) == (
        name in ("ce", "logits-kd", "full-kd", "ternarybert", "ramp")
    )
    assert (found[-1].steps == 0) == (name == "ptq")


def test_a_method_wins_over_its_base_and_the_task(make: Callable[..., Study]) -> None:
    methods = {"full-kd": None, "own": {"base": "ti-m", "schedule": {"steps": 2}}}
    (_, own) = cells(make(methods=methods))
    assert own.recipe.schedule.stage == "attention_map"
    assert own.recipe.schedule_steps == 2
    assert own.recipe.student.batch_size == 8
    losses = {"logits": 1.0}
    methods = {"full-kd": None, "own": {"base": "ternarybert", "student": {"losses": losses}}}
    assert cells(make(methods=methods))[1].recipe.student.losses == losses


def test_the_grid_is_a_product_and_its_keys_say_what_a_run_is(make: Callable[..., Study]) -> None:
    study = make(
        methods=["full-kd", "ti-g", "ptq"],
        schemes=["ternary-a8", "binary-a4"],
        budgets=[6, 9],
        learning_rates=[1e-3, 1e-2],
        seeds=[0, 1, 2],
    )
    found = cells(study)
    assert len(found) == 2 * (2 * 2 * 2 * 3 + 1)
    assert len({cell.key for cell in found}) == len(found)
    again = cells(study.model_copy(update={"output": "elsewhere", "threads": 2}))
    assert [cell.key for cell in again] == [cell.key for cell in found]
    assert {cell.key for cell in cells(make(points=4))}.isdisjoint(cell.key for cell in found)


def test_other_data_are_other_runs_with_another_teacher(
    make: Callable[..., Study], sources: Path, tmp_path: Path
) -> None:
    one = cells(make())[0]
    task = make().tasks["toy"]
    copy = write_rows(tmp_path / "other.tsv", rows=24, seed=9)
    changed = {**task, "data": {**task["data"], "train": str(copy)}}
    first = cells(make(tasks={"toy": changed}))[0]
    write_rows(copy, rows=24, seed=10)
    second = cells(make(tasks={"toy": changed}))[0]
    assert len({one.key, first.key, second.key}) == 3
    assert len({one.recipe.output, first.recipe.output, second.recipe.output}) == 3


def test_an_unknown_scheme_or_key_is_refused_before_anything_runs(
    make: Callable[..., Study], tmp_path: Path
) -> None:
    with pytest.raises(SchemeError, match="ternary-a9"):
        run_study(make(schemes=["ternary-a9"]))
    methods = {"full-kd": None, "own": {"schedule": {"kind": "sideways"}}}
    with pytest.raises(RecipeError, match="method 'own' on the task 'toy'"):
        run_study(make(methods=methods))
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("steps", "points", "at"),
    [(6, 3, (2, 4, 6)), (2, 8, (1, 2)), (100, 8, (12, 25, 38, 50, 62, 75, 88, 100))],
)
def test_evaluations_are_evenly_spaced(steps: int, points: int, at: tuple[int, ...]) -> None:
    assert evaluation_steps(steps, points) == at


def test_a_study_runs_once_grows_and_is_compared(
    make: Callable[..., Study], tmp_path: Path
) -> None:
    lines: list[str] = []
    threads = torch.get_num_threads()
    methods = {"full-kd": None, "ti-g": None, "ptq": None}
    summary = run_study(make(methods=methods, threads=2), workers=1, report=lines.append)
    assert torch.get_num_threads() == threads
    assert lines[0] == "3 runs, 0 of them known"
    assert "left" in lines[-1]
    folder = tmp_path / "study"
    assert {p.name for p in folder.iterdir()} >= {"runs.jsonl", "table.md", "summary.json", "plots"}
    assert (folder / "plots" / "toy_ternary-a8_6.png").stat().st_size > 10_000
    assert not list(folder.glob("work/*/run-*"))
    kl = {found.best.method: found.best.kl for found in summary.comparisons}
    assert set(kl) == set(methods)
    assert [c.best.method for c in summary.comparisons if c.change is not None] == ["ti-g"]
    assert all(len(v.curve) == (1 if v.method == "ptq" else 3) for v in summary.variants)

    before = (folder / "runs.jsonl").read_bytes()
    lines.clear()
    grown = run_study(make(methods=methods, seeds=[0, 1]), workers=1, report=lines.append)
    assert lines[0] == "5 runs, 3 of them known"
    assert (folder / "runs.jsonl").read_bytes().startswith(before)
    assert {v.method: v.seeds for v in grown.variants}["ti-g"] == (0, 1)
    assert summary_of(folder).to_dict() == grown.to_dict()
    assert len(rows(grown)) == 3
    assert "ti-g" in (folder / "table.md").read_text()
    assert json.loads((folder / "summary.json").read_text())["baseline"] == "full-kd"


def test_processes_find_what_one_finds_and_so_does_a_run(
    make: Callable[..., Study], tmp_path: Path
) -> None:
    """Bit for bit, and equal to the run of a recipe with the same settings."""
    study = make(points=1)
    here = run_study(study, workers=1)
    there = run_study(study.model_copy(update={"output": str(tmp_path / "two")}), workers=2)
    assert [v.curve for v in here.variants] == [v.curve for v in there.variants]
    cell = cells(study)[1]
    recipe = cell.recipe.model_copy(update={"output": str(tmp_path / "run")})
    result = run_recipe(recipe)
    ours = {v.method: v for v in here.variants}["ti-g"]
    assert result.kl == pytest.approx(ours.kl, rel=1e-5)
    assert result.student.metrics["accuracy"] == ours.metric
    assert here.teachers["toy"] == result.teacher.metrics["accuracy"]


def test_what_is_not_finite_is_a_figure(make: Callable[..., Study], tmp_path: Path) -> None:
    lines: list[str] = []
    study = make(learning_rates=[1e-3, 1e30], methods=["full-kd"])
    summary = run_study(study, workers=1, report=lines.append)
    assert any("failed" in line for line in lines)
    assert [v.failed for v in summary.variants] == [0, 1]
    (only,) = summary.comparisons
    assert only.best.learning_rate == 1e-3
    assert only.at_edge
    assert only.area is None
    assert "(1 failed)" in (tmp_path / "study" / "table.md").read_text()


def test_a_refused_run_stops_the_study_with_its_reason(make: Callable[..., Study]) -> None:
    methods = {"full-kd": None, "own": {"student": {"losses": {"logits_typo": 1.0}}}}
    with pytest.raises(TutelageError, match="logits_typo"):
        run_study(make(methods=methods), workers=1)


def record(key: str, **changes: Any) -> Record:
    point = Point(6, 0.5, 0.25, 0.75)
    given = Record(key, "t", "s", "m", 6, 1e-3, 0, "accuracy", 0.9, (point,), 1.5)
    return replace(given, **changes)


def of_cell(cell: Cell, points: tuple[Point, ...]) -> Record:
    names = ("key", "task", "scheme", "steps", "method", "learning_rate", "seed")
    given = {name: getattr(cell, name) for name in names}
    return record(points=points, **given)


def test_rates_are_compared_over_the_seeds_that_all_of_them_have(
    make: Callable[..., Study],
) -> None:
    """The lucky second seed of one rate, 0.1, does not make it the best: 0.25 < 0.3 on seed 0."""
    study = make(methods=["full-kd"], learning_rates=[1e-3, 3e-3], seeds=[0, 1])
    kls = {(1e-3, 0): 0.3, (1e-3, 1): 0.1, (3e-3, 0): 0.25}
    records = Records(Path(study.output))
    for cell in cells(study):
        kl = kls.get((float(cell.learning_rate or 0), cell.seed))
        if kl is not None:
            records.add(of_cell(cell, (Point(6, 0.5, kl, 0.75),)), np.full(4, kl, np.float32))
    (only,) = summarize(study, cells(study), records).comparisons
    assert only.best.learning_rate == 3e-3
    assert only.best.seeds == (0,)
    assert only.area == pytest.approx((0.3 + 0.25) / 2)


def test_the_baseline_reaches_its_own_target_at_its_end(make: Callable[..., Study]) -> None:
    """Of these figures numpy's mean is a last bit above that of the standard library."""
    kls = 0.1, 0.2, 0.3
    study = make(methods=["full-kd"], seeds=[0, 1, 2])
    records = Records(Path(study.output))
    for cell, kl in zip(cells(study), kls, strict=True):
        points = (Point(3, 0.5, 2.0, 0.5), Point(6, 0.5, kl, 0.75))
        records.add(of_cell(cell, points), np.full(4, kl, np.float32))
    (only,) = summarize(study, cells(study), records).comparisons
    assert only.steps_to_target == 6


class TestRecords:
    def test_a_kill_leaves_half_a_line_that_is_cut_off(self, tmp_path: Path) -> None:
        records = Records(tmp_path)
        records.add(record("a"), np.full(4, 0.25, np.float32))
        records.add(record("b", failed="not finite", points=()), None)
        file = tmp_path / "runs.jsonl"
        whole = file.read_bytes()
        first = whole.index(b"\n") + 1
        for cut in range(first, len(whole)):
            file.write_bytes(whole[:cut])
            again = Records(tmp_path)
            assert "a" in again
            assert "b" not in again
            assert file.read_bytes() == whole[:first]
        file.write_bytes(whole)
        again = Records(tmp_path)
        assert again["a"] == record("a")
        assert again["b"].failed == "not finite"
        assert again.divergences("b") is None
        found = again.divergences("a")
        assert found is not None
        assert found.tolist() == [0.25] * 4

    @pytest.mark.parametrize("line", ["{}", "[1]", '{"key": 1}', "nonsense", '{"points": [3]}'])
    def test_a_damaged_line_is_named(self, tmp_path: Path, line: str) -> None:
        Records(tmp_path).add(record("a"), None)
        with (tmp_path / "runs.jsonl").open("a") as file:
            file.write(line + "\n")
        with pytest.raises(StudyError, match=r"line 2 of .*runs\.jsonl is damaged"):
            Records(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"nonsense"])
    def test_a_damaged_file_of_examples_is_named(self, tmp_path: Path, content: bytes) -> None:
        records = Records(tmp_path)
        records.add(record("a"), np.full(4, 0.25, np.float32))
        (tmp_path / "examples" / "a.npy").write_bytes(content)
        with pytest.raises(StudyError, match=r"a\.npy is missing or damaged"):
            records.divergences("a")

    def test_examples_of_another_run_are_refused(self, tmp_path: Path) -> None:
        records = Records(tmp_path)
        records.add(record("a"), np.full(4, 0.5, np.float32))
        with pytest.raises(StudyError, match="is of another run"):
            records.divergences("a")

    def test_nothing_is_unpickled(self, tmp_path: Path) -> None:
        records = Records(tmp_path)
        records.add(record("a"), np.full(4, 0.25, np.float32))
        np.save(tmp_path / "examples" / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
        with pytest.raises(StudyError, match="damaged"):
            records.divergences("a")


def test_killed_and_started_again_it_ends_as_if_never_killed(
    make: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopError(Exception):
        pass

    study = make(seeds=[0, 1])
    made: list[str] = []
    run_cell = module.run_cell

    def stopping(cell: Any) -> Any:
        if len(made) == 2:
            raise StopError
        made.append(cell.key)
        return run_cell(cell)

    monkeypatch.setattr(module, "run_cell", stopping)
    with pytest.raises(StopError):
        run_study(study, workers=1)
    assert count_runs(study) == (4, 2)
    monkeypatch.undo()
    resumed = run_study(study, workers=1)
    straight = run_study(study.model_copy(update={"output": str(tmp_path / "b")}), workers=1)
    assert [v.curve for v in resumed.variants] == [v.curve for v in straight.variants]
    assert resumed.comparisons == straight.comparisons


def test_two_studies_do_not_share_a_folder(make: Callable[..., Study], tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    (tmp_path / "study").mkdir()
    with module._alone(tmp_path / "study"), pytest.raises(StudyError, match="another study"):
        run_study(make(), workers=1)


def test_a_dead_process_is_one_error(
    make: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    from concurrent.futures.process import BrokenProcessPool

    class Pool:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            pass

        def submit(self, *args: Any) -> Any:
            raise BrokenProcessPool

        def shutdown(self, **kwargs: Any) -> None:
            pass

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    with pytest.raises(StudyError, match="fewer workers"):
        run_study(make(), workers=2)


def test_says_what_is_not_there(make: Callable[..., Study], tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"holds no study\.yaml"):
        summary_of(tmp_path)
    (tmp_path / "study").write_text("")
    with pytest.raises(StudyError, match="is a file"):
        run_study(make())
    with pytest.raises(StudyError, match="0 workers"):
        run_study(make(), workers=0)


def test_without_matplotlib_it_says_so(
    make: Callable[..., Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tutelage.study import _plots

    monkeypatch.setattr(_plots.importlib.util, "find_spec", lambda name: None)
    lines: list[str] = []
    run_study(make(methods=["full-kd"]), workers=1, report=lines.append)
    assert lines[-1] == "no plots: matplotlib is missing; install tutelage[study]."
    assert not (tmp_path / "study" / "plots").exists()


def test_the_command(tmp_path: Path, make: Callable[..., Study]) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump(make().model_dump()))

    def call(*more: str) -> Any:
        return CliRunner().invoke(app, ["compare", str(file), *more])

    assert call("--dry-run").output.strip() == "2 runs, 2 of them missing"
    assert not (tmp_path / "study").exists()
    done = call("--workers", "1")
    assert done.exit_code == 0
    assert "[2/2] toy ternary-a8 ti-g 6 steps lr 0.001 seed 0: accuracy" in done.output
    assert "tables and plots are in" in done.output
    assert call("--dry-run").output.strip() == "2 runs, 0 of them missing"
    plain = call("--json")
    assert len(json.loads(plain.output)["variants"]) == 2
    # A part of the grid that is not there changes nothing of what is.
    grown = call("--known", "--json", "seeds=[0, 1]", "learning_rates=[0.001, 0.5]")
    assert json.loads(grown.output)["variants"] == json.loads(plain.output)["variants"]
    assert isinstance(call("--known", "seeds=[9]").exception, StudyError)
    assert isinstance(call("seeds=nonsense").exception, StudyError)


@pytest.mark.parametrize("file", sorted((ROOT / "studies").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_studies_that_ship_are_valid(file: Path) -> None:
    study = load_study(file)
    assert len(cells(study)) >= len(study.methods) * len(study.seeds)


def test_the_study_in_the_documents_is_valid() -> None:
    text = (ROOT / "docs" / "comparing.md").read_text()
    study = study_from_dict(yaml.safe_load(text.split("```yaml")[1].split("```")[0]))
    assert list(study.methods) == ["full-kd", "ti-g", "mine"]
    listed = text.split("## Methods in the box")[1]
    assert all(f"`{name}`" in listed for name in METHODS if not name.endswith("-code"))
