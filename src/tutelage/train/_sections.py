"""The sections of a recipe: every key with its type, default and description."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, model_validator

from ._fields import (
    Column,
    Encoding,
    Flag,
    Fraction,
    Integer,
    Label,
    MetricName,
    Natural,
    Positive,
    Rate,
    Real,
    Section,
    ShareOrCount,
)
from ._fields import TaskName as TaskName
from ._scheme_defaults import USUAL_SCHEME, USUAL_STEPS, with_scheme_defaults
from .metrics import METRICS

__all__ = [
    "SECTIONS",
    "AugmentSection",
    "CacheSection",
    "DataSection",
    "ModelSection",
    "Recipe",
    "ScheduleSection",
    "StudentSection",
    "TeacherSection",
]

Stage = Literal["none", "attention_output", "context", "attention_map"]


class ModelSection(Section):
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


_AUGMENTED = ("classification", "pair", "regression", "pair_regression")
"""Tasks in which a text keeps its label when a word is replaced by a likely one."""


class AugmentSection(Section):
    """How the student's training texts are multiplied, see ``tutelage.train.augment``."""

    model: str = Field(description="a masked language model, by name or folder, that knows words")
    copies: Positive = Field(default=30, description="altered copies of every text")
    probability: Fraction = Field(default=0.4, description="how likely a word is replaced")
    candidates: Positive = Field(default=15, description="words that may take a word's place")


