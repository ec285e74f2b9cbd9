"""What other commands left in a run's folder: ``bench.json`` and ``analysis/``."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench import BenchResult, EngineFigures, Speed
from ..errors import ArtefactError

__all__ = ["PNG", "Analysis", "data_uri", "read_analyses", "read_bench", "read_json"]

BENCH_FILE = "bench.json"
ANALYSIS = "analysis"

PNG = b"\x89PNG\r\n\x1a\n"
"""How a PNG file begins."""

_FIRST = ("blocks", "activations", "stages", "sharpness", "surface", "oscillation", "latents")
"""Names in the order of the page; others follow, sorted."""

_DEFAULTS = {
    "blocks": (
        "Errors block by block",
        "The signals of the packed student beside those of its teacher on the same evaluation "
        "data, with no intervention. Left: squared error over the squared norm of the teacher's "
        "signal, so that 0 is equal and 1 as far off as a signal of zeros. Right: how far the "
        "attention map of every head is from the teacher's.",
    )
}


@dataclass(frozen=True)
class Analysis:
    """A figure that ``tutelage analyze`` left.

    Attributes:
        name: Of its files.
        title: What it is.
        caption: What it shows.
        png: The image; ``None`` where none was drawn.
        figures: What its JSON file holds.
    """

    name: str
    title: str
    caption: str
    png: bytes | None
    figures: dict[str, Any]


def read_json(file: Path, remedy: str) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
        file: The file.
        remedy: What to do where it is damaged.

    Raises:
        ArtefactError: It cannot be read, or holds something else.
    """
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ArtefactError(f"{file} is damaged ({reason}); {remedy}.") from None
    if not isinstance(found, dict):
        raise ArtefactError(f"{file} is damaged (it holds no object); {remedy}.")
    return found


def read_bench(folder: Path) -> BenchResult | None:
    """Reads the measurement of ``tutelage bench``.

    Args:
        folder: The run's.

    Returns:
        The measurement, ``None`` where there is none.

    Raises:
        ArtefactError: The file is damaged.
    """
    file = folder / BENCH_FILE
    if not file.is_file():
        return None
    remedy = "run tutelage bench again, or remove it"
    values = read_json(file, remedy)
    values.pop("schema", None)
    try:
        engines = [
            EngineFigures(**{**row, "speeds": {k: Speed(**v) for k, v in row["speeds"].items()}})
            for row in values["engines"]
        ]
        return BenchResult(**{**values, "engines": engines})
    except (KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{file} is damaged ({error}); {remedy}.") from None


def read_analyses(folder: Path) -> tuple[Analysis, ...]:
    """Reads every figure in ``analysis/``.

    Args:
        folder: The run's.

    Raises:
        ArtefactError: A file is damaged.
    """
    found = [_analysis(file) for file in sorted((folder / ANALYSIS).glob("*.json"))]
    rank = {name: place for place, name in enumerate(_FIRST)}
    return tuple(sorted(found, key=lambda a: (rank.get(a.name, len(rank)), a.name)))


def _analysis(file: Path) -> Analysis:
    remedy = "run tutelage analyze again, or remove it"
    figures, name = read_json(file, remedy), file.stem
    title, caption = _DEFAULTS.get(name, (name.replace("_", " ").replace("-", " "), ""))
    title, caption = figures.get("title", title), figures.get("caption", caption)
    if not (isinstance(title, str) and isinstance(caption, str)):
        raise ArtefactError(f"{file} is damaged (its title is no text); {remedy}.")
    return Analysis(name, title, caption, _png(file.with_suffix(".png"), remedy), figures)


def _png(file: Path, remedy: str) -> bytes | None:
    if not file.is_file():
        return None
    content = file.read_bytes()
    if not content.startswith(PNG):
        raise ArtefactError(f"{file} is no PNG image; {remedy}.")
    return content


def data_uri(png: bytes) -> str:
    """Returns an image as text that a page can hold.

    Args:
        png: The image.
    """
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
