"""Runs a study: what is missing of its grid, in several processes, and then its tables."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

from ..errors import StudyError
from ._grid import Cell, cells
from ._load import save_study, study_from_dict
from ._progress import Estimate
from ._records import Records
from ._sections import Study
from ._summary import Summary, summarize
from ._worker import make_teacher, run_cell
from ._write import write_summary

__all__ = ["compare_known", "count_runs", "run_study", "summary_of"]

_FILE = "study.yaml"


def run_study(
    study: Study,
    *,
    workers: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Summary:
    """Makes the runs of a study that are missing, and compares them all.

    The output folder gets ``study.yaml``, ``teacher`` folders under ``work/``, ``runs.jsonl`` (one
    line a run, written when the run is over), ``examples/`` (the divergence of every evaluation
    example), and at the end ``table.md``, ``summary.json`` and ``plots/``. Killed at any moment
    and started again, a study goes on with the runs that are missing. A study may grow: runs that
    are known are not repeated.

    Args:
        study: What is compared.
        workers: Processes at a time; by default one a CPU core, and one where there is a GPU.
        report: Told of the progress.

    Returns:
        The comparison.

    Raises:
        TutelageError: A run is refused, a process died, or an earlier one left damaged files.
    """
    if workers is not None and workers < 1:
        raise StudyError(f"{workers} workers; use 1 or more.")
    folder = Path(study.output)
    grid = cells(study)
    if folder.exists() and not folder.is_dir():
        raise StudyError(f"{folder} is a file; name a folder in 'output'.")
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        records = Records(folder)
        save_study(study, folder / _FILE)
        missing = _distinct(cell for cell in grid if cell.key not in records)
        report(f"{len(grid)} runs, {len(grid) - len(missing)} of them known")
        if missing:
            count = workers or (1 if torch.cuda.is_available() else max(1, _cores()))
            _run(missing, min(count, len(missing)), records, report)
        summary = summarize(study, grid, records)
        write_summary(summary, folder, report)
    return summary


def count_runs(study: Study) -> tuple[int, int]:
    """Returns how many runs a study has, and how many of them are missing; writes nothing.

    Args:
        study: The study.
    """
    grid = cells(study)
    folder = Path(study.output)
    records = Records(folder)
    return len(grid), len(_distinct(cell for cell in grid if cell.key not in records))


def summary_of(folder: Path) -> Summary:
    """Compares the runs of a study that are there, without making any.

    Args:
        folder: The study's folder.

    Raises:
        StudyError: There is no study.
    """
    from ..train.recipe import read_yaml

    file = folder / _FILE
    if not file.is_file():
        raise StudyError(f"{folder} holds no {_FILE}; name the output folder of a study.")
    study = study_from_dict(read_yaml(file, "study"), source=str(file))
    return summarize(study, cells(study), Records(folder))


def compare_known(study: Study, report: Callable[[str], None] = lambda line: None) -> Summary:
    """Compares the runs of a study that are over, and writes its tables and plots; makes no run.

    Args:
        study: The study, of whose grid any part may be missing.
        report: Told of what could not be drawn.

    Returns:
        The comparison.

    Raises:
        StudyError: No run is over, another study is at work in the folder, or files are damaged.
    """
    folder = Path(study.output)
    if not folder.is_dir():
        raise StudyError(f"there is no folder {folder}; run tutelage compare first.")
    with _alone(folder):
        summary = summarize(study, cells(study), Records(folder))
        write_summary(summary, folder, report)
    return summary


def _distinct(found: Any) -> list[Cell]:
    return list({cell.key: cell for cell in found}.values())


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


def _run(
    missing: Sequence[Cell], workers: int, records: Records, report: Callable[[str], None]
) -> None:
    firsts = {cell.task: cell for cell in reversed(missing)}
    estimate = Estimate(missing, workers)
    if workers == 1:
        for cell in missing:
            if firsts.get(cell.task) is cell:
                report(f"the teacher of {cell.task}")
                make_teacher(_first(cell), cell.recipe.threads or 1)
            record, divergences = run_cell(cell)
            records.add(record, divergences)
            report(estimate.line(cell, record))
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet)
    try:
        report(f"teachers of {', '.join(firsts)}")
        made = [
            pool.submit(make_teacher, _first(cell), cell.recipe.threads or 1)
            for cell in firsts.values()
        ]
        for teacher in as_completed(made):
            teacher.result()
        estimate.start = time.monotonic()
        jobs: dict[Future[Any], Cell] = {pool.submit(run_cell, cell): cell for cell in missing}
        for job in as_completed(jobs):
            record, divergences = job.result()
            records.add(record, divergences)
            report(estimate.line(jobs[job], record))
    except BrokenProcessPool:
        raise StudyError(
            "a process of the study died, perhaps for want of memory; start the study again with "
            "fewer workers, and it goes on where it was."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _first(cell: Cell) -> Any:
    from ._worker import _shared

    return _shared(cell.recipe)


def _quiet() -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuses a second study at work in the same folder."""
    try:
        import fcntl
    except ImportError:  # no such locks on this system
        yield
        return
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StudyError(
                f"another study is at work in {folder}; wait for it, or name another output."
            ) from None
        yield
