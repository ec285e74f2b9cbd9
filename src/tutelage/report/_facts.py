"""All that is known about a run, gathered before a word is written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from .._size import SizeReport, stored_size
from .._threads import threads
from ..artefacts import load
from ..bench import BenchResult
from ..errors import ArtefactError, TutelageError
from ..study import analyze
from ..train._log import TrainingLog, read_training_log
from ..train._output import RECIPE_FILE, TEACHER
from ..train._result import RESULT_FILE, RunResult, read_result
from ..train.recipe import Recipe, load_recipe
from ._answers import Answers, answers_of
from ._pair import load_pair
from ._speed import QuickSpeed, quick_speed
from ._stored import ANALYSIS, Analysis, read_analyses, read_bench

__all__ = ["Facts", "Wanted", "gather"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What a report may compute besides what it reads.

    Attributes:
        answers: Run both models over the evaluation data.
        speed: Time both where there is no ``bench.json``.
        analysis: Analyze the student where there is no ``analysis/``.
    """

    answers: bool = True
    speed: bool = True
    analysis: bool = True


@dataclass(frozen=True)
class Facts:
    """A run.

    Attributes:
        folder: Where it is.
        result: Its figures.
        recipe: What it was asked for.
        log: The course of the student's training; ``None`` in folders of earlier versions.
        teacher_log: Of the teacher's fine-tuning, where there was one.
        size: Bytes of the student by part.
        answers: Answers of both models, ``None`` where there are none.
        bench: Measured by ``tutelage bench``.
        quick: Measured now, where ``bench`` is ``None``.
        analyses: Figures of ``tutelage analyze``.
        missing: Why ``answers``, ``speed`` or ``analysis`` are not there, by these names.
    """

    folder: Path
    result: RunResult
    recipe: Recipe
    log: TrainingLog | None
    teacher_log: TrainingLog | None
    size: SizeReport
    answers: Answers | None
    bench: BenchResult | None
    quick: QuickSpeed | None
    analyses: tuple[Analysis, ...]
    missing: dict[str, str]

    @property
    def ramp_steps(self) -> float:
        """Steps in which the student goes from full precision to quantized: its loss must rise."""
        return self.recipe.student.ramp * self.recipe.student.max_steps


def gather(folder: Path, wanted: Wanted, say: Say) -> Facts:
    """Reads a run, and computes what it does not hold.

    What cannot be computed for want of the teacher or the data is noted with the reason; a file of
    the run that is damaged is refused.

    Args:
        folder: Written by ``tutelage train``.
        wanted: What may be computed.
        say: Told what takes time.

    Raises:
        ArtefactError: The folder holds no finished run, or a file is damaged.
    """
    result = read_result(folder)
    if result is None:
        raise ArtefactError(
            f"{folder} holds no {RESULT_FILE} of a finished run, nor a study; finish it with "
            "tutelage train --resume, or name another folder."
        )
    if not (folder / RECIPE_FILE).is_file():
        raise ArtefactError(
            f"{folder} holds no {RECIPE_FILE}; name the folder of a tutelage train run."
        )
    recipe = load_recipe(folder / RECIPE_FILE)
    size, bench = stored_size(str(folder)), read_bench(folder)
    missing: dict[str, str] = {}
    with threads(recipe.threads):
        answers, quick = _run(folder, recipe, wanted, bench, missing, say)
    analyses = _analyses(folder, wanted, missing, say)
    return Facts(
        folder=folder,
        result=result,
        recipe=recipe,
        log=read_training_log(folder),
        teacher_log=read_training_log(folder / TEACHER),
        size=size,
        answers=answers,
        bench=bench,
        quick=quick,
        analyses=analyses,
        missing=missing,
    )


def _run(
    folder: Path,
    recipe: Recipe,
    wanted: Wanted,
    bench: BenchResult | None,
    missing: dict[str, str],
    say: Say,
) -> tuple[Answers | None, QuickSpeed | None]:
    timed = wanted.speed and bench is None
    if not wanted.answers:
        missing["answers"] = "The models were not run (--no-answers)."
    if bench is None and not wanted.speed:
        missing["speed"] = "Speed was not measured (--no-speed)."
    if not (wanted.answers or timed):
        return None, None
    student: nn.Module = load(folder)
    try:
        pair = load_pair(folder, recipe, student)
    except TutelageError as error:
        said = f"Teacher or data could not be loaded: {error}"
        missing |= {"answers": said} if wanted.answers else {}
        missing |= {"speed": said} if timed else {}
        return None, None
    answers = quick = None
    if wanted.answers:
        say(f"running teacher and student on {len(pair.data)} examples")
        try:
            answers = answers_of(pair)
        except TutelageError as error:
            missing["answers"] = f"The models could not be compared: {error}"
    if timed:
        say("timing teacher and student")
        try:
            quick = quick_speed(folder, pair.teacher)
        except TutelageError as error:
            missing["speed"] = f"Speed could not be measured: {error}"
    return answers, quick


def _analyses(
    folder: Path, wanted: Wanted, missing: dict[str, str], say: Say
) -> tuple[Analysis, ...]:
    found = read_analyses(folder)
    if found or (folder / ANALYSIS).is_dir():
        if not found:
            missing["analysis"] = f"{ANALYSIS}/ holds no figures."
        return found
    if not wanted.analysis:
        missing["analysis"] = "The student was not analyzed (--no-analysis)."
        return ()
    say("comparing inner signals of teacher and student")
    try:
        analyze(folder, report=say)
    except TutelageError as error:
        missing["analysis"] = f"The student could not be analyzed: {error}"
    except OSError as error:
        reason = error.strerror or str(error)
        missing["analysis"] = f"The analysis could not be written into the folder: {reason}."
    return read_analyses(folder)
