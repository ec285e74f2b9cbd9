"""``tutelage report``: which page a folder gets, and writing it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from ..artefacts import write_text
from ..errors import ArtefactError, OutputExistsError
from ._facts import Wanted, gather
from ._page import Finding
from ._render import GENERATOR, render
from ._run_page import run_page
from ._study_page import STUDY_FILE, gather_study, study_page

__all__ = ["Report", "write_report"]

REPORT_FILE = "report.html"
_HEAD = 1000


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Attributes:
        file: The HTML file.
        findings: Its warnings, the serious ones first.
    """

    file: Path
    findings: tuple[Finding, ...]


def write_report(
    folder: Path,
    output: Path | None = None,
    *,
    wanted: Wanted | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Report:
    """Writes one HTML file about a run or a study; it needs no other file and no network.

    Of a run it shows what was done, curves, teacher against student, size, speed and the figures of
    ``tutelage analyze``; of a study its tables and curves. Where a run holds no ``bench.json`` or
    no ``analysis/``, they are made up for: by a quick measurement, and by ``analyze``, which writes
    ``analysis/``.

    Args:
        folder: Written by ``tutelage train`` or ``tutelage compare``.
        output: The file, by default ``report.html`` in the folder. An earlier report is replaced.
        wanted: What may be computed, by default all.
        report: Told what takes time.

    Raises:
        ArtefactError: The folder holds no finished run, or a file of it is damaged.
        StudyError: A file of the study is damaged, or it has no results.
        OutputExistsError: The output is there and is no report.
    """
    if not folder.is_dir():
        raise ArtefactError(
            f"there is no folder {folder}; name one that tutelage train or tutelage compare wrote."
        )
    file = folder / REPORT_FILE if output is None else output
    _refuse_other(file)
    if (folder / STUDY_FILE).is_file():
        page = study_page(gather_study(folder))
    else:
        page = run_page(gather(folder, wanted or Wanted(), report))
    from .. import __version__

    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    write_text(file, render(page, f"Written {now} by tutelage {__version__}."))
    return Report(file, page.findings)


def _refuse_other(file: Path) -> None:
    if file.is_dir():
        raise OutputExistsError(f"{file} is a folder; name a file to write.")
    if not file.parent.is_dir():
        raise ArtefactError(f"there is no folder {file.parent} to write {file.name} into; make it.")
    if file.exists():
        with file.open("rb") as found:
            head = found.read(_HEAD)
        if GENERATOR.encode() not in head:
            raise OutputExistsError(f"{file} exists and is no report; name another file.")
