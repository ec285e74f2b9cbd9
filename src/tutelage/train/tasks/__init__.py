"""Tasks: one file each, found by the name that a recipe gives as ``data.task``."""

from __future__ import annotations

from typing import Any

from ._dataset import EncodedDataset as EncodedDataset
from ._dataset import TaskDataset as TaskDataset
from ._dataset import batches as batches
from ._dataset import for_model as for_model
from ._dataset import predict_rows as predict_rows
from ._prediction import Answer as Answer
from ._prediction import Continuation as Continuation
from ._prediction import Prediction as Prediction
from ._prediction import WordLabels as WordLabels
from ._task import AGREEMENT as AGREEMENT
from ._task import Head as Head
from ._task import Task as Task
from .causal_lm import CausalLM as CausalLM
from .image_classification import ImageTask as ImageTask
from .question_answering import QuestionTask as QuestionTask
from .text_classification import TextTask as TextTask
from .text_classification import build_task as build_task
from .text_classification import has_head as has_head
from .token_classification import TokenTask as TokenTask

__all__ = [
    "AGREEMENT",
    "TASKS",
    "Answer",
    "CausalLM",
    "Continuation",
    "EncodedDataset",
    "Head",
    "ImageTask",
    "Prediction",
    "QuestionTask",
    "Task",
    "TaskDataset",
    "TextTask",
    "TokenTask",
    "WordLabels",
    "batches",
    "build_task",
    "for_model",
    "has_head",
    "predict_rows",
    "task_of_model",
]

TASKS: dict[str, type[Task]] = {
    "classification": TextTask,
    "pair": TextTask,
    "regression": TextTask,
    "pair_regression": TextTask,
    "image_classification": ImageTask,
    "causal_lm": CausalLM,
    "token_classification": TokenTask,
    "question_answering": QuestionTask,
}
"""From ``data.task`` to the task; add yours here."""


def task_of_model(model: Any) -> type[Task] | None:
    """Returns the task of a model's head, ``None`` where no task has such a head.

    Args:
        model: A transformers model.
    """
    name = type(model).__name__
    return next((task for task in TASKS.values() if name.endswith(task.head.suffixes)), None)
