"""What each analysis measures, and what its caption says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn

from ..distill import Distiller
from ..distill.losses import Losses
from ..errors import SiteError, StudyError
from ..intervention import stages
from ._activations import activation_ranges
from ._assisted import stage_errors
from ._folder import RunFolder
from ._latents import EDGES, latent_weights
from ._layers import BlockError, block_errors
from ._output import Entry
from ._rerun import Retrained, retrain
from ._sharpness import sharpness
from ._signal_figures import draw_activations, draw_blocks, draw_stages
from ._surface import loss_surface
from ._weight_figures import draw_latents, draw_oscillation, draw_sharpness, draw_surface

__all__ = ["ENTRIES", "LATENT", "USUAL", "Subject"]

USUAL = ("blocks", "activations")
"""What ``tutelage analyze`` does unless told otherwise: seconds."""

LATENT = ("surface", "oscillation", "latents")
"""What needs the latent weights, and so a second training of the student."""


@dataclass
class Subject:
    """The run that is analyzed, and how much of it.

    Attributes:
        run: The folder.
        examples: Evaluation examples for what runs forward only.
        samples: Training examples for curvature and loss surface.
        points: Points of the loss surface along each direction.
        again: Whether the student may be trained once more.
        report: Told what happens.
    """

    run: RunFolder
    examples: int
    samples: int
    points: int
    again: bool
    report: Callable[[str], None]
    blocks: list[BlockError] = field(default_factory=list)

    @cached_property
    def retrained(self) -> Retrained:
        """The student, trained once more.

        Raises:
            StudyError: That was not asked for.
        """
        if not self.again:
            raise StudyError(
                f"{', '.join(LATENT)} need the latent weights, which {self.run.path} does not "
                "hold; add --retrain to train its student once more."
            )
        return retrain(self.run, self.report)

    @cached_property
    def student(self) -> nn.Module:
        """A student that can be differentiated: trained once more, or made of the packed one."""
        return self.retrained.student if self.again else self.run.trainable()

    def origin(self) -> str:
        """Returns the sentence that says which student was measured."""
        if not self.again:
            return "The student is the packed one."
        return (
            f"The student was trained once more; {100 * self.retrained.equal:.2f} % of its codes "
            "equal those of the packed one."
        )


def _blocks(subject: Subject) -> Entry:
    data = subject.run.batches(subject.run.eval, subject.examples)
    subject.blocks = block_errors(subject.run.student, subject.run.teacher, data)
    return Entry(
        "blocks",
        "Errors block by block",
        "Left: how far signals inside the student are from its teacher's, as squared error over "
        "the teacher's squared norm; 0 is equal. Right: Kullback-Leibler divergence of the "
        "student's attention map from the teacher's, in nats, for every head. Packed student, real "
        "tokens of evaluation examples, no intervention.",
        {
            "what": "packed student beside its teacher, no intervention",
            "examples": _count(data),
            "blocks": [block.to_dict() for block in subject.blocks],
        },
        draw_blocks,
    )


def _activations(subject: Subject) -> Entry:
    data = subject.run.batches(subject.run.eval, subject.examples)
    found = activation_ranges(subject.run.student, subject.run.teacher, data)
    return Entry(
        "activations",
        "Ranges of activations",
        "Above: magnitudes of what the student quantizes, in teacher and student, before it is "
        "quantized; where the largest is far above the 99.9th percentile, one scale leaves few "
        "levels for the rest. The student's attention map holds the scales of the values where "
        "those have one each. Below: the share of the student's codes that are zero, and the share "
        "of the grid's codes that occur at all. Real tokens of evaluation examples; of attention "
        "maps, the entries that the mask leaves open.",
        {"examples": _count(data), "ranges": [entry.to_dict() for entry in found]},
        draw_activations,
    )


def _stages(subject: Subject) -> Entry:
    # The losses of the recipe play no part, and might refuse a stage.
    distiller = Distiller(subject.student, subject.run.teacher, Losses.of({"logits": 1.0}))
    possible = []
    for stage in stages():
        try:
            distiller.check(stage)
            possible.append(stage)
        except SiteError as error:
            subject.report(f"left out: the stage {stage!r}; {error}")
    data = subject.run.batches(subject.run.eval, subject.examples)
    found = stage_errors(distiller, data, possible)
    return Entry(
        "stages",
        "Errors with the teacher stepping in (assisted)",
        "Mean squared error of every block's output against the teacher's. The solid line is the "
        "student on its own. The dashed lines are ASSISTED: the teacher's attention output, "
        "context or attention map is put into every block of the student, which shows how much of "
        "the error comes from the rest; they are no measure of what the student can do. "
        f"{subject.origin()}",
        {"examples": _count(data), "stages": [entry.to_dict() for entry in found]},
        draw_stages,
    )


def _sharpness(subject: Subject) -> Entry:
    run = subject.run
    single = run.batches(run.train, subject.samples, size=1)
    together = run.batches(run.train, subject.samples, size=subject.samples)
    found = sharpness(run.distiller(subject.student), single, together)
    return Entry(
        "sharpness",
        "Curvature of the training loss",
        "Histogram of the Hessian eigenvalue of largest magnitude of the distillation loss of one "
        "training example at a time, with sign; the dashed line is that of their mean loss. Bars "
        "far to the right mean that a small step changes the gradient much. Derivatives pass every "
        "rounding through the gradient estimator (the Hessian of the gradient that trains, taken "
        "over all weights but embedding tables). Iterations that had not settled (still changing, "
        "or with a residual above a tenth of the eigenvalue): "
        f"{found.unconverged} of {len(single)}. {subject.origin()}",
        {"examples": len(single), **found.to_dict()},
        draw_sharpness,
    )


def _surface(subject: Subject) -> Entry:
    run, student = subject.run, subject.retrained.student
    distiller = run.distiller(student)
    data = run.batches(run.train, subject.samples, size=subject.samples)

    def loss() -> float:
        with torch.no_grad():
            return float(distiller.step(data[0]).loss)

    found = loss_surface(student, loss, points=subject.points)
    return Entry(
        "surface",
        "Loss around the student's weights",
        "Distillation loss on training examples where all latent matrices move along two random "
        "directions, each row as long as the weight's own (filter normalisation), and are "
        "quantized anew at every point. The cross marks the trained weights. "
        f"{subject.origin()}",
        {"examples": _count(data), **found.to_dict()},
        draw_surface,
    )


def _oscillation(subject: Subject) -> Entry:
    found = subject.retrained.flips
    return Entry(
        "oscillation",
        "Codes that change, and change back",
        "Left: the share of the weights whose code changes in a training step, and of those whose "
        "code changes against the direction of its last change (an oscillation); lines are means "
        "over all weights, bands reach from the lowest to the highest layer. Right: the same over "
        "the whole training, layer by layer; the frequency is the moving average of oscillations "
        f"with momentum 0.01. Embedding tables are left out. {subject.origin()}",
        {"layers": [entry.to_dict() for entry in found]},
        draw_oscillation,
    )


def _latents(subject: Subject) -> Entry:
    last = latent_weights(subject.retrained.student)
    return Entry(
        "latents",
        "Latent weights and their thresholds",
        "Left: how far latent weights are from the nearest threshold at which their code changes, "
        "in units of the scale of their row, before and after training; the last bin is open. "
        "Weights that oscillate gather at 0. Right: the share of every code after training. "
        f"Embedding tables are left out. {subject.origin()}",
        {
            "edges": list(EDGES),
            "first": [entry.to_dict() for entry in subject.retrained.first],
            "last": [entry.to_dict() for entry in last],
        },
        draw_latents,
    )


def _count(data: list[dict[str, torch.Tensor]]) -> int:
    return sum(len(next(iter(batch.values()))) for batch in data)


ENTRIES: dict[str, Callable[[Subject], Entry]] = {
    "blocks": _blocks,
    "activations": _activations,
    "stages": _stages,
    "sharpness": _sharpness,
    "surface": _surface,
    "oscillation": _oscillation,
    "latents": _latents,
}
"""Analyses by name, in the order in which they are made."""
