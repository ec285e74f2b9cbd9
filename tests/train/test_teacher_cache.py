"""A run whose teacher's answers are read from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import tutelage
from helpers import save_tiny, write_rows
from tutelage.distill import SAMPLE_IDS, LiveTeacher
from tutelage.errors import DataError, RecipeError
from tutelage.train import _teacher_cache
from tutelage.train._teacher_cache import keeping_ids
from tutelage.train.progress import Progress
from tutelage.train.recipe import Recipe, recipe_from_dict
from tutelage.train.run import run_recipe


class StopError(Exception):
    """Stands for a kill."""


class Breaking(Progress):
    """Breaks off the student's training at its fifth step."""

    def __init__(self, phase: str) -> None:
        super().__init__(phase, Console(quiet=True))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (self.phase, state.global_step) == ("student", 5):
            raise StopError


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("m") / "classifier", head=("a", "b", "c"))


@pytest.fixture
def make(tmp_path: Path, classifier: Path) -> Callable[..., Recipe]:
    train = write_rows(tmp_path / "train.tsv", rows=24)
    dev = write_rows(tmp_path / "dev.tsv", rows=12, seed=1)

    def recipe(*overrides: str, output: str = "out") -> Recipe:
        values = {
            "model": {"name_or_path": str(classifier)},
            "data": {"train": str(train), "eval": str(dev), "max_length": 16},
            "student": {"max_steps": 7, "batch_size": 8, "save_steps": 2},
            "output": str(tmp_path / output),
        }
        return recipe_from_dict(values, overrides)

    return recipe


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the forward passes of a live teacher."""
    made: list[int] = []
    ask = LiveTeacher.get

    def counted(self: LiveTeacher, batch: Any, *args: Any) -> Any:
        made.append(len(batch["input_ids"]))
        return ask(self, batch, *args)

    monkeypatch.setattr(LiveTeacher, "get", counted)
    return made


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def test_the_student_learns_the_same_of_stored_answers(
    make: Callable[..., Recipe], calls: list[int]
) -> None:
    run_recipe(make(output="live"))
    assert len(calls) == 7
    calls.clear()
    recipe = make("teacher.cache.codec=float32", output="stored")
    lines: list[str] = []
    run_recipe(recipe, report=lines.append)
    assert calls
    assert sum(calls) % 24 == 0  # every sample as often, once for every stage
    assert any("stored the teacher's answers: " in line for line in lines)
    assert not (Path(recipe.output) / "teacher-cache").exists()
    live, stored = weights(make(output="live").output), weights(recipe.output)
    assert live.keys() == stored.keys()
    codes = [name for name in live if live[name].dtype == torch.uint8]
    same = sum(int((live[n] == stored[n]).sum()) for n in codes)
    assert same >= 0.98 * sum(live[n].numel() for n in codes)  # other batches, other last bits


def test_a_resumed_run_reads_what_was_stored(make: Callable[..., Recipe], calls: list[int]) -> None:
    whole = make("teacher.cache.codec=float32", "teacher.cache.keep=true", output="whole")
    run_recipe(whole)
    assert len(tutelage.CachedTeacher(Path(whole.output) / "teacher-cache")) == 24
    again = make("teacher.cache.codec=float32", output="again")
    with pytest.raises(StopError):
        run_recipe(again, progress=Breaking)
    calls.clear()
    lines: list[str] = []
    run_recipe(again, resume=True, report=lines.append)
    assert not calls
    assert any("are complete already" in line for line in lines)
    for name, tensor in weights(whole.output).items():
        assert torch.equal(tensor, weights(again.output)[name]), name


def test_damaged_answers_are_stored_anew(make: Callable[..., Recipe]) -> None:
    recipe = make("teacher.cache.codec=int8")
    with pytest.raises(StopError):
        run_recipe(recipe, progress=Breaking)
    folder = Path(recipe.output) / "teacher-cache"
    largest = max(folder.iterdir(), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    lines: list[str] = []
    run_recipe(recipe, resume=True, report=lines.append)
    assert any(line.startswith("the teacher's answers are stored anew: ") for line in lines)


def test_too_large_is_refused(make: Callable[..., Recipe]) -> None:
    with pytest.raises(DataError, match="max_bytes"):
        run_recipe(make("teacher.cache.max_gb=0.00001"))


def test_losses_over_padding_are_refused_before_anything_is_written(
    make: Callable[..., Recipe],
) -> None:
    recipe = make("teacher.cache.codec=float32", "student.losses=reference")
    with pytest.raises(RecipeError, match=r"remove teacher\.cache"):
        run_recipe(recipe)
    assert not Path(recipe.output).exists()


def test_the_precision_of_the_teacher(
    make: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []

    class Spy(LiveTeacher):
        def __init__(self, model: Any, *, dtype: torch.dtype) -> None:
            seen.append(dtype)
            super().__init__(model, dtype=dtype)

    monkeypatch.setattr(_teacher_cache, "LiveTeacher", Spy)
    run_recipe(make("teacher.dtype=bfloat16"))
    assert seen == [torch.bfloat16]


def test_a_collator_that_drops_fields_keeps_ids() -> None:
    collate = keeping_ids(lambda items: {"x": torch.tensor([item["x"] for item in items])})
    batch = collate([{"x": 3, SAMPLE_IDS: 5}, {"x": 4, SAMPLE_IDS: 9}])
    assert batch["x"].tolist() == [3, 4]
    assert batch[SAMPLE_IDS].tolist() == [5, 9]
    assert SAMPLE_IDS not in collate([{"x": 3}])
