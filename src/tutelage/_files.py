"""Writing folders and files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from .errors import ArtefactError, OutputExistsError

__all__ = [
    "refuse_existing",
    "staged_directory",
    "staged_files",
    "write_failures_as_os_error",
    "write_text",
]


def refuse_existing(path: Path, *, overwrite: bool = False) -> None:
    """Refuses an output folder that is not empty.

    Args:
        path: The folder.
        overwrite: Accept it all the same.

    Raises:
        OutputExistsError: It holds files, or is a file.
    """
    if path.is_file():
        raise OutputExistsError(f"{path} is a file; name a folder.")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise OutputExistsError(
            f"the folder {path} is not empty; name another one, or pass overwrite=True "
            "(--overwrite)."
        )


@contextlib.contextmanager
def staged_directory(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder that takes the place of ``path`` when all went well.

    Args:
        path: Where the folder shall stand.
        overwrite: Replace a folder that is not empty.

    Raises:
        OutputExistsError: The folder is not empty and ``overwrite`` is off.
        ArtefactError: The disk is full or the folder cannot be written; nothing is left behind.
    """
    path = path.resolve()
    refuse_existing(path, overwrite=overwrite)
    stage = path.with_name(f".{path.name}.partial-{os.getpid()}")
    created = [parent for parent in stage.parents if not parent.exists()]
    done = False
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        yield stage
        _readable(stage)
        _exchange(stage, path)
        done = True
    except OSError as error:
        if isinstance(error, ArtefactError | OutputExistsError):
            raise
        raise ArtefactError(
            f"could not write {path} ({error.strerror or error}); nothing was left behind, free "
            "some space or name another folder."
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not done:
            for parent in created:
                with contextlib.suppress(OSError):
                    parent.rmdir()


def _readable(folder: Path) -> None:
    """Gives files the usual permissions; safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~mask)


def _exchange(stage: Path, path: Path) -> None:
    if not path.exists():
        os.rename(stage, path)
        return
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    os.rename(path, old)
    try:
        os.rename(stage, path)
    except OSError:
        os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def staged_files(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder whose files are moved into ``folder`` when all went well.

    Files of other names in ``folder`` stay.

    Args:
        folder: Where the files shall stand.

    Raises:
        ArtefactError: The disk is full or the folder cannot be written; nothing was moved.
    """
    stage = folder / f".partial-{os.getpid()}"
    try:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)
        yield stage
        _readable(stage)
        for file in sorted(stage.iterdir()):
            os.replace(file, folder / file.name)
    except OSError as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(
            f"could not write into {folder} ({error.strerror or error}); free some space or name "
            "another folder."
        ) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextlib.contextmanager
def write_failures_as_os_error() -> Iterator[None]:
    """Turns the exception of its own with which safetensors reports a full disk into an OSError.

    Raises:
        OSError: safetensors could not write.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(None, str(error)) from error


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name, then renames it.

    Args:
        path: The file.
        text: Its content, stored as UTF-8.
    """
    stage = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        stage.write_text(text, encoding="utf-8")
        os.replace(stage, path)
    except OSError as error:
        raise ArtefactError(
            f"could not write {path} ({error.strerror or error}); free some space or name another "
            "folder."
        ) from error
    finally:
        stage.unlink(missing_ok=True)
