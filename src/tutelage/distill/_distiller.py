"""One step of quantization-aware distillation, as a function of (batch, stage)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._prepare import prepared
from ..errors import IncompatibleTeacherError, UnsupportedModelError
from ..intervention import NO_INTERVENTION, Intervention, intervention
from ..sites import Signals, Site, Tap
from . import losses as _losses
from ._context import LossValue, StepContext
from ._teacher import LiveTeacher, TeacherSource, prediction
from .losses import Losses

__all__ = ["SAMPLE_IDS", "Distiller", "StepOutput"]

SAMPLE_IDS = "tutelage_sample_ids"
"""Reserved key of a batch: ids of its samples, for a cached teacher."""


@dataclass(frozen=True)
class StepOutput:
    """What one step gives.

    Attributes:
        loss: Weighted sum of the terms, 0-dim, with gradient.
        terms: Unweighted mean of every term by name.
        values: Every term as (sum, count).
        student_logits: (*positions, classes), with gradient; the last hidden state of a model
            without logits.
        teacher_logits: The teacher's, of the same shape.
    """

    loss: Float[Tensor, ""]
    terms: Mapping[str, Tensor]
    values: Mapping[str, LossValue]
    student_logits: Tensor
    teacher_logits: Tensor


class Distiller:
    """Computes the loss of a student under a teacher, with or without intervention.

    Outside ``step`` student and teacher are plain models: nothing is left on them.

    Attributes:
        student: The prepared model.
        teacher: Where the teacher's signals come from.
        losses: The loss terms.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module | TeacherSource, losses: Losses | None = None
    ) -> None:
        """Checks that student and teacher fit.

        Args:
            student: A model made by ``tutelage.prepare``.
            teacher: The full-precision model of the same shape, or another source of its signals.
                A model is set to eval mode and its gradients are switched off.
            losses: ``losses.default()`` if ``None``.

        Raises:
            UnsupportedModelError: The student was not prepared, or is frozen.
            IncompatibleTeacherError: Shapes differ, or parameters are shared.
        """
        state = prepared(student)
        if state is None:
            raise UnsupportedModelError(
                "the student is not prepared; call tutelage.prepare(model, scheme) first."
            )
        model = teacher.model if isinstance(teacher, LiveTeacher) else teacher
        if isinstance(model, nn.Module):
            _refuse_shared(student, model)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise UnsupportedModelError(
                "no parameter of the student requires a gradient (a copy of a teacher in use is "
                "frozen as it is); call student.requires_grad_(True)."
            )
        if isinstance(teacher, nn.Module):
            teacher = LiveTeacher(teacher)
        self.student = student
        self.teacher: TeacherSource = teacher
        self.losses = losses if losses is not None else _losses.default()
        self._sites = state.sites
        _refuse_other_shape(self._sites.shape(), teacher.sites.shape())

    def step(
        self,
        batch: Mapping[str, Any],
        stage: str = NO_INTERVENTION,
        *,
        progress: Tensor | None = None,
        model: nn.Module | None = None,
    ) -> StepOutput:
        """Runs teacher and student on a batch and compares them.

        Training and eval mode of the student are left as they are; the stage holds in both. No
        value is moved to the host.

        Args:
            batch: Keyword arguments of the student's forward; ``labels`` are used only by a loss
                term that asks for them, ``SAMPLE_IDS`` only by the teacher.
            stage: Name of the stage, see ``tutelage.intervention.stages``.
            progress: Part of training that is over, 0 to 1, a 0-dim tensor on the device.
            model: What is called in place of the student, such as its DDP wrapper.

        Returns:
            Loss, terms and logits.

        Raises:
            IncompatibleTeacherError: The logits of the two differ in shape.
            UnsupportedModelError: The student recomputes activations in the backward pass, or
                autocast is on.
            RecipeError: The stage is unknown or would leave the attention without gradient.
        """
        active = intervention(stage)
        terms = self.losses.at(stage)
        self._refuse_checkpointing()
        self._refuse_autocast()
        inputs = dict(batch)
        keys, labels = inputs.pop(SAMPLE_IDS, None), inputs.pop("labels", None)
        sites: set[Site] = {site for weighted in terms for site in weighted.term.requires}
        want = sites | ({active.site} if active else set())
        teacher_logits, teacher = self.teacher.get(inputs, keys, want)
        with self._tap(sites, active, teacher, progress) as tap:
            output = (model or self.student)(**inputs)
        student_logits, has_logits = prediction(output)
        if student_logits.shape != teacher_logits.shape:
            raise IncompatibleTeacherError(
                f"the student's logits have shape {tuple(student_logits.shape)}, the teacher's "
                f"{tuple(teacher_logits.shape)}; fine-tune the teacher for this task first."
            )
        context = StepContext(
            student=tap.signals(),
            teacher=teacher,
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            has_logits=has_logits,
            token_mask=_token_mask(inputs),
            labels=labels if any(weighted.term.needs_labels for weighted in terms) else None,
            stage=stage,
            progress=progress,
        )
        values = {weighted.term.name: weighted.term(context) for weighted in terms}
        means = {name: value.sum / value.count for name, value in values.items()}
        loss = torch.stack([means[w.term.name] * w.weight for w in terms]).sum()
        return StepOutput(loss, means, values, student_logits, teacher_logits)

    def _refuse_checkpointing(self) -> None:
        # The recomputation would run without the intervention and its stop-gradients.
        if any(getattr(m, "gradient_checkpointing", False) for m in self.student.modules()):
            raise UnsupportedModelError(
                "gradient checkpointing is not supported in a distillation step; call "
                "student.gradient_checkpointing_disable()."
            )

    def _refuse_autocast(self) -> None:
        device = next(self.student.parameters()).device
        if torch.is_autocast_enabled(device.type):
            raise UnsupportedModelError(
                "a distillation step runs in float32: autocast would round integer products; "
                "leave the autocast context."
            )

    def _tap(
        self,
        record: set[Site],
        active: Intervention | None,
        teacher: Signals,
        progress: Tensor | None,
    ) -> Tap:
        if active is None:
            return Tap(self.student, self._sites, record)
        signal, stage = teacher[active.site], active

        def replacement(own: Tensor, index: int) -> Tensor:
            return stage(own, signal[index], progress)

        return Tap(
            self.student,
            self._sites,
            record,
            replace=active.site,
            with_=replacement,
            detach=active.detach,
        )


def _token_mask(inputs: Mapping[str, Any]) -> Tensor | None:
    mask = inputs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _refuse_shared(student: nn.Module, teacher: nn.Module) -> None:
    own = {id(p): name for name, p in student.named_parameters()}
    for parameter in teacher.parameters():
        if id(parameter) in own:
            raise IncompatibleTeacherError(
                f"student and teacher share the parameter {own[id(parameter)]!r}; prepare a copy: "
                "student = tutelage.prepare(copy.deepcopy(teacher), scheme)."
            )


def _refuse_other_shape(
    student: tuple[tuple[int, int, int], ...], teacher: tuple[tuple[int, int, int], ...]
) -> None:
    if len(student) != len(teacher):
        raise IncompatibleTeacherError(
            f"the student has {len(student)} attention blocks, the teacher {len(teacher)}; they "
            "must be of the same depth."
        )
    for index, (own, other) in enumerate(zip(student, teacher, strict=True)):
        if own != other:
            raise IncompatibleTeacherError(
                f"block {index} of the student has (heads, width of a head, hidden width) {own}, "
                f"the teacher's {other}; they must be of the same shape."
            )
