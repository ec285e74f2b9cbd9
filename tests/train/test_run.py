from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, pipeline

import tutelage
from helpers import save_tiny, write_rows
from tutelage.errors import (
    ArtefactError,
    IncompatibleTeacherError,
    OutputExistsError,
    RecipeError,
    TutelageError,
)
from tutelage.train import run as module
from tutelage.train._log import read_training_log
from tutelage.train.evaluation import evaluate_folder, predict_texts
from tutelage.train.progress import Progress
from tutelage.train.recipe import Recipe, load_recipe, recipe_from_dict
from tutelage.train.run import read_result, run_recipe

HEAD = ("a", "b", "c")


class StopError(Exception):
    """Stands for a kill."""


class Breaking(Progress):
    """Breaks off training in a phase after a number of steps."""

    def __init__(self, phase: str, where: tuple[str, int]) -> None:
        super().__init__(phase, Console(quiet=True))
        self.where = where

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (self.phase, state.global_step) == self.where:
            raise StopError


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("m") / "model")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("m") / "classifier", head=HEAD)


@pytest.fixture
def make(tmp_path: Path, tiny_model: Path) -> Callable[..., Recipe]:
    train = write_rows(tmp_path / "train.tsv", rows=24)
    dev = write_rows(tmp_path / "dev.tsv", rows=70, seed=1)

    def recipe(*overrides: str, model: Path = tiny_model, output: str = "out") -> Recipe:
        values = {
            "model": {"name_or_path": str(model)},
            "data": {"train": str(train), "eval": str(dev), "max_length": 16},
            "teacher": {"max_steps": 4, "learning_rate": 1e-3, "batch_size": 8},
            "student": {"max_steps": 6, "batch_size": 8, "save_steps": 2},
            "output": str(tmp_path / output),
        }
        return recipe_from_dict(values, overrides)

    return recipe


