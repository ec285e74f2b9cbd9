"""``tutelage analyze``: the student of a folder beside its teacher."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StudyError, nearest
from ._entries import ENTRIES, LATENT, USUAL, Subject
from ._folder import RunFolder
from ._layers import BlockError
from ._output import write_entry

__all__ = ["Analysis", "analyze"]

_FOLDER = "analysis"


@dataclass(frozen=True)
class Analysis:
    """What was found.

    Attributes:
        data: By name of the analysis, what its JSON file holds.
        blocks: Errors of every block; empty where they were not asked for.
        files: The files that were written.
    """

    data: dict[str, dict[str, Any]]
    blocks: list[BlockError]
    files: tuple[Path, ...]


def analyze(
    folder: Path,
    *,
    only: Sequence[str] | None = None,
    examples: int = 256,
    samples: int = 32,
    points: int = 11,
    retrain: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Analysis:
    """Looks into the student of a folder, beside its teacher.

    ``DIR/analysis/`` gets ``NAME.json`` and, where matplotlib is there, ``NAME.png`` of every
    analysis: ``blocks`` and ``activations`` unless others are named; with ``retrain`` those that
    need latent weights (``surface``, ``oscillation``, ``latents``), too. ``stages`` and
    ``sharpness`` are made where they are named.

    Args:
        folder: Written by ``tutelage train``.
        only: Names of analyses; default: the usual ones.
        examples: Evaluation examples, evenly spaced, for what runs forward only.
        samples: Training examples, evenly spaced, for curvature and loss surface.
        points: Points of the loss surface along each direction, odd.
        retrain: Train the student once more, watched, to have its latent weights.
        report: Told what happens, and where no figure could be drawn.

    Returns:
        What was found.

    Raises:
        TutelageError: The folder holds no run, its data or its teacher are gone, or an analysis
            is unknown or needs ``retrain``.
    """
    for value, what in ((examples, "examples"), (samples, "samples")):
        if value < 1:
            raise StudyError(f"{value} {what}; use 1 or more.")
    if points < 3 or points % 2 == 0:
        raise StudyError(f"a surface of {points} points a side; use an odd number from 3 on.")
    names = _chosen(only, retrain)
    subject = Subject(RunFolder(folder), examples, samples, points, retrain, report)
    data: dict[str, dict[str, Any]] = {}
    files: list[Path] = []
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            report(line)

    for name in names:
        entry = ENTRIES[name](subject)
        files += write_entry(entry, folder / _FOLDER, once)
        data[name] = entry.to_dict()
    return Analysis(data, subject.blocks, tuple(files))


def _chosen(only: Sequence[str] | None, retrain: bool) -> list[str]:
    if only is None:
        return [name for name in ENTRIES if name in USUAL or (retrain and name in LATENT)]
    for name in only:
        if name not in ENTRIES:
            known = ", ".join(ENTRIES)
            raise StudyError(
                f"there is no analysis {name!r}; use {known}.{nearest(name, list(ENTRIES))}"
            )
        if name in LATENT and not retrain:
            raise StudyError(
                f"the analysis {name!r} needs the latent weights, which a folder does not hold; "
                "add --retrain to train the student once more."
            )
    return [name for name in ENTRIES if name in only]


def table(found: list[BlockError]) -> list[tuple[str, ...]]:
    """Returns the cells of the table: block, relative errors, cosine of the block's output, KL.

    Args:
        found: Errors of every block.
    """
    rows = []
    for block in found:
        errors = [block.signals.get(site) for site in ("context", "attention_output", "ffn_input")]
        last = block.signals.get("block_output")
        kl = block.attention_kl
        shown = ["-" if e is None else f"{100 * e.relative:.1f} %" for e in (*errors, last)]
        cosine = "-" if last is None else f"{last.cosine:.4f}"
        mean = f"{sum(kl) / len(kl):.4f} ({max(kl):.4f})" if kl else "-"
        rows.append(tuple(itertools.chain([block.block], shown, [cosine, mean])))
    return rows


COLUMNS = (
    "block",
    "context",
    "attention output",
    "FFN input",
    "block output",
    "cosine",
    "attention KL (worst head)",
)
