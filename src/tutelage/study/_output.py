"""How an analysis is written: a JSON file that explains itself, and a figure beside it."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..artefacts import write_text
from ._plots import plots_missing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Entry", "write_entry"]


@dataclass(frozen=True)
class Entry:
    """What one analysis found.

    Attributes:
        name: Of its files.
        title: A few words.
        caption: What is shown and how to read it.
        data: Plain data for JSON.
        draw: Makes the figure from the data.
    """

    name: str
    title: str
    caption: str
    data: Mapping[str, Any]
    draw: Callable[[Mapping[str, Any]], Figure]

    def to_dict(self) -> dict[str, Any]:
        """Returns what the JSON file holds: title, caption and data."""
        return {"title": self.title, "caption": self.caption, **self.data}


def write_entry(entry: Entry, folder: Path, report: Callable[[str], None]) -> list[Path]:
    """Writes ``NAME.json`` and, where matplotlib is there, ``NAME.png``; each whole or not at all.

    Args:
        entry: What was found.
        folder: Where to; made if missing.
        report: Told where no figure can be drawn.

    Returns:
        The files.

    Raises:
        ArtefactError: A file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(entry.to_dict(), indent=1, allow_nan=False) + "\n"
    written = [folder / f"{entry.name}.json"]
    write_text(written[0], text)
    picture = folder / f"{entry.name}.png"
    if missing := plots_missing():
        picture.unlink(missing_ok=True)  # an older figure would not show these data
        report(missing)
        return written
    drawn = io.BytesIO()
    entry.draw(entry.data).savefig(drawn, format="png", dpi=120)
    stage = picture.with_name(f".{picture.name}.partial")
    stage.write_bytes(drawn.getvalue())
    os.replace(stage, picture)
    return [*written, picture]
