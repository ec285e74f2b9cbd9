"""The teacher's answers on disk for one run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..distill import SAMPLE_IDS, CachedTeacher, Distiller, LiveTeacher, with_sample_ids
from ..errors import ArtefactError
from ._output import TEACHER_CACHE
from ._plan import Plan

__all__ = ["keeping_ids", "teacher_source"]

_GIB = 2**30


def keeping_ids(
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Tensor]],
) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
    """Returns a collator that passes the ids of samples by the one it is given.

    Args:
        collate: Makes a batch of items, some fields of which it may drop.
    """

    def run(items: list[dict[str, Any]]) -> dict[str, Tensor]:
        bare = [{key: item[key] for key in item if key != SAMPLE_IDS} for item in items]
        batch = dict(collate(bare))
        if SAMPLE_IDS in items[0]:
            batch[SAMPLE_IDS] = torch.tensor([item[SAMPLE_IDS] for item in items])
        return batch

    return run


class _OnDevice:
    """Batches of a loader, moved to where the models are; ids stay on the host."""

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self._loader, self._device = loader, device

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for batch in self._loader:
            yield {
                key: value if key == SAMPLE_IDS else value.to(self._device)
                for key, value in batch.items()
            }


@contextmanager
def teacher_source(
    plan: Plan, student: nn.Module, teacher: nn.Module, report: Callable[[str], None]
) -> Iterator[LiveTeacher | CachedTeacher]:
    """Gives what teaches the student: the teacher itself, or its answers stored for this run.

    Stored is what the losses and the schedule ask for, of every training sample; a run that is
    resumed reads what it stored before. The files go when training is over, unless they are to be
    kept; an error leaves them for the resumption.

    Args:
        plan: The run.
        student: The prepared student.
        teacher: The teacher.
        report: Told what happens.

    Raises:
        TutelageError: As ``CachedTeacher.build``.
    """
    section = plan.recipe.teacher
    live = LiveTeacher(teacher, dtype=getattr(torch, section.dtype))
    if section.cache is None:
        yield live
        return
    folder = plan.folder / TEACHER_CACHE
    stored = _earlier(plan, live, report) if folder.exists() else None
    if stored is None:
        accelerator = torch.accelerator.current_accelerator()
        device = torch.device("cpu") if accelerator is None else accelerator
        student.to(device)
        teacher.to(device)
        loader = DataLoader(
            with_sample_ids(plan.train),
            plan.recipe.student.batch_size,
            collate_fn=keeping_ids(plan.task.collator(plan.processor)),
        )
        stored = CachedTeacher.build(
            folder,
            Distiller(student, live, plan.losses),
            _OnDevice(loader, device),
            stages=plan.schedule.stages,
            codec=section.cache.codec,
            max_bytes=int(section.cache.max_gb * _GIB),
            overwrite=True,
        )
        report(f"stored the teacher's answers: {stored.bytes / 2**20:.1f} MiB in {folder}")
    yield stored
    if not section.cache.keep:
        shutil.rmtree(folder)


def _earlier(plan: Plan, live: LiveTeacher, report: Callable[[str], None]) -> CachedTeacher | None:
    folder = plan.folder / TEACHER_CACHE
    try:
        stored = CachedTeacher(folder, teacher=live)
    except ArtefactError as error:
        report(f"the teacher's answers are stored anew: {error}")
        return None
    report(f"the teacher's answers in {folder} are complete already")
    return stored
