"""``tutelage analyze``: the student of a folder beside its teacher, on its evaluation data."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..artefacts import load, write_text
from ..errors import ArtefactError, StudyError
from ..train._models import encode_for, load_config, load_model
from ..train._output import RECIPE_FILE, TEACHER
from ..train.recipe import Recipe, load_recipe
from ..train.tasks import TASKS, batches
from ._layers import BlockError, block_errors
from ._plots import plots_missing, write_block_plot

__all__ = ["analyze"]

_FOLDER, _FILE, _PLOT = "analysis", "blocks.json", "blocks.png"


def analyze(
    folder: Path, *, examples: int = 256, report: Callable[[str], None] = lambda line: None
) -> list[BlockError]:
    """Compares the student in a folder with its teacher, block by block.

    ``DIR/analysis/`` gets ``blocks.json`` and, where matplotlib is there, ``blocks.png``. The
    figures are those of the packed student with no intervention.

    Args:
        folder: Written by ``tutelage train``.
        examples: The first so many evaluation examples are used, shorter ones together.
        report: Told where the plot could not be drawn.

    Returns:
        One entry a block.

    Raises:
        TutelageError: The folder holds no run, or its data or its teacher are gone.
    """
    if examples < 1:
        raise StudyError(f"{examples} examples; use 1 or more.")
    recipe = _recipe(folder)
    student = load(folder).eval()
    kind = TASKS[recipe.data.task]
    read = kind.read(recipe.data)[1]
    task = kind.of_model(student, recipe.data, read)
    teacher = _teacher(folder, recipe, task)
    processor = kind.load_processor(str(folder), student.config)
    limit = task.limit(recipe.data, [student], processor)
    data = encode_for(teacher, task, read, processor, limit)

    def some() -> Iterator[dict[str, Any]]:
        left = examples
        for rows, batch in batches(data, task.collator(processor), min(32, examples)):
            yield {key: value[:left] for key, value in batch.items()}
            left -= len(rows)
            if left <= 0:
                return

    found = block_errors(student, teacher, some())
    count = min(examples, len(data))
    target = folder / _FOLDER
    target.mkdir(exist_ok=True)
    plain = {
        "what": "packed student beside its teacher, no intervention",
        "examples": count,
        "blocks": [block.to_dict() for block in found],
    }
    write_text(target / _FILE, json.dumps(plain, indent=1, allow_nan=False) + "\n")
    if missing := plots_missing():
        report(missing)
    else:
        write_block_plot(found, target / _PLOT)
    return found


def _recipe(folder: Path) -> Recipe:
    file = folder / RECIPE_FILE
    if not file.is_file():
        raise ArtefactError(
            f"{folder} holds no {RECIPE_FILE}, which names data and teacher; name the folder of a "
            "tutelage train run."
        )
    return load_recipe(file)


def _teacher(folder: Path, recipe: Recipe, task: Any) -> nn.Module:
    own = folder / TEACHER
    name = str(own) if own.is_dir() else recipe.model.teacher or recipe.model.name_or_path
    config = load_config(name, "the teacher")
    if not task.head.on(config):
        raise ArtefactError(
            f"the teacher of {folder} is gone: {name!r} has no {task.head.name}; keep the folder "
            f"{own}."
        )
    return load_model(name, config, task, "the teacher").eval()


def table(found: list[BlockError]) -> list[tuple[str, ...]]:
    """Returns the cells of the table: block, relative errors, cosine of the block's output, KL.

    Args:
        found: What ``analyze`` returned.
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
