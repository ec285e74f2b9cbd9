"""The sections of a recipe: every key with its type, default and description."""

from __future__ import annotations

import codecs
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from ..errors import nearest
from .metrics import METRICS

__all__ = [
    "SECTIONS",
    "DataSection",
    "ModelSection",
    "Recipe",
    "ScheduleSection",
    "StudentSection",
    "TeacherSection",
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
Stage = Literal["none", "attention_output", "context", "attention_map"]


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


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(_Section):
    """Which model is compressed, and who teaches it."""

    name_or_path: str = Field(description="a Hugging Face model name or folder")
    teacher: str | None = Field(
        default=None,
        description="a fine-tuned teacher; default: the model itself, fine-tuned first if it "
        "has no head for the task",
    )


_DEFAULTS: dict[str, dict[str, Any]] = {
    "image_classification": {"text": "image"},
    "token_classification": {"text": "tokens", "label": "tags"},
    "question_answering": {
        "text": "context",
        "text_pair": "question",
        "label": "answers",
        "max_length": 384,
    },
}
"""Defaults of the data section that depend on its task."""


class DataSection(_Section):
    """Which examples are read, and where text and label are found in them."""

    task: TaskName = Field(default="classification", description="what a label is, and of what")
    train: str = Field(description="a file, a folder of class folders, or a datasets name[:config]")
    eval: str | None = Field(
        default=None, description="evaluation data; default: a part of train (eval_split)"
    )
    eval_split: ShareOrCount | None = Field(
        default=None, description="share or number of train examples kept for evaluation"
    )
    text: Column = Field(
        default="text",
        description="column of texts (images, word lists, contexts), by name or 0-based position",
    )
    text_pair: Column | None = Field(
        default=None, description="column of the second text, or of the question"
    )
    label: Column | None = Field(
        default="label", description="label column, by name or position; null: without labels"
    )
    header: Flag = Field(default=True, description="whether a TSV or CSV file begins with names")
    encoding: Annotated[str, AfterValidator(_encoding)] = Field(
        default="utf-8", description="encoding of text files"
    )
    max_length: Positive = Field(default=128, description="tokens after which text is cut")
    stride: Natural = Field(
        default=64, description="tokens that two windows of a long context share (questions)"
    )
    max_answer: Positive = Field(default=30, description="tokens of the longest answer")
    train_split: str = Field(default="train", description="split of a datasets name for training")
    eval_split_name: str = Field(
        default="validation", description="split of a datasets name for evaluation"
    )
    seed: Natural = Field(default=0, description="seed of the draw for eval_split")
    labels: list[Label] | None = Field(
        default=None, description="the labels in the order of the outputs; default: found"
    )
    metric: Annotated[str, AfterValidator(_metric)] | None = Field(
        default=None, description="headline metric; default: accuracy, or correlation"
    )

    @model_validator(mode="before")
    @classmethod
    def _columns_of_the_task(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("task"), str):
            return values
        return _DEFAULTS.get(values["task"], {}) | values

    @model_validator(mode="after")
    def _consistent(self) -> DataSection:
        if self.task.startswith("pair") and self.text_pair is None:
            raise ValueError(f"the task {self.task!r} needs 'text_pair', the second text's column")
        paired = self.task.startswith("pair") or self.task == "question_answering"
        if not paired and self.text_pair is not None:
            raise ValueError(f"'text_pair' does not fit the task {self.task!r}; use a pair task")
        if self.eval is None and self.eval_split is None:
            raise ValueError("give evaluation data as 'eval', or 'eval_split', such as 0.1")
        if self.metric is not None and self.task not in METRICS[self.metric].kinds:
            fitting = ", ".join(name for name, m in METRICS.items() if self.task in m.kinds)
            raise ValueError(
                f"'metric' {self.metric!r} does not fit the task {self.task!r}; use {fitting}"
            )
        if self.label is None:
            if self.task.endswith("regression"):
                raise ValueError("'label' is null, which does not fit a regression; name a column")
            if self.metric is not None:
                raise ValueError(
                    "'metric' needs labels and 'label' is null; leave it out (agreement with the "
                    "teacher and KL to it are measured), or name a label column"
                )
            if self.labels is not None:
                raise ValueError("'labels' does not fit data without labels ('label' is null)")
        if self.labels is not None:
            if self.task.endswith("regression"):
                raise ValueError("'labels' does not fit a regression; remove it")
            if len(set(self.labels)) < max(2, len(self.labels)):
                raise ValueError("'labels' needs at least two labels, all different")
        return self


class TeacherSection(_Section):
    """How the teacher is fine-tuned where it has no head for the task."""

    epochs: Rate = Field(default=3.0, description="passes over the training data")
    max_steps: Integer = Field(default=-1, description="steps; -1: as many as epochs says")
    learning_rate: Rate = Field(default=1e-4, description="peak learning rate")
    batch_size: Positive = Field(default=32, description="examples per step")
    warmup_ratio: Fraction = Field(default=0.1, description="share of the steps for warm-up")
    weight_decay: Real = Field(default=0.01, description="weight decay")

    @model_validator(mode="after")
    def _consistent(self) -> TeacherSection:
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError("'max_steps' should be a positive number, or -1 for 'epochs'")
        return self


class ScheduleSection(_Section):
    """When the teacher intervenes."""

    kind: Literal["gradual", "constant", "inverted", "stochastic", "none"] = Field(
        default="gradual", description="order of the intervention stages"
    )
    steps: Natural | None = Field(
        default=None, description="steps with intervention; default: min(60, max_steps // 3)"
    )
    stage: Stage | None = Field(default=None, description="the constant schedule's one stage")

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleSection:
        if self.kind == "constant" and self.stage is None:
            raise ValueError(
                f"the constant schedule needs 'stage', one of {', '.join(get_args(Stage))}"
            )
        if self.kind != "constant" and self.stage is not None:
            raise ValueError(f"'stage' is for kind 'constant', not {self.kind!r}; remove it")
        return self


class StudentSection(_Section):
    """How the student is quantized and trained."""

    scheme: str = Field(default="ternary-a8", description="name of a quantization scheme")
    losses: Literal["default", "reference"] = Field(
        default="default", description="distillation losses"
    )
    local: Literal["paper", "code"] | None = Field(
        default=None, description="distillation of a replaced signal; default: the library's"
    )
    optimizer: Literal["adamw", "bert_adam"] = Field(default="adamw", description="optimizer")
    dropout: bool = Field(default=False, description="train the student with its dropout on")
    max_steps: Positive = Field(default=300, description="training steps")
    learning_rate: Rate | None = Field(
        default=None, description="peak learning rate; default: the library's"
    )
    batch_size: Positive = Field(default=32, description="examples per step")
    warmup_ratio: Fraction = Field(default=0.1, description="share of the steps for warm-up")
    weight_decay: Real = Field(default=0.01, description="weight decay of the weights")
    eval_steps: Positive | None = Field(default=None, description="steps between evaluations")
    save_steps: Positive | None = Field(default=None, description="steps between checkpoints")
    keep: Literal["last", "best"] = Field(default="last", description="which weights are kept")


class Recipe(_Section):
    """Everything that decides a run."""

    model: ModelSection = Field(description="which model, and its teacher")
    data: DataSection = Field(description="which examples")
    teacher: TeacherSection = Field(
        default_factory=TeacherSection, description="fine-tuning of the teacher"
    )
    schedule: ScheduleSection = Field(
        default_factory=ScheduleSection, description="when the teacher intervenes"
    )
    student: StudentSection = Field(
        default_factory=StudentSection, description="quantization and training of the student"
    )
    output: str = Field(description="folder of the result")
    seed: Natural = Field(default=0, description="seed of the run")
    threads: Positive | None = Field(default=None, description="CPU threads; default: torch's")

    @property
    def schedule_steps(self) -> int:
        """The number of steps with intervention, its default resolved; 0 for kind "none"."""
        if self.schedule.kind == "none":
            return 0
        steps = self.schedule.steps
        return min(60, self.student.max_steps // 3) if steps is None else steps

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.schedule_steps > self.student.max_steps:
            raise ValueError(
                f"'schedule.steps' ({self.schedule_steps}) exceeds 'student.max_steps' "
                f"({self.student.max_steps}); lower the one or raise the other"
            )
        return self


SECTIONS: dict[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}
"""Name to model of every section."""
