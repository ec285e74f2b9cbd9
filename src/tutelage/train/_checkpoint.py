"""Checkpoints that are whole or absent, and that say which run they belong to."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import CheckpointError
from ._sharded import is_sharded, load_full

__all__ = [
    "LATENT_FILE",
    "MANIFEST",
    "commit",
    "latest_checkpoint",
    "load_latent",
    "refuse_other_run",
    "save_latent",
    "stage_for",
    "verify",
]

LATENT_FILE = "latent.safetensors"
"""Latent full-precision weights; not a name that ``from_pretrained`` would load."""

MANIFEST = "tutelage_checkpoint.json"
"""Lists the files of a checkpoint and the settings of its run; written last."""

_NAME = re.compile(r"checkpoint-(\d+)")
_REQUIRED = (LATENT_FILE, "optimizer.pt", "scheduler.pt", "trainer_state.json")

_FORMERLY = {"precision": "no"}
"""Settings that checkpoints of earlier versions do not hold, and what they were."""

_log = logging.getLogger(__name__)


def stage_for(checkpoint: Path) -> Path:
    """Returns an empty folder to write a checkpoint into, beside the place it will have.

    Args:
        checkpoint: ``.../checkpoint-N``.
    """
    stage = checkpoint.with_name(f".{checkpoint.name}.partial")
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    return stage


def save_latent(model: nn.Module, folder: Path) -> None:
    """Writes the latent weights and buffers of a student.

    Args:
        model: The student.
        folder: Where to.
    """
    tensors, seen = {}, set[int]()
    for name, tensor in model.state_dict().items():
        pointer = tensor.data_ptr()
        tensors[name] = tensor.clone() if pointer in seen else tensor.contiguous()
        seen.add(pointer)
    save_file(tensors, folder / LATENT_FILE, metadata={"format": "pt"})


def load_latent(model: nn.Module, checkpoint: Path) -> None:
    """Loads latent weights into a student of the same structure.

    Args:
        model: The student.
        checkpoint: A complete checkpoint.

    Raises:
        CheckpointError: The file is corrupt, or of another model.
    """
    verify(checkpoint)
    try:
        tensors = load_file(checkpoint / LATENT_FILE)
        if is_sharded(model):
            load_full(model, tensors)
        else:
            model.load_state_dict(tensors, strict=True)
    except (SafetensorError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{checkpoint / LATENT_FILE} does not fit the student: {line}; resume with the model "
            "and scheme the run was started with."
        ) from error


def commit(stage: Path, checkpoint: Path, run: Mapping[str, Any]) -> None:
    """Completes a staged checkpoint: writes the manifest, then renames the folder.

    Args:
        stage: What ``stage_for`` returned, filled.
        checkpoint: The place it takes.
        run: Settings that make the run what it is, plain data.
    """
    files = {f.name: f.stat().st_size for f in sorted(stage.iterdir()) if f.is_file()}
    (stage / MANIFEST).write_text(json.dumps({"files": files, "run": dict(run)}, indent=1))
    if checkpoint.exists():
        shutil.rmtree(checkpoint)
    stage.rename(checkpoint)


def verify(checkpoint: Path) -> dict[str, Any]:
    """Checks that a checkpoint is complete and returns its manifest.

    Args:
        checkpoint: The folder.

    Raises:
        CheckpointError: A file is missing or truncated.
    """
    manifest = checkpoint / MANIFEST
    try:
        content = json.loads(manifest.read_text())
        files, run = content["files"], content["run"]
        if not (isinstance(files, dict) and isinstance(run, dict)):
            raise TypeError("not a manifest")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint} is no complete checkpoint ({MANIFEST} is missing or damaged); resume "
            "from another one."
        ) from error
    for name in sorted({*files, *_REQUIRED}):
        file = checkpoint / name
        if not file.is_file():
            raise CheckpointError(
                f"{file} is missing; without it training would not go on as it was; resume from "
                "another checkpoint."
            )
        if name in files and file.stat().st_size != files[name]:
            raise CheckpointError(
                f"{file} has {file.stat().st_size} bytes instead of {files[name]}; resume from "
                "another checkpoint."
            )
    return cast("dict[str, Any]", content)


def refuse_other_run(checkpoint: Path, run: Mapping[str, Any]) -> None:
    """Refuses to resume a run whose settings were changed.

    Args:
        checkpoint: A complete checkpoint.
        run: The present settings; those that are not known yet may be left out.

    Raises:
        CheckpointError: A setting differs.
    """
    stored = verify(checkpoint)["run"]
    stored = {**_FORMERLY, **stored}
    current = json.loads(json.dumps(dict(run)))
    for key in sorted(current):
        if stored.get(key) != current[key]:
            raise CheckpointError(
                f"{checkpoint} is of a run with {key} = {stored.get(key)!r}, now it is "
                f"{current.get(key)!r}; resume with the settings of that run, or start a new one."
            )


def latest_checkpoint(folder: Path) -> Path | None:
    """Returns the newest complete checkpoint of a run, ``None`` if there is none.

    Args:
        folder: The output folder of the run.
    """
    if not folder.is_dir():
        return None
    found = [(int(m.group(1)), f) for f in folder.iterdir() if (m := _NAME.fullmatch(f.name))]
    for _, checkpoint in sorted(found, reverse=True):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            _log.warning("passed over: %s", error)
            continue
        return checkpoint
    return None
