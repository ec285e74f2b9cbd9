"""Packed models at work: metrics of a folder, and what a model makes of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artefacts import load, weight_bytes
from ..errors import ArtefactError, DataError, RecipeError
from ._inference import measure
from ._models import encode_for
from ._output import RECIPE_FILE
from ._sections import DataSection
from .recipe import load_recipe
from .tasks import TASKS, Prediction, Task, task_of_model

__all__ = ["Evaluation", "Prediction", "evaluate_folder", "predict_texts"]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a packed model.

    Attributes:
        source: Where the examples are from.
        examples: How many there are; windows of contexts, or blocks of text, are counted singly.
        task: Kind of the task.
        metric: Name of the headline metric.
        metrics: Every metric that fits, by name.
        bytes: Size of the weights on disk.
    """

    source: str
    examples: int
    task: str
    metric: str
    metrics: dict[str, float]
    bytes: int


def evaluate_folder(
    folder: str | Path, section: DataSection, data: str | None = None
) -> Evaluation:
    """Evaluates a packed model.

    Args:
        folder: Written by a run or ``tutelage.save``.
        section: Where the examples are and how they are read.
        data: Examples in place of the section's evaluation data, read in the same way.

    Raises:
        TutelageError: The folder is no packed model, or the data do not fit it.
    """
    folder = Path(folder)
    model = load(folder)
    kind = TASKS[section.task]
    if not type(model).__name__.endswith(kind.head.suffixes):
        raise DataError(
            f"{folder} holds a {type(model).__name__}, which does not fit the task "
            f"{section.task!r}; correct it with --task."
        )
    if data is None and section.eval_split is None:
        data = section.eval
    examples = kind.read(section)[1] if data is None else kind.read_one(data, section)
    task = kind.of_model(model, section, examples)
    if not task.labelled:
        raise DataError(
            f"{examples.source!r} is read without labels, and the folder holds no teacher to "
            "compare with (tutelage train did); name a label column with --label."
        )
    processor = _processor_of(kind, folder, model)
    limit = task.limit(section, [model], processor)
    encoded = encode_for(model, task, examples, processor, limit)
    metrics = measure(task, encoded, processor, model).metrics[0]
    if task.metric not in metrics:
        raise DataError(
            f"the metric {task.metric!r} does not fit this model; use one of {', '.join(metrics)}."
        )
    return Evaluation(
        source=examples.source,
        examples=len(encoded),
        task=task.kind,
        metric=task.metric,
        metrics=metrics,
        bytes=weight_bytes(folder),
    )


def predict_texts(
    folder: str | Path,
    texts: Sequence[str],
    pairs: Sequence[str] | None = None,
    max_length: int | None = None,
) -> list[Any]:
    """Says what a packed model makes of texts, or of what else its task takes.

    Args:
        folder: Written by a run or ``tutelage.save``.
        texts: The texts; paths of image files for a model of images.
        pairs: The second text of each, for a model of pairs; the questions for one that answers.
        max_length: Tokens after which a text is cut; by default as many as the model allows.

    Returns:
        One object per text, such as ``Prediction``; ``line(text)`` shows it.

    Raises:
        TutelageError: The folder is no packed model, or the texts do not fit.
    """
    if not texts:
        raise DataError("there is no text; give at least one.")
    if pairs is not None and len(pairs) != len(texts):
        raise DataError(
            f"there are {len(texts)} texts and {len(pairs)} second texts; give one for each text."
        )
    folder = Path(folder)
    model = load(folder)
    kind = task_of_model(model)
    if kind is None:
        raise DataError(f"{folder} holds a {type(model).__name__}, which has no head of any task.")
    processor = _processor_of(kind, folder, model)
    stored = folder / RECIPE_FILE
    section = load_recipe(stored).data if stored.is_file() else None
    return kind.predict(model, processor, texts, pairs, max_length, section)


def _processor_of(kind: type[Task], folder: Path, model: Any) -> Any:
    error = ArtefactError(
        f"{folder} holds no usable {kind.processor_name}; save the model again with "
        f"processor={kind.processor_name.replace(' ', '_')}."
    )
    files = kind.processor_files
    if files and not any((folder / file).is_file() for file in files):
        raise error
    try:
        return kind.load_processor(str(folder), model.config, "the tokenizer of the folder")
    except RecipeError as reason:
        raise error from reason