def weights(folder: str | Path) -> tuple[Any, bytes]:
    """Returns header and bytes; safetensors writes the keys of the header in any order."""
    content = (Path(folder) / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def names(folder: str | Path) -> set[str]:
    return set(os.listdir(folder))


def test_fine_tunes_distils_saves_and_measures(make: Callable[..., Recipe]) -> None:
    said: list[str] = []
    result = run_recipe(make(), report=said.append)
    folder = Path(result.folder)
    assert names(folder) == {
        "README.md",
        "checkpoints",
        "config.json",
        "model.safetensors",
        "recipe.yaml",
        "result.json",
        "teacher",
        "tokenizer.json",
        "tokenizer_config.json",
        "training.json",
    }
    assert any("has no classification head for the task: it is fine-tuned first" in s for s in said)
    assert result.teacher_fine_tuned
    assert read_result(folder) == result
    assert load_recipe(folder / "recipe.yaml").student.max_steps == 6
    assert json.loads((folder / "result.json").read_text())["ratio"] == result.ratio
    teacher = AutoModelForSequenceClassification.from_pretrained(folder / "teacher")
    assert result.teacher.bytes == 4 * sum(p.numel() for p in teacher.parameters())
    assert teacher.config.id2label == dict(enumerate(HEAD))
    assert result.student.bytes == (folder / "model.safetensors").stat().st_size
    assert set(result.student.metrics) == {"accuracy", "macro_f1", "matthews"}
    assert result.kl is not None
    assert result.kl > 0
    assert (result.train_examples, result.eval_examples, result.threads) == (24, 70, 1)
    assert set(result.seconds) == {"teacher", "student", "evaluation"}
    assert {"torch", "transformers", "tutelage"} <= set(result.versions)
    card = (folder / "README.md").read_text()
    assert "accuracy of the teacher" in card
    found = evaluate_folder(folder, load_recipe(folder / "recipe.yaml").data)
    assert found.metrics == result.student.metrics
    label = pipeline("text-classification", str(folder))("w1 w30 w30 w30")[0]["label"]
    assert label == predict_texts(folder, ["w1 w30 w30 w30"])[0].label


def test_a_model_with_a_head_is_its_own_teacher(
    make: Callable[..., Recipe], classifier: Path
) -> None:
    result = run_recipe(make(model=classifier))
    assert not result.teacher_fine_tuned
    assert "teacher" not in names(result.folder)
    assert {p.name for p in classifier.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    teacher = AutoModelForSequenceClassification.from_pretrained(classifier)
    student = tutelage.load(result.folder)
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in student.parameters()}


def test_a_given_teacher_teaches_a_model_without_head(
    make: Callable[..., Recipe], classifier: Path
) -> None:
    result = run_recipe(make(f"model.teacher={classifier}"))
    assert not result.teacher_fine_tuned
    assert "teacher" not in names(result.folder)


@pytest.mark.parametrize(
    ("shape", "error", "message"),
    [
        pytest.param(
            {"layers": 3, "head": HEAD}, IncompatibleTeacherError, "2 attention blocks", id="depth"
        ),
        pytest.param(
            {"width": 16, "head": HEAD}, IncompatibleTeacherError, "of the same shape", id="width"
        ),
        pytest.param({}, RecipeError, "no sequence classification head", id="no-head"),
        pytest.param({"head": ("a", "b")}, TutelageError, "the data have 3 labels", id="labels"),
    ],
)
def test_refuses_a_teacher_that_does_not_fit(
    make: Callable[..., Recipe],
    tmp_path: Path,
    shape: dict[str, Any],
    error: type[TutelageError],
    message: str,
) -> None:
    teacher = save_tiny(tmp_path / "teacher", **shape)
    with pytest.raises(error, match=message):
        run_recipe(make(f"model.teacher={teacher}"))
    assert not (tmp_path / "out").exists()


def test_refuses_a_model_with_other_labels_than_the_teacher(
    make: Callable[..., Recipe], tmp_path: Path, classifier: Path
) -> None:
    other = save_tiny(tmp_path / "other", head=("b", "a", "c"))
    with pytest.raises(IncompatibleTeacherError, match="labels of the model"):
        run_recipe(make(f"model.teacher={classifier}", model=other))


def test_refuses_a_teacher_with_another_vocabulary(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    other = save_tiny(tmp_path / "other", head=HEAD)
    text = (other / "tokenizer.json").read_text().replace('"w7"', '"seven"')
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(IncompatibleTeacherError, match="another vocabulary"):
        run_recipe(make(f"model.teacher={other}"))


@pytest.mark.parametrize("keep", ["best", "last"])
def test_evaluates_while_training(
    make: Callable[..., Recipe], classifier: Path, tmp_path: Path, keep: str
) -> None:
    overrides = [f"student.keep={keep}", "student.eval_steps=2", "student.save_steps="]
    run_recipe(make(*overrides, model=classifier))
    state = max(
        (tmp_path / "out" / "checkpoints").glob("*/trainer_state.json"), key=os.path.getmtime
    )
    log = json.loads(state.read_text())["log_history"] if keep == "best" else None
    if log is not None:
        assert [e["step"] for e in log if "eval_accuracy" in e] == [2, 4, 6]


def test_best_saves_where_it_evaluates(make: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match="leave save_steps out"):
        run_recipe(make("student.keep=best", "student.eval_steps=3"))


@pytest.mark.parametrize("kind", ["constant", "inverted", "stochastic", "none"])
def test_every_schedule_and_the_published_method_train(
    make: Callable[..., Recipe], classifier: Path, kind: str
) -> None:
    overrides = [f"schedule.kind={kind}", "student.max_steps=3", "student.optimizer=bert_adam"]
    overrides += ["student.losses=reference", "student.scheme=reference", "student.local=paper"]
    overrides += ["student.learning_rate=1e-4", "student.warmup_ratio=1.0"]
    if kind == "constant":
        overrides.append("schedule.stage=context")
    said: list[str] = []
    result = run_recipe(make(*overrides, model=classifier), report=said.append)
    assert result.scheme == "reference"
    announced = next(line for line in said if line.startswith("training the student"))
    assert ("without intervention" in announced) == (kind == "none")


@pytest.mark.parametrize("phase", ["teacher", "student"])
def test_a_phase_under_bfloat16(make: Callable[..., Recipe], phase: str) -> None:
    exact, rounded = make(output="float32"), make(f"{phase}.bf16=true", output="bf16")
    for recipe in (exact, rounded):
        run_recipe(recipe)
    teachers = [load_file(Path(r.output) / "teacher/model.safetensors") for r in (exact, rounded)]
    assert {tensor.dtype for tensor in teachers[1].values()} == {torch.float32}
    for name, tensor in teachers[0].items():
        torch.testing.assert_close(teachers[1][name], tensor, rtol=0, atol=0.02)
    same = [torch.equal(tensor, teachers[1][name]) for name, tensor in teachers[0].items()]
    assert all(same) == (phase == "student")
    assert weights(exact.output) != weights(rounded.output)


def test_regression_of_pairs(make: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [f"w{i}\tw{i + 1} w3\t{i / 10}" for i in range(20)]
    data = tmp_path / "pairs.tsv"
    data.write_text("one\tother\tscore\n" + "\n".join(rows) + "\n")
    overrides = ["data.task=pair_regression", "data.text=one", "data.text_pair=other"]
    overrides += ["data.label=score", f"data.train={data}", f"data.eval={data}"]
    result = run_recipe(make(*overrides, "data.eval_split=6"))
    assert (result.metric, result.agreement, result.kl) == ("correlation", None, None)
    assert result.eval_examples == 6
    found = predict_texts(result.folder, ["w1"], ["w2 w3"])
    assert (found[0].label, found[0].probability) == (None, None)
    assert isinstance(found[0].value, float)


def test_a_family_without_type_embeddings(make: Callable[..., Recipe], tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "distil", "distilbert")
    said: list[str] = []
    recipe = make("data.max_length=100", "student.max_steps=3", model=model)
    run_recipe(recipe, report=said.append)
    assert "texts are cut after 40 tokens: the model has no more positions" in said


@pytest.mark.parametrize(
    ("where", "steps"),
    [
        pytest.param(("teacher", 2), 0, id="teacher"),
        pytest.param(("student", 1), 0, id="student-before-a-checkpoint"),
        pytest.param(("student", 3), 2, id="student-in-the-intervention"),
        pytest.param(("student", 5), 4, id="student"),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    make: Callable[..., Recipe], tmp_path: Path, where: tuple[str, int], steps: int
) -> None:
    overrides = ["schedule.steps=4"]
    whole = run_recipe(make(*overrides, output="whole"))
    recipe = make(*overrides)
    with pytest.raises(StopError):
        run_recipe(recipe, progress=lambda phase: Breaking(phase, where))
    assert "model.safetensors" not in names(tmp_path / "out")
    said: list[str] = []
    result = run_recipe(recipe, resume=True, report=said.append)
    assert weights(result.folder) == weights(whole.folder)
    assert result.student == whole.student
    assert read_training_log(Path(result.folder)) == read_training_log(Path(whole.folder))
    goes_on = any(s.endswith(f"checkpoint-{steps}") for s in said)
    assert goes_on == (steps > 0)
    assert any("is complete already" in s for s in said) == (where[0] == "student")


def test_killed_between_any_two_published_files(
    make: Callable[..., Recipe], classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(model=classifier)
    replace = os.replace
    for allowed in itertools.count():
        left = iter(range(allowed))

        def limited(source: Any, target: Any, left: Any = left) -> None:
            if Path(target).parent == tmp_path / "out" and next(left, None) is None:
                raise StopError
            replace(source, target)

        monkeypatch.setattr(module.os, "replace", limited)
        try:
            run_recipe(recipe, resume=True)
        except StopError:
            assert "result.json" not in names(tmp_path / "out")
            if allowed < 7:  # The weights are the last file but one.
                with pytest.raises(ArtefactError):
                    tutelage.load(tmp_path / "out")
            continue
        break
    assert allowed == 8
    assert ".packed" not in names(tmp_path / "out")


def test_a_finished_run_is_not_run_again(make: Callable[..., Recipe], classifier: Path) -> None:
    recipe = make(model=classifier)
    first = run_recipe(recipe, resume=True)
    before = os.stat(Path(first.folder) / "model.safetensors").st_mtime_ns
    assert run_recipe(recipe, resume=True) == first
    assert os.stat(Path(first.folder) / "model.safetensors").st_mtime_ns == before
    with pytest.raises(RecipeError, match=r"^student\.max_steps is 5, but 6 in .*recipe\.yaml; "):
        run_recipe(make("student.max_steps=5", model=classifier), resume=True)
    with pytest.raises(RecipeError, match="exclude each other"):
        run_recipe(recipe, resume=True, overwrite=True)
    (Path(first.folder) / "result.json").write_text("{")
    with pytest.raises(ArtefactError, match="is damaged"):
        run_recipe(recipe, resume=True)


def test_overwrite_replaces_a_run_and_nothing_else(
    make: Callable[..., Recipe], classifier: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run_recipe(make("student.max_steps=3"))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        run_recipe(make(model=classifier))
    run_recipe(make(model=classifier), overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    assert "teacher" not in names(out)
    assert load_recipe(out / "recipe.yaml").student.max_steps == 6


def test_resume_needs_a_run(make: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(OutputExistsError, match="holds no recipe"):
        run_recipe(make(), resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputExistsError, match="is a file"):
        run_recipe(make(output="file"), resume=True)


def test_never_clears_what_it_reads(make: Callable[..., Recipe], tmp_path: Path) -> None:
    teacher = save_tiny(tmp_path / "out" / "teacher", head=HEAD)
    with pytest.raises(RecipeError, match=r"model\.teacher is .* would be overwritten"):
        run_recipe(make(f"model.teacher={teacher}"), overwrite=True)
    assert (teacher / "model.safetensors").is_file()


@pytest.mark.parametrize("where", ["checkpoint", "packed"])
def test_a_failed_write_is_one_line_and_leaves_nothing_half_written(
    make: Callable[..., Recipe],
    classifier: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    recipe = make(model=classifier)
    with monkeypatch.context() as patch:
        if where == "checkpoint":
            patch.setattr("tutelage.train._checkpoint.save_file", full)
        else:
            patch.setattr("tutelage.artefacts._artefact.model_card", full)
        with pytest.raises(ArtefactError, match="No space left on device"):
            run_recipe(recipe)
    out = tmp_path / "out"
    assert names(out) <= {"recipe.yaml", "checkpoints", "training.json"}
    assert not [p for p in out.rglob("*partial*")]
    whole = run_recipe(make(model=classifier, output="whole"))
    assert weights(run_recipe(recipe, resume=True).folder) == weights(whole.folder)


def test_torch_that_could_not_write_is_a_full_disk(tmp_path: Path) -> None:
    from tutelage.train._output import writing

    with pytest.raises(ArtefactError, match="disk may be full"), writing(tmp_path):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
    with pytest.raises(RuntimeError, match="other"), writing(tmp_path):
        raise RuntimeError("other")


def test_threads_are_set_and_restored(
    make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def plan(*args: Any) -> None:
        seen.append(torch.get_num_threads())
        raise StopError

    monkeypatch.setattr(module, "make_plan", plan)
    before = torch.get_num_threads()
    with pytest.raises(StopError):
        run_recipe(make(f"threads={before + 1}"))
    assert seen == [before + 1]
    assert torch.get_num_threads() == before


def test_the_order_of_examples_does_not_matter(
    make: Callable[..., Recipe], classifier: Path, tmp_path: Path
) -> None:
    from tutelage.train._models import encode_for, load_tokenizer
    from tutelage.train.data import read_examples
    from tutelage.train.tasks import TextTask, predict_rows

    examples = read_examples(str(tmp_path / "dev.tsv"), make().data)
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = load_tokenizer(str(classifier))
    task = TextTask("classification", HEAD, "accuracy")
    data = encode_for(model, task, examples, tokenizer, 16)
    back = encode_for(model, task, examples.select(range(69, -1, -1)), tokenizer, 16)
    one, other = (predict_rows(model, d, task.collator(tokenizer), 7) for d in (data, back))
    np.testing.assert_allclose(one, other[::-1], atol=1e-6)


def test_progress_on_a_terminal_and_in_a_file(
    make: Callable[..., Recipe], classifier: Path, tmp_path: Path
) -> None:
    recipe = make("student.max_steps=20", "student.save_steps=20", model=classifier)
    with open(tmp_path / "log", "w") as file:
        console = Console(file=file, width=100)
        run_recipe(recipe, progress=lambda phase: Progress(phase, console, every=15))
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "student: step 15 of 20",
        "student: step 20 of 20",
    ]
    assert "steps/s" in lines[0]
    assert "left" in lines[0]
    assert "loss" in lines[0]
    with open(tmp_path / "term", "w") as file:
        console = Console(file=file, force_terminal=True, width=100)
        run_recipe(
            recipe, overwrite=True, progress=lambda phase: Progress(phase, console, every=15)
        )
    assert "20/20" in (tmp_path / "term").read_text()
