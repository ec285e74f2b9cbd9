"""The exceptions of the library: one family, one sentence each, with the remedy in it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "ArtefactError",
    "BenchError",
    "CheckpointError",
    "DataError",
    "ExportError",
    "IncompatibleTeacherError",
    "NonFiniteLossError",
    "OutputExistsError",
    "RecipeError",
    "SchemeError",
    "SiteError",
    "StudyError",
    "TutelageError",
    "UnsupportedModelError",
    "nearest",
    "not_of_transformers",
]


class TutelageError(Exception):
    """Base class: catch this to catch everything the library refuses on purpose."""


class SchemeError(TutelageError, ValueError):
    """A quantization scheme is invalid, or matches nothing in the model."""


class UnsupportedModelError(TutelageError, ValueError):
    """The model cannot be prepared, or was prepared before."""


class SiteError(TutelageError, ValueError):
    """A signal of the model that was asked for could not be found."""


class IncompatibleTeacherError(TutelageError, ValueError):
    """Teacher and student do not fit: other shape, other depth, or shared parameters."""


class RecipeError(TutelageError, ValueError):
    """A recipe or an override is malformed."""


class DataError(TutelageError, ValueError):
    """Data are missing, empty, malformed, or do not fit the model."""


class OutputExistsError(TutelageError, FileExistsError):
    """The output folder already holds files."""


class ArtefactError(TutelageError, OSError):
    """A saved model is corrupt, truncated, edited, of another version, or could not be written."""


class ExportError(TutelageError, ValueError):
    """A student cannot be expressed in a format, or the format's library is missing."""


class BenchError(TutelageError, RuntimeError):
    """A figure cannot be measured, or would be the figure of something else."""


class CheckpointError(TutelageError, RuntimeError):
    """A training checkpoint is incomplete or belongs to another run."""


class NonFiniteLossError(TutelageError, ArithmeticError):
    """The training loss became NaN or infinite."""


class StudyError(TutelageError, RuntimeError):
    """A study is malformed, could not be run, or what an earlier one left does not fit."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a hint such as ``" Did you mean 'steps'?"``, or an empty string.

    Args:
        name: What the user wrote.
        known: The valid names.

    Returns:
        The hint with a leading blank, empty where nothing is near.

    Examples:
        >>> nearest("step", ["steps", "seed"])
        " Did you mean 'steps'?"
    """
    match = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def not_of_transformers(model: object) -> UnsupportedModelError:
    """Returns the error about a model of another library.

    Args:
        model: What was passed in place of a transformers model.
    """
    return UnsupportedModelError(
        f"{type(model).__name__} is no transformers model; pass a PreTrainedModel."
    )
