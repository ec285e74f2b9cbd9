"""Recipes: one YAML file that says what is trained, on what, and how."""

from __future__ import annotations

import codecs
import os
import re
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from tutelage.errors import ArtefactError, RecipeError, nearest
from tutelage.train.metrics import METRICS

__all__ = [
    "DataSection",
    "ModelSection",
    "Recipe",
    "ScheduleSection",
    "StudentSection",
    "TeacherSection",
    "load_recipe",
    "recipe_from_dict",
    "save_recipe",
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


class DataSection(_Section):
    """Which examples are read, and where text and label are found in them."""

    task: Literal["classification", "pair", "regression", "pair_regression"] = Field(
        default="classification", description="what a label is, and whether texts come in pairs"
    )
    train: str = Field(description="a file, a folder of class folders, or a datasets name[:config]")
    eval: str | None = Field(
        default=None, description="evaluation data; default: a part of train (eval_split)"
    )
    eval_split: ShareOrCount | None = Field(
        default=None, description="share or number of train examples kept for evaluation"
    )
    text: Column = Field(default="text", description="text column, by name or 0-based position")
    text_pair: Column | None = Field(default=None, description="column of the second text")
    label: Column = Field(default="label", description="label column, by name or position")
    header: Flag = Field(default=True, description="whether a TSV or CSV file begins with names")
    encoding: Annotated[str, AfterValidator(_encoding)] = Field(
        default="utf-8", description="encoding of text files"
    )
    max_length: Positive = Field(default=128, description="tokens after which text is cut")
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

    @model_validator(mode="after")
    def _consistent(self) -> DataSection:
        if self.task.startswith("pair") and self.text_pair is None:
            raise ValueError(f"the task {self.task!r} needs 'text_pair', the second text's column")
        if not self.task.startswith("pair") and self.text_pair is not None:
            raise ValueError(f"'text_pair' does not fit the task {self.task!r}; use a pair task")
        if self.eval is None and self.eval_split is None:
            raise ValueError("give evaluation data as 'eval', or 'eval_split', such as 0.1")
        if self.metric is not None and self.task not in METRICS[self.metric].kinds:
            fitting = ", ".join(name for name, m in METRICS.items() if self.task in m.kinds)
            raise ValueError(
                f"'metric' {self.metric!r} does not fit the task {self.task!r}; use {fitting}"
            )
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


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe from a YAML file.

    Args:
        path: The YAML file. Paths inside it are relative to the current directory.
        overrides: ``"section.key=value"`` texts that win over the file; values are YAML.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: If the file is missing or not YAML, or a key or a value is wrong.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"there is no recipe {str(path)!r}; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"the recipe {str(path)!r} cannot be read ({_line(error)}); give a UTF-8 YAML file."
        ) from None
    return recipe_from_dict(_parse(text, str(path)), overrides, source=str(path))


def recipe_from_dict(
    values: Mapping[str, Any] | None, overrides: Sequence[str] = (), *, source: str = "the recipe"
) -> Recipe:
    """Makes a recipe from nested dictionaries.

    Args:
        values: Section names to sections, as in the YAML file.
        overrides: ``"section.key=value"`` texts that win over the values.
        source: What error messages call the recipe.

    Returns:
        The validated recipe.

    Raises:
        RecipeError: If a key or a value is wrong.
    """
    if values is not None and not isinstance(values, Mapping):
        raise RecipeError(
            f"{source} holds a {type(values).__name__} where sections are expected; "
            "begin with 'model:', 'data:' and 'output:'."
        )
    tree = deepcopy(dict(values or {}))
    for name in _SECTIONS:
        if tree.get(name) is None:
            tree[name] = {}
    for override in overrides:
        _override(tree, override)
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise RecipeError(_explain(error, source)) from None


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Writes a recipe, its defaults filled in, as YAML; the file appears whole or not at all.

    Args:
        recipe: The recipe.
        path: The file to write; its folder is made if missing.

    Raises:
        ArtefactError: If the file cannot be written.
    """
    target = Path(path)
    text = yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True)
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise ArtefactError(
            f"the recipe could not be written to {str(target)!r} ({error.strerror or error}); "
            "free some space or choose another folder."
        ) from None


_SECTIONS: dict[str, type[BaseModel]] = {
    name: field.annotation
    for name, field in Recipe.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
}


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 1e-4 as a number and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1} of {source}" if mark else source
        problem = getattr(error, "problem", None) or _line(error)
        raise RecipeError(f"{place} is not valid YAML: {problem}; correct it.") from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise RecipeError(
            f"the override {override!r} is not key=value; write for instance student.max_steps=200."
        )
    for part in parts[:-1]:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[parts[-1]] = _parse(value, f"the override {override!r}")


def _explain(error: ValidationError, source: str) -> str:
    """Returns one line: the first error, unknown keys before others, and how many more."""
    unknown = ("extra_forbidden", "invalid_key")
    found: dict[str, list[Any]] = {}
    for item in sorted(error.errors(), key=lambda item: item["type"] not in unknown):
        found.setdefault(_dotted(item["loc"]), []).append(item)
    key, items = next(iter(found.items()))
    first = items[0]
    section, _, name = key.rpartition(".")
    if first["type"] in unknown:
        valid = list((_SECTIONS[section] if section else Recipe).model_fields)
        hint = nearest(name, valid) or _elsewhere(name)
        within = f" of {section!r}" if section else ""
        text = f"{source}: unknown key {key!r}.{hint} Valid keys{within}: {', '.join(valid)}."
    elif first["type"] == "missing":
        model = _SECTIONS[section] if section else Recipe
        what = model.model_fields[name].description
        text = f"{source}: the key {key!r} is missing ({what}); add it, or give {key}=VALUE."
    elif not key or key in _SECTIONS:
        where = f" in {key!r}," if key else ""
        message = first["msg"].removeprefix("Value error, ")
        if first["type"] in ("model_type", "dict_type"):
            message = f"expected keys and values, found {_short(first['input'])}"
        text = f"{source}:{where} {message}."
    else:
        expected = " or ".join(dict.fromkeys(_expectation(item) for item in items))
        hint = ""
        if first["type"] == "literal_error":
            hint = nearest(first["input"], re.findall(r"'([^']+)'", first["ctx"]["expected"]))
        expected = expected.replace("a whole number or a number", "a number")
        end = "" if expected.endswith("?") else "."
        text = f"{source}: {key!r} is {_short(first['input'])}, but should be {expected}{end}{hint}"
    more = len(found) - 1
    return " ".join(text.split()) + (f" (and {more} more)" if more else "")


def _dotted(location: tuple[int | str, ...]) -> str:
    """Returns the key as the user writes it, without pydantic's tags of union members."""
    parts = [str(location[0])] if location else []
    if parts and parts[0] in _SECTIONS and len(location) > 1:
        parts.append(str(location[1]))
    positions = (f"[{part}]" for part in location[len(parts) :] if isinstance(part, int))
    return ".".join(parts) + "".join(positions)


def _elsewhere(name: str) -> str:
    """Returns a hint if the key exists in a section."""
    homes = [f"{section}.{name}" for section, m in _SECTIONS.items() if name in m.model_fields]
    return f" Did you mean {' or '.join(map(repr, homes))}?" if homes else ""


def _expectation(item: Any) -> str:
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message.removeprefix("Input should be ").removeprefix("should be ")
    return message.replace("a valid integer", "a whole number").replace("a valid ", "a ")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(str(text).split())
