"""A student's errors while its teacher steps in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..distill import Distiller
from ..distill._items import ModelInputs, read_inputs
from ..errors import StudyError
from ..intervention import NO_INTERVENTION
from ..sites import SiteMap, Tap
from ..train._inference import divergence
from ._layers import _Sums

__all__ = ["StageErrors", "stage_errors"]


@dataclass(frozen=True)
class StageErrors:
    """Errors of a student under one stage.

    Attributes:
        stage: The stage; ``"none"`` is the student on its own, as it is deployed.
        assisted: Whether the teacher's signals are in the student's forward pass. Such figures are
            no measure of what the student can do.
        blocks: Names of the blocks.
        mse: Mean squared error of every block's output against the teacher's, over real tokens
            and features.
        relative: Squared error over the teacher's squared norm.
        kl: Mean KL(teacher || student) of the predictions, in nats; ``None`` where outputs are not
            classes.
    """

    stage: str
    assisted: bool
    blocks: tuple[str, ...]
    mse: tuple[float, ...]
    relative: tuple[float, ...]
    kl: float | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON."""
        return asdict(self)


def stage_errors(
    distiller: Distiller, batches: Sequence[Mapping[str, Any]], stages: Sequence[str]
) -> list[StageErrors]:
    """Compares a student with its teacher, block by block, with a stage on in every block.

    Under a stage the teacher's attention output, context or attention map replaces the student's in
    all blocks at once (Kim et al., arXiv 2302.11812); what is left is the error of the rest: of the
    feed-forward part, and of the residual stream that it travels along.

    Args:
        distiller: Student, in eval mode, and teacher.
        batches: Inputs; at least one.
        stages: Which, ``"none"`` for no intervention.

    Raises:
        StudyError: There is no batch.
        SiteError: A stage needs a signal that is out of reach.
    """
    if not batches:
        raise StudyError("there is no batch to compare the models on; give at least one.")
    return [_under(distiller, batches, stage) for stage in stages]


def _under(distiller: Distiller, batches: Sequence[Mapping[str, Any]], stage: str) -> StageErrors:
    student, sites = distiller.student, distiller.teacher.sites
    at = sites.at("block_output")
    sums = [_Sums() for _ in at]
    total, count = 0.0, 0
    for batch in batches:
        inputs, keys = distiller.model_inputs(batch)
        given = read_inputs(inputs, student)
        masks = {"input": given.token_mask, "decoder": given.decoder_mask, None: None}
        with torch.no_grad():
            _, theirs = distiller.teacher.get(inputs, keys, {"block_output"})
            with Tap(student, sites, {"block_output"}) as tap:
                step = distiller.step(batch, stage)
        ours = tap.signals()["block_output"]
        for place, s, t, found in zip(at, ours, theirs["block_output"], sums, strict=True):
            found.add(s, t, masks[sites.blocks[place].query_axis])
        values = _divergences(step.student_logits, step.teacher_logits, given, sites)
        total, count = total + float(values.sum()), count + len(values)
    errors = [found.error() for found in sums]
    return StageErrors(
        stage=stage,
        assisted=stage != NO_INTERVENTION,
        blocks=tuple(sites.blocks[place].block for place in at),
        mse=tuple(error.mse for error in errors),
        relative=tuple(error.relative for error in errors),
        kl=total / count if count else None,
    )


def _divergences(own: Tensor, other: Tensor, given: ModelInputs, sites: SiteMap) -> Tensor:
    if own.shape[-1] == 1:
        return own.new_zeros(0)
    mask = given.token_mask if given.decoder_mask is None else given.decoder_mask
    values = divergence(own.flatten(0, -2), other.flatten(0, -2))
    if own.dim() == 3 and mask is not None and mask.shape == own.shape[:-1]:
        return values[mask.flatten()]
    return values
