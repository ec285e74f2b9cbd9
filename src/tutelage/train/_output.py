"""The folder of a run: who may write into it, and what an earlier run left there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..artefacts import refuse_existing, write_failures_as_os_error
from ..errors import ArtefactError, OutputExistsError, RecipeError, TutelageError
from ._log import TRAINING_FILE
from ._result import RESULT_FILE
from .recipe import Recipe, load_recipe

__all__ = [
    "AUGMENTED",
    "CHECKPOINTS",
    "RECIPE_FILE",
    "TEACHER",
    "TEACHER_CACHE",
    "clear",
    "portable",
    "refuse_other_recipe",
    "refuse_output",
    "sweep",
    "writing",
]

RECIPE_FILE = "recipe.yaml"
TEACHER = "teacher"
CHECKPOINTS = "checkpoints"
AUGMENTED = "augmented.parquet"
TEACHER_CACHE = "teacher-cache"

# Removed in this order, so that what is left of an earlier run never passes for a finished one.
_OWN = (
    RESULT_FILE,
    "model*.safetensors*",
    "config.json",
    RECIPE_FILE,
    TRAINING_FILE,
    "README.md",
    "tokenizer*",
    "preprocessor_config.json",
    "generation_config.json",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    AUGMENTED,
    TEACHER_CACHE,
    TEACHER,
    CHECKPOINTS,
)
_LEFTOVERS = (
    ".packed*",
    ".*partial-*",
    f".{TEACHER}.old-*",
    f".{TEACHER_CACHE}.old-*",
    f".{RECIPE_FILE}.*",
    f"{CHECKPOINTS}/.checkpoint-*",
)


def portable(recipe: Recipe) -> Recipe:
    """Returns the recipe with local paths made absolute, so that any folder can use it.

    Args:
        recipe: The recipe as it was given.
    """

    def absolute(name: str | None) -> str | None:
        if name is None:
            return None
        path = Path(name).expanduser()
        return str(path.resolve()) if path.exists() else name

    data, model, augment = recipe.data, recipe.model, recipe.data.augment
    if augment is not None:
        augment = augment.model_copy(update={"model": absolute(augment.model)})
    return recipe.model_copy(
        update={
            "data": data.model_copy(
                update={
                    "train": absolute(data.train),
                    "eval": absolute(data.eval),
                    "eval_also": {name: absolute(path) for name, path in data.eval_also.items()},
                    "augment": augment,
                }
            ),
            "model": model.model_copy(
                update={
                    "name_or_path": absolute(model.name_or_path),
                    "teacher": absolute(model.teacher),
                }
            ),
            "output": str(Path(recipe.output).expanduser().resolve()),
        }
    )


def refuse_output(recipe: Recipe, *, overwrite: bool, resume: bool) -> None:
    """Refuses a folder that the run may not write into.

    Args:
        recipe: The portable recipe.
        overwrite: Whether an earlier run may be replaced.
        resume: Whether an earlier run goes on.

    Raises:
        OutputExistsError: The folder holds something else.
        RecipeError: The recipe is not that of the run to be resumed, or reads from its own output.
    """
    folder = Path(recipe.output)
    if overwrite and resume:
        raise RecipeError("overwrite and resume exclude each other; give one of them.")
    if not resume:
        refuse_existing(folder, overwrite=overwrite)
    elif folder.is_file():
        raise OutputExistsError(f"{folder} is a file; name the folder of a run.")
    elif (folder / RECIPE_FILE).is_file():
        refuse_other_recipe(recipe, folder / RECIPE_FILE)
    elif folder.is_dir() and set(folder.iterdir()) - set(_leftovers(folder)):
        raise OutputExistsError(
            f"the folder {folder} is not empty and holds no {RECIPE_FILE} of a run to resume; name "
            "another one."
        )
    if overwrite:
        _refuse_own_input(recipe, folder)


def _refuse_own_input(recipe: Recipe, folder: Path) -> None:
    own = (folder, folder / TEACHER, folder / CHECKPOINTS)
    inputs = {
        "model.name_or_path": recipe.model.name_or_path,
        "model.teacher": recipe.model.teacher,
        "data.train": recipe.data.train,
        "data.eval": recipe.data.eval,
        **{f"data.eval_also.{name}": path for name, path in recipe.data.eval_also.items()},
    }
    if recipe.data.augment is not None:
        inputs["data.augment.model"] = recipe.data.augment.model
    for key, value in inputs.items():
        if value is not None and (Path(value) in own or set(Path(value).parents) & set(own[1:])):
            raise RecipeError(
                f"{key} is {value!r}, inside the output folder that would be overwritten; name "
                "another output."
            )


def refuse_other_recipe(recipe: Recipe, file: Path) -> None:
    """Refuses to resume a run with another recipe.

    Args:
        recipe: The portable recipe.
        file: The recipe of the run.

    Raises:
        RecipeError: They differ in more than the output folder.
    """
    stored = load_recipe(file).model_dump(exclude={"output"})
    key = _first_difference(recipe.model_dump(exclude={"output"}), stored)
    if key is not None:
        name, now, before = key
        raise RecipeError(
            f"{name} is {now!r}, but {before!r} in {file}; resume with the recipe of that run, or "
            "name another output."
        )


def _first_difference(
    now: Mapping[str, Any], before: Mapping[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    for key, value in now.items():
        other = before.get(key)
        if isinstance(value, dict) and isinstance(other, dict) and value.keys() == other.keys():
            found = _first_difference(value, other, f"{prefix}{key}.")
            if found is not None:
                return found
        elif value != other:
            return f"{prefix}{key}", value, other
    return None


def clear(folder: Path) -> None:
    """Removes what an earlier run wrote; files of other names stay.

    Args:
        folder: The folder of the run.
    """
    for pattern in _OWN:
        for path in sorted(folder.glob(pattern)):
            _remove(path)
    sweep(folder)


def sweep(folder: Path) -> None:
    """Removes what a killed or failed run left half-written.

    Args:
        folder: The folder of the run.
    """
    for path in _leftovers(folder):
        _remove(path)


def _leftovers(folder: Path) -> list[Path]:
    return [path for pattern in _LEFTOVERS for path in folder.glob(pattern)]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a failure to write into one typed line and removes what was half-written.

    Args:
        folder: The folder of the run.

    Raises:
        ArtefactError: The disk is full or the folder cannot be written.
    """
    try:
        with write_failures_as_os_error():
            yield
    except TutelageError:
        sweep(folder)
        raise
    except (OSError, RuntimeError) as error:
        reason = _write_failure(error)
        if reason is None:
            raise
        sweep(folder)
        raise ArtefactError(
            f"could not write into {folder} ({reason}); free some space and go on with --resume, "
            "or name another folder."
        ) from error


def _write_failure(error: BaseException) -> str | None:
    """Returns why writing failed, ``None`` if the error is of another kind."""
    if isinstance(error, OSError):
        return (error.strerror or str(error)).splitlines()[0]
    text = str(error)
    # torch.save reports a failed write as a RuntimeError of its zip writer.
    if "PytorchStreamWriter" in text or "inline_container" in text:
        return "torch could not finish a file; the disk may be full"
    return None
