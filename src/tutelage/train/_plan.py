"""Everything about a run that can be checked before anything is trained or written."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .._prepare import prepare
from ..distill import Distiller, losses
from ..distill.losses import Losses
from ..errors import IncompatibleTeacherError, RecipeError
from ..intervention import Schedule
from ..scheme import Scheme
from ._augmented import augmented
from ._models import auto_class, encode_for, load_config, load_model
from ._output import AUGMENTED
from ._split import same_source
from .augment import Augmenter
from .recipe import DataSection, Recipe, StudentSection
from .tasks import TASKS, Head, Task, TaskDataset

__all__ = [
    "Plan",
    "make_losses",
    "make_plan",
    "make_schedule",
    "make_scheme",
    "save_and_eval_steps",
]


@dataclass(frozen=True)
class Plan:
    """A run that was found to be possible.

    Attributes:
        recipe: The portable recipe.
        folder: Where the result goes.
        scheme: The student's scheme.
        schedule: When the teacher intervenes.
        losses: The student's losses.
        task: Labels and metric.
        processor: The models' tokenizer or image processor.
        train: Training examples as inputs.
        eval: Evaluation examples as inputs.
        model: The model to compress, with a head, fresh or its own.
        model_has_head: Whether the head is its own.
        teacher: The teacher that the recipe names; ``None`` where it is the model itself.
        eval_also: Further evaluation examples as inputs, by name.
        augment: Makes the student's training examples, or reads those that the run made before;
            ``None`` where they are not augmented.
    """

    recipe: Recipe
    folder: Path
    scheme: Scheme
    schedule: Schedule
    losses: Losses
    task: Task
    processor: Any
    train: TaskDataset
    eval: TaskDataset
    model: nn.Module
    model_has_head: bool
    teacher: nn.Module | None
    eval_also: dict[str, TaskDataset]
    augment: Callable[[], TaskDataset] | None


def make_plan(recipe: Recipe, report: Callable[[str], None]) -> Plan:
    """Checks a recipe against its data and models, and loads them; writes nothing.

    Args:
        recipe: The portable recipe.
        report: Told what the user may want to know.

    Raises:
        TutelageError: Something does not exist or does not fit.
    """
    scheme = make_scheme(recipe.student)
    schedule, terms = make_schedule(recipe), make_losses(recipe.student)
    save_and_eval_steps(recipe.student)
    name, teacher_name = recipe.model.name_or_path, recipe.model.teacher
    config = load_config(name)
    guide = config if teacher_name is None else load_config(teacher_name, "model.teacher")
    kind = TASKS[recipe.data.task]
    if teacher_name is not None and not kind.head.on(guide):
        raise RecipeError(
            f"model.teacher {teacher_name!r} has no {kind.head.name}; give a "
            "fine-tuned model, or leave model.teacher out to have the model fine-tuned."
        )
    train, eval = kind.read(recipe.data)
    also = _read_also(kind, recipe.data)
    task = kind.build(train, recipe.data, eval, guide)
    _refuse_evaluation_without_labels(recipe, task)
    auto_class(name, config, kind.head)
    processor = kind.load_processor(name, config)
    files = [Path(name) / file for file in kind.processor_files]
    if files and Path(name).is_dir() and not any(file.is_file() for file in files):
        report(f"{name} holds no {kind.processor_name}: the default is used")
    if task.label_names:
        _refuse_other_labels(config, guide, kind.head)
    model = load_model(name, config, task)
    teacher = None
    if teacher_name is not None:
        kind.refuse_other_processor(processor, teacher_name)
        teacher = load_model(teacher_name, guide, task, "model.teacher")
    models = [model] if teacher is None else [model, teacher]
    limit = task.limit(recipe.data, models, processor, report)
    _try(model, teacher, scheme, terms, stored=recipe.teacher.cache is not None)

    def encode(examples: Any) -> TaskDataset:
        return encode_for(model, task, examples, processor, limit)

    return Plan(
        recipe=recipe,
        folder=Path(recipe.output),
        scheme=scheme,
        schedule=schedule,
        losses=terms,
        task=task,
        processor=processor,
        train=encode(train),
        eval=encode(eval),
        model=model,
        model_has_head=kind.head.on(config),
        teacher=teacher,
        eval_also={name: encode(examples) for name, examples in also.items()},
        augment=_augmentation(recipe, train, encode, report),
    )


def _read_also(kind: type[Task], section: DataSection) -> dict[str, Any]:
    for name, source in section.eval_also.items():
        if same_source(section.train, source):
            raise RecipeError(
                f"data.eval_also.{name} is {source!r}, the training data; name other examples."
            )
    return {name: kind.read_one(source, section) for name, source in section.eval_also.items()}


def _augmentation(
    recipe: Recipe,
    train: Any,
    encode: Callable[[Any], TaskDataset],
    report: Callable[[str], None],
) -> Callable[[], TaskDataset] | None:
    if recipe.data.augment is None:
        return None
    augmenter = Augmenter.load(recipe.data.augment, recipe.seed)
    file = Path(recipe.output) / AUGMENTED
    return lambda: encode(augmented(train, augmenter, file, report))


def make_scheme(section: StudentSection) -> Scheme:
    """Returns how the student is quantized.

    Args:
        section: Of a recipe.

    Raises:
        SchemeError: There is no scheme of that name.
    """
    scheme = Scheme.preset(section.scheme)
    if not section.quantize_attention:
        scheme = scheme.without_attention()
    return scheme.with_learned_scales() if section.learned_scales else scheme


def make_schedule(recipe: Recipe) -> Schedule:
    """Returns the schedule that a recipe describes."""
    section, steps = recipe.schedule, recipe.schedule_steps
    if section.kind == "none":
        return Schedule.none()
    if section.kind == "constant":
        return Schedule.constant(str(section.stage), steps)
    if section.kind == "stochastic":
        return Schedule.stochastic(steps, recipe.seed)
    return Schedule.inverted(steps) if section.kind == "inverted" else Schedule.gradual(steps)


def make_losses(section: StudentSection) -> Losses:
    """Returns the losses that a recipe describes."""
    if isinstance(section.losses, str):
        sets = {
            "default": losses.default,
            "relative": losses.relative,
            "reference": losses.reference,
        }
        found = sets[section.losses]()
    else:
        found = Losses.of(section.losses)
    return found if section.local is None else found.with_local(section.local)


def save_and_eval_steps(section: StudentSection) -> tuple[int, int | None]:
    """Returns the steps between checkpoints, and between evaluations (``None`` for no evaluation).

    Raises:
        RecipeError: ``keep="best"`` with checkpoints at other steps than evaluations.
    """
    usual = max(50, section.max_steps // 4)
    if section.keep == "last":
        return section.save_steps or usual, section.eval_steps
    steps = section.eval_steps or section.save_steps or usual
    if section.save_steps not in (None, steps):
        raise RecipeError(
            f"student.save_steps is {section.save_steps} and student.eval_steps {steps}, but "
            "keep='best' saves at every evaluation; leave save_steps out."
        )
    return steps, steps


def _refuse_evaluation_without_labels(recipe: Recipe, task: Task) -> None:
    section = recipe.student
    if not task.labelled and (section.eval_steps is not None or section.keep == "best"):
        key = "eval_steps" if section.eval_steps is not None else "keep"
        raise RecipeError(
            f"student.{key} asks for metrics while training, which need labels, and data.label is "
            "null; leave it out (the finished student is compared with its teacher)."
        )


def _refuse_other_labels(config: Any, guide: Any, head: Head) -> None:
    if config is guide or not head.on(config):
        return
    own, other = ({int(i): str(n) for i, n in c.id2label.items()} for c in (config, guide))
    named = [not all(n == f"LABEL_{i}" for i, n in names.items()) for names in (own, other)]
    folded = [{i: n.casefold() for i, n in names.items()} for names in (own, other)]
    if len(own) != len(other) or (all(named) and folded[0] != folded[1]):
        raise IncompatibleTeacherError(
            f"the labels of the model ({', '.join(own.values())}) are not those of the teacher "
            f"({', '.join(other.values())}); give models of the same labels in the same order."
        )


def _try(
    model: nn.Module, teacher: nn.Module | None, scheme: Scheme, terms: Losses, *, stored: bool
) -> None:
    """Prepares a copy, so that a model that cannot be a student is refused at once."""
    trial = prepare(copy.deepcopy(model), scheme)
    distiller = Distiller(trial, copy.deepcopy(model) if teacher is None else teacher, terms)
    if stored:
        try:
            distiller.refuse_dropped_padding()
        except RecipeError as error:
            raise RecipeError(
                "teacher.cache stores no padding, over which a loss or a scale of this student "
                "runs; remove teacher.cache, or take the default losses and another scheme."
            ) from error
