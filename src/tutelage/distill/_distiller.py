"""One step of quantization-aware distillation, as a function of (batch, stage)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .._prepare import prepared
from ..errors import IncompatibleTeacherError, RecipeError, UnsupportedModelError
from ..intervention import NO_INTERVENTION, Intervention, intervention
from ..quantizers import BaseQuantizer
from ..sites import Signals, Site, Tap
from . import losses as _losses
from ._context import LossValue, StepContext
from ._distributed import wrapped_forward
from ._fit import refuse_compiled, refuse_other_shape, refuse_shared
from ._items import ItemReader, ModelInputs, read_inputs, refuse_other_items
from ._sample_ids import SAMPLE_IDS
from ._teacher import LiveTeacher, TeacherSource, prediction
from .losses import Losses, WeightedTerm

__all__ = ["Distiller", "StepOutput"]


@dataclass(frozen=True)
class StepOutput:
    """What one step gives.

    Attributes:
        loss: Weighted sum of the shares, 0-dim, with gradient.
        terms: Unweighted mean of every term by name, over the items of this batch.
        shares: Unweighted share of this batch in every term of the optimizer step: the sum over
            its items divided by the items of the whole step; equal to ``terms`` unless ``counts``
            were given.
        values: Every term as (sum, count).
        student_logits: (*positions, classes), with gradient; the last hidden state of a model
            without logits.
        teacher_logits: The teacher's, of the same shape.
    """

    loss: Float[Tensor, ""]
    terms: Mapping[str, Tensor]
    shares: Mapping[str, Tensor]
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
            UnsupportedModelError: The student was not prepared, is frozen, or one of the two is
                what ``torch.compile`` returned.
            IncompatibleTeacherError: Shapes differ, or parameters are shared.
            SiteError: A loss term needs a signal that is out of reach.
            RecipeError: The teacher was stored without padding, and padding counts.
        """
        refuse_compiled(
            student, "pass the student itself here, and what was returned as step(model=...)"
        )
        state = prepared(student)
        if state is None:
            raise UnsupportedModelError(
                "the student is not prepared; call tutelage.prepare(model, scheme) first."
            )
        model = teacher.model if isinstance(teacher, LiveTeacher) else teacher
        if isinstance(model, nn.Module):
            refuse_shared(student, model)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            raise UnsupportedModelError(
                "no parameter of the student requires a gradient (a copy of a teacher in use is "
                "frozen as it is); call student.requires_grad_(True)."
            )
        if isinstance(teacher, nn.Module):
            teacher = LiveTeacher(teacher)
        self.student = student
        self.teacher: TeacherSource = teacher
        self._sites = state.sites
        self.losses = (losses if losses is not None else _losses.default()).fitted(self._sites)
        self._read = ItemReader(teacher, self._sites)
        refuse_other_shape(self._sites.shape(), teacher.sites.shape())
        if getattr(teacher, "drops_padding", False):
            self.refuse_dropped_padding()

    def check(self, stage: str) -> None:
        """Refuses a stage that the student cannot have, before any step is made.

        Args:
            stage: Name of the stage.

        Raises:
            SiteError: A signal that the stage or its loss terms need is out of reach.
            RecipeError: The stage is unknown or would leave the attention without gradient.
        """
        replaced = self._replaced(intervention(stage)) or None
        sites = _required(self.losses.at(stage, self._sites))
        Tap(self.student, self._sites, sites, replace=replaced, with_=lambda own, _: own)

    def wanted(self, stage: str) -> set[Site]:
        """Returns which of the teacher's signals a step in a stage needs.

        Args:
            stage: Name of the stage.

        Raises:
            RecipeError: The stage is unknown or would leave the attention without gradient.
        """
        required = _required(self.losses.at(stage, self._sites))
        return required.union(self._replaced(intervention(stage)))

    def model_inputs(self, batch: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
        """Returns what teacher and student are called with, and the ids of samples.

        Args:
            batch: As ``step`` takes it.
        """
        given, keys, _ = self._take(batch, ())
        return given.inputs, keys

    def refuse_dropped_padding(self) -> None:
        """Refuses a training in which padded positions count.

        Raises:
            RecipeError: A loss runs over all positions, or one scale covers several tokens.
        """
        terms = [w.term.name for w in self.losses.terms if not getattr(w.term, "masked", True)]
        shared = [
            name
            for name, module in self.student.named_modules()
            if isinstance(module, BaseQuantizer)
            and module.granularity == "tensor"
            and not name.endswith("weight_quantizer")
        ]
        if terms or shared:
            what = f"the loss {terms[0]!r} runs" if terms else f"a scale of {shared[0]!r} runs"
            raise RecipeError(
                f"{what} over padded positions, which a stored teacher without padding does not "
                "have; build it with padding='keep' from batches of one length."
            )

    def step(
        self,
        batch: Mapping[str, Any],
        stage: str = NO_INTERVENTION,
        *,
        progress: Tensor | None = None,
        model: nn.Module | None = None,
        counts: Mapping[str, Tensor | int] | None = None,
    ) -> StepOutput:
        """Runs teacher and student on a batch and compares them.

        Training and eval mode of the student are left as they are; the stage holds in both. No
        value is moved to the host. Under ``torch.autocast`` to bfloat16 teacher and student run in
        it; quantized products, softmax and losses are computed in float32 all the same.

        Args:
            batch: Keyword arguments of the student's forward; ``labels`` are used only by a loss
                term that asks for them, ``SAMPLE_IDS`` only by the teacher.
            stage: Name of the stage, see ``tutelage.intervention.stages``.
            progress: Part of training that is over, 0 to 1, a 0-dim tensor on the device.
            model: What is called in place of the student: its DDP wrapper, or what
                ``torch.compile`` returned. A student that went through ``fully_shard`` is called
                itself.
            counts: Number of items of every term in the whole optimizer step, of which this batch
                is a part, see ``counts``; by default those of this batch.

        Returns:
            Loss, terms and logits.

        Raises:
            IncompatibleTeacherError: The logits of the two differ in shape.
            DataError: The batch holds other items than were counted before the forward pass.
            UnsupportedModelError: The student recomputes activations with the reentrant form of
                gradient checkpointing, or autocast to float16 is on.
            RecipeError: The stage is unknown or would leave the attention without gradient.
        """
        active = intervention(stage)
        terms = self.losses.at(stage, self._sites)
        self._refuse_float16()
        given, keys, labels = self._take(batch, terms)
        sites = _required(terms)
        want = sites.union(self._replaced(active))
        teacher_logits, teacher = self.teacher.get(given.inputs, keys, want)
        tap = self._tap(sites, active, teacher, progress)
        model = self.student if model is None else model
        with tap, wrapped_forward(self.student, model, tap) as unwrap:
            output = unwrap(model(**given.inputs))
        student_logits, has_logits = prediction(output)
        if student_logits.shape != teacher_logits.shape:
            raise IncompatibleTeacherError(
                f"the student's logits have shape {tuple(student_logits.shape)}, the teacher's "
                f"{tuple(teacher_logits.shape)}; fine-tune the teacher for this task first."
            )
        context = StepContext(
            student=_float32(tap.signals()),
            teacher=_float32(teacher),
            student_logits=_full(student_logits),
            teacher_logits=_full(teacher_logits),
            has_logits=has_logits,
            token_mask=given.token_mask,
            labels=labels,
            stage=stage,
            progress=progress,
            decoder_mask=given.decoder_mask,
            token_ids=given.token_ids,
            sites=self._sites,
        )
        if counts is not None:
            refuse_other_items(self._read(given, keys, labels), context.items)
        with torch.autocast(self._device.type, enabled=False):
            values = {weighted.term.name: weighted.term(context) for weighted in terms}
        means = shares = {name: value.sum / value.count for name, value in values.items()}
        if counts is not None:
            shares = {name: value.sum / counts[name] for name, value in values.items()}
        loss = torch.stack([shares[w.term.name] * w.weight for w in terms]).sum()
        return StepOutput(loss, means, shares, values, student_logits, teacher_logits)

    def counts(
        self, batches: Iterable[Mapping[str, Any]], stage: str = NO_INTERVENTION
    ) -> dict[str, Tensor | int]:
        """Counts the items of every loss term in the micro-batches of one optimizer step.

        With them the gradients of ``step(batch, stage, counts=counts)``, added up over the
        batches, are those of one batch that holds all samples: a term is the sum over all items
        divided by their number, however unequal the parts. Nothing is moved to the host.

        Args:
            batches: The micro-batches, as ``step`` takes them.
            stage: Name of the stage.

        Returns:
            The number of items by name of the term: 0-dim integer tensors, or plain numbers.

        Raises:
            DataError: A batch holds no tensor.
            RecipeError: A loss term does not count.
            UnsupportedModelError: The predictions are neither per sample nor per token.
        """
        terms = self.losses.at(stage, self._sites)
        for weighted in terms:
            if not callable(getattr(weighted.term, "count", None)):
                raise RecipeError(
                    f"the loss term {weighted.term.name!r} cannot be split over micro-batches or "
                    "processes; give it a method count(items), see LossTerm."
                )
        totals: dict[str, Tensor | int] = {weighted.term.name: 0 for weighted in terms}
        for batch in batches:
            items = self._read(*self._take(batch, terms))
            for weighted in terms:
                name = weighted.term.name
                totals[name] = totals[name] + weighted.term.count(items)
        return totals

    def _take(
        self, batch: Mapping[str, Any], terms: tuple[WeightedTerm, ...]
    ) -> tuple[ModelInputs, Tensor | None, Tensor | None]:
        """Returns the model's inputs, the sample ids, and the labels where a term asks for them."""
        inputs = dict(batch)
        keys = inputs.pop(SAMPLE_IDS, None)
        given = read_inputs(inputs, self.student)
        wanted = any(weighted.term.needs_labels for weighted in terms)
        return given, keys, given.labels if wanted else None

    def _refuse_float16(self) -> None:
        device = self._device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise UnsupportedModelError(
                "autocast to float16 loses small gradients without a GradScaler, which a "
                "distillation step does not use; take torch.bfloat16."
            )

    def _replaced(self, active: Intervention | None) -> list[Site]:
        """Returns the site that a stage replaces in every block.

        Cross-attention keeps its value path in every stage: it is the decoder's only way to the
        encoder, which would learn nothing from the task were its context replaced.
        """
        if active is None:
            return []
        cut = active.site in ("context", "attention_output")
        return [
            "attention_map" if cut and block.kind == "cross" else active.site
            for block in self._sites.blocks
        ]

    @property
    def _device(self) -> torch.device:
        return next(self.student.parameters()).device

    def _tap(
        self,
        record: set[Site],
        active: Intervention | None,
        teacher: Signals,
        progress: Tensor | None,
    ) -> Tap:
        if active is None:
            return Tap(self.student, self._sites, record)
        stage, sites = active, self._replaced(active)
        found = {
            site: dict(zip(self._sites.at(site), teacher[site], strict=True)) for site in sites
        }

        def replacement(own: Tensor, index: int) -> Tensor:
            return stage(own, found[sites[index]][index], progress)

        return Tap(
            self.student,
            self._sites,
            record,
            replace=sites,
            with_=replacement,
            detach=[stage.detach if site == stage.site else ("query", "key") for site in sites],
        )


def _required(terms: Iterable[WeightedTerm]) -> set[Site]:
    return {site for weighted in terms for site in weighted.term.requires}


def _full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _float32(signals: Signals) -> Signals:
    return {site: tuple(_full(tensor) for tensor in found) for site, found in signals.items()}
