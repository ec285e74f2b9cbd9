"""What the sections of a recipe are made of: strict numbers and checked names."""

from __future__ import annotations

import codecs
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from ..errors import nearest
from .metrics import METRICS

__all__ = [
    "Column",
    "Encoding",
    "Flag",
    "Fraction",
    "Integer",
    "Label",
    "MetricName",
    "Natural",
    "Positive",
    "Rate",
    "Real",
    "Section",
    "ShareOrCount",
    "TaskName",
]

TaskName = Literal[
    "classification",
    "pair",
    "regression",
    "pair_regression",
    "image_classification",
    "causal_lm",
    "token_classification",
    "question_answering",
]
"""The tasks."""


def _share_or_count(value: float) -> float:
    if value < 1 if isinstance(value, int) else not 0 < value < 1:
        raise ValueError("should be a share between 0 and 1, or a whole number of examples")
    return value


def _encoding(value: str) -> str:
    try:
        codecs.lookup(value)
    except LookupError:
        raise ValueError("should be an encoding that Python knows, such as 'utf-8'") from None
    return value


def _metric(value: str) -> str:
    if value not in METRICS:
        hint = nearest(value, METRICS)
        raise ValueError(f"should be one of {', '.join(METRICS)}.{hint}")
    return value


# Strict numbers: pydantic otherwise takes `true` for 1 and text for a number.
Integer = Annotated[int, Field(strict=True)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Real = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Flag = Annotated[bool, Field(strict=True)]
Column = str | Natural
ShareOrCount = Annotated[
    Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)],
    AfterValidator(_share_or_count),
]
Label = Annotated[str, Field(coerce_numbers_to_str=True)]
Encoding = Annotated[str, AfterValidator(_encoding)]
MetricName = Annotated[str, AfterValidator(_metric)]


class Section(BaseModel):
    """A section takes no keys but its own, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