class DataSection(Section):
    """Which examples are read, and where text and label are found in them."""

    task: TaskName = Field(default="classification", description="what a label is, and of what")
    train: str = Field(description="a file, a folder of class folders, or a datasets name[:config]")
    eval: str | None = Field(
        default=None, description="evaluation data; default: a part of train (eval_split)"
    )
    eval_also: dict[str, str] = Field(
        default_factory=dict,
        description="further evaluation data by name, measured once training is over",
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
    encoding: Encoding = Field(default="utf-8", description="encoding of text files")
    max_length: Positive = Field(default=128, description="tokens after which text is cut")
    stride: Natural = Field(
        default=64, description="tokens that two windows of a long context share (questions)"
    )
    max_answer: Positive = Field(default=30, description="tokens of the longest answer")
    unanswerable: Flag = Field(
        default=False, description="whether a context may hold no answer (questions)"
    )
    train_split: str = Field(default="train", description="split of a datasets name for training")
    eval_split_name: str = Field(
        default="validation", description="split of a datasets name for evaluation"
    )
    seed: Natural = Field(default=0, description="seed of the draw for eval_split")
    labels: list[Label] | None = Field(
        default=None, description="the labels in the order of the outputs; default: found"
    )
    metric: MetricName | None = Field(
        default=None, description="headline metric; default: accuracy, or correlation"
    )
    augment: AugmentSection | None = Field(
        default=None, description="more training texts for the student; default: none"
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
        if self.unanswerable and self.task != "question_answering":
            raise ValueError(
                f"'unanswerable' does not fit the task {self.task!r}; remove it, it is for "
                "question_answering"
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
        if self.augment is not None:
            if self.task not in _AUGMENTED:
                raise ValueError(
                    f"'augment' does not fit the task {self.task!r}; remove it, it is for "
                    f"{', '.join(_AUGMENTED)}"
                )
            if self.label is None:
                raise ValueError(
                    "'augment' gives copies of a text its label, and 'label' is null; add more "
                    "texts to 'train' instead, or name a label column"
                )
        if self.labels is not None:
            if self.task.endswith("regression"):
                raise ValueError("'labels' does not fit a regression; remove it")
            if len(set(self.labels)) < max(2, len(self.labels)):
                raise ValueError("'labels' needs at least two labels, all different")
        return self


class CacheSection(Section):
    """The teacher's answers stored on disk while the student trains, see ``CachedTeacher``."""

    codec: Literal["float32", "float16", "int8"] = Field(
        default="float32", description="how inner signals are stored; float32 is exact"
    )
    max_gb: Rate = Field(default=4.0, description="largest size, in GiB; more is refused")
    keep: Flag = Field(default=False, description="keep the files when training is over")


class TeacherSection(Section):
    """How the teacher is fine-tuned where it has no head for the task, and how it teaches."""

    epochs: Rate = Field(default=3.0, description="passes over the training data")
    max_steps: Integer = Field(default=-1, description="steps; -1: as many as epochs says")
    learning_rate: Rate = Field(default=1e-4, description="peak learning rate")
    batch_size: Positive = Field(default=32, description="examples per step")
    warmup_ratio: Fraction = Field(default=0.1, description="share of the steps for warm-up")
    weight_decay: Real = Field(default=0.01, description="weight decay")
    bf16: Flag = Field(default=False, description="train under autocast to bfloat16")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="precision in which it teaches"
    )
    cache: CacheSection | None = Field(
        default=None, description="read its answers from disk; default: it runs in every step"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TeacherSection:
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError("'max_steps' should be a positive number, or -1 for 'epochs'")
        return self


class ScheduleSection(Section):
    """When the teacher intervenes."""

    kind: Literal["gradual", "constant", "inverted", "stochastic", "none"] = Field(
        default="gradual",
        description="order of the intervention stages; default: gradual, and none where weights "
        "have one or two bits",
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


class StudentSection(Section):
    """How the student is quantized and trained."""

    scheme: str = Field(default=USUAL_SCHEME, description="name of a quantization scheme")
    quantize_attention: Flag = Field(
        default=True, description="quantize the products inside attention, too"
    )
    losses: Literal["default", "relative", "reference"] | dict[str, Rate] = Field(
        default="default",
        description="distillation losses: a set's name, or terms with their weights, such as "
        "{logits: 1}; the term 'labels' is cross-entropy against the data's labels; default: "
        "default, and relative where weights are binary",
    )
    local: Literal["paper", "code"] | None = Field(
        default=None, description="distillation of a replaced signal; default: the library's"
    )
    optimizer: Literal["adamw", "bert_adam"] = Field(default="adamw", description="optimizer")
    dropout: bool = Field(default=False, description="train the student with its dropout on")
    ramp: Fraction = Field(
        default=0.0,
        description="part of the training that goes from full precision to quantized; default: 0, "
        "and 0.5 where weights are binary",
    )
    rate_cap: Real = Field(
        default=0.0,
        description="largest learning rate of a quantized weight, as a part of its mean magnitude; "
        "a higher one is lowered, with a warning; 0: no limit; default: 0.01 where weights are "
        "ternary or have two bits, 0.025 where they are binary, else 0",
    )
    average: Fraction = Field(
        default=0.0,
        description="part of the training at its end over which the weights are averaged; "
        "default: 0, and 0.2 where weights are binary and steps 200 or more",
    )
    rate_by_magnitude: Flag = Field(
        default=False,
        description="learning rate of a quantized weight in proportion to its mean magnitude; "
        "default: where weights are binary, ternary or have two bits",
    )
    learned_scales: Flag = Field(
        default=False, description="train a factor of every weight scale with the weights"
    )
    group_by_length: Flag = Field(
        default=False, description="batches of texts of about equal length, which pad little"
    )
    max_steps: Positive = Field(default=USUAL_STEPS, description="training steps")
    learning_rate: Rate | None = Field(
        default=None,
        description="peak learning rate; default: 4e-4 where weights are ternary, 1e-3 where they "
        "are binary, else 3e-4",
    )
    batch_size: Positive = Field(default=32, description="examples per step")
    warmup_ratio: Fraction = Field(default=0.1, description="share of the steps for warm-up")
    weight_decay: Real = Field(default=0.01, description="weight decay of the weights")
    bf16: Flag = Field(
        default=False,
        description="train under autocast to bfloat16; quantized products stay exact",
    )
    graph: bool | None = Field(
        default=None,
        description="steps as CUDA graphs: true insists, false never; default: where they work",
    )
    eval_steps: Positive | None = Field(default=None, description="steps between evaluations")
    save_steps: Positive | None = Field(default=None, description="steps between checkpoints")
    keep: Literal["last", "best"] = Field(default="last", description="which weights are kept")


class Recipe(Section):
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

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_scheme(cls, values: Any) -> Any:
        return with_scheme_defaults(values) if isinstance(values, dict) else values

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
} | {"data.augment": AugmentSection, "teacher.cache": CacheSection}
"""Name to model of every section, and of every section in a section."""
