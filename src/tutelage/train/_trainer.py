"""The Hugging Face trainer of students."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_utils import TrainOutput

from .._prepare import prepared
from ..distill import SAMPLE_IDS, CachedTeacher, Distiller, LiveTeacher, TeacherSource, TrainStep
from ..distill.losses import Losses
from ..errors import CheckpointError, NonFiniteLossError
from ..intervention import Schedule
from ..nn import ramped
from . import _checkpoint, _limits, _sharded
from ._arguments import QATArguments
from ._graphed import GraphedSteps
from ._settings import run_settings
from ._two_steps import TwoStepTrainer

__all__ = ["QATTrainer"]


class QATTrainer(TwoStepTrainer):
    """Trains a student under a teacher with ``transformers.Trainer``'s loop.

    Training has two steps. In the first, of ``schedule.steps`` steps, the teacher intervenes; the
    second is plain quantization-aware distillation with a fresh optimizer state. Each has its own
    warm-up and decay. Everything follows from the global step, so that a resumed run equals an
    uninterrupted one. Evaluation never intervenes: ``eval_loss`` is the student's own task loss.

    Attributes:
        distiller: Computes the loss of a step.
        schedule: What was asked for; ``None`` is ``Schedule.gradual(min(60, max_steps // 3))``.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: nn.Module | TeacherSource,
        args: TrainingArguments | None = None,
        *,
        schedule: Schedule | None = None,
        losses: Losses | None = None,
        graph: bool | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        data_collator: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., dict[str, float]] | None = None,
        callbacks: list[Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Sets up training.

        Args:
            student: A model made by ``tutelage.prepare``.
            teacher: The full-precision model, or another source of its signals.
            args: ``QATArguments``; plain ``TrainingArguments`` are taken as they are.
            schedule: When the teacher intervenes.
            losses: Loss terms, ``tutelage.losses.default()`` if ``None``.
            graph: Whether steps run as CUDA graphs, see ``GraphedTrainStep``. ``None`` takes them
                where they work and warns once where, on a CUDA device, they do not; ``True``
                insists.
            train_dataset: As in ``Trainer``.
            eval_dataset: As in ``Trainer``.
            data_collator: As in ``Trainer``.
            processing_class: Tokenizer; stored with the model.
            compute_metrics: As in ``Trainer``.
            callbacks: As in ``Trainer``.
            **kwargs: Passed to ``Trainer``.

        Raises:
            UnsupportedModelError: The student was not prepared, or float16, or a kind of
                parallelism that does not fit was asked for.
            IncompatibleTeacherError: Teacher and student do not fit.
            RecipeError: Several processes, and a setting of DDP under which they would fail.
        """
        self.distiller = Distiller(student, teacher, losses)
        args = args if args is not None else QATArguments()
        _limits.check_ddp(args)
        super().__init__(
            model=student,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            schedule=schedule,
            **kwargs,
        )
        self._unsharded: _sharded.Unsharded | None = None
        if self.is_fsdp_enabled:
            _sharded.check_plugin(self.accelerator.state.fsdp_plugin, student)
            self._unsharded = _sharded.Unsharded(student)
        _limits.check_parallelism(self)
        _limits.check_precision(self.args, self.accelerator.mixed_precision)
        if isinstance(self.distiller.teacher, LiveTeacher):
            self.distiller.teacher.model.to(self.args.device)
        # Otherwise transformers multiplies eval_loss by the number of processes.
        self.model_accepts_loss_kwargs = False
        self._step = TrainStep(self.distiller, None)
        self._graphs = GraphedSteps(self, graph)
        self._parts: list[Any] = []
        self._counts: Mapping[str, Tensor | int] | None = None
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains, or goes on from a checkpoint.

        Args:
            resume_from_checkpoint: ``True`` for the newest complete checkpoint in the output
                folder, or the folder of one.
            trial: As in ``Trainer.train``.
            ignore_keys_for_eval: As in ``Trainer.train``.

        Returns:
            As ``Trainer.train``.

        Raises:
            CheckpointError: There is no complete checkpoint, or it belongs to another run.
            NonFiniteLossError: The loss became NaN or infinite.
        """
        self._active_schedule = self.schedule
        self._graphs.begin()
        if resume_from_checkpoint is True:
            folder = Path(cast("str", self.args.output_dir))
            found = _checkpoint.latest_checkpoint(folder)
            if found is None:
                raise CheckpointError(
                    f"there is no complete checkpoint in {folder}; train without "
                    "resume_from_checkpoint."
                )
            resume_from_checkpoint = str(found)
        return super().train(resume_from_checkpoint or None, trial, ignore_keys_for_eval)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Makes the learning-rate schedule and refuses stages that the student cannot have.

        Args:
            num_training_steps: Length of the run.
            optimizer: As in ``Trainer``.

        Raises:
            RecipeError: As ``TwoStepTrainer.create_scheduler``, or a stage is unknown, or graphs
                were asked for and cannot be had.
            SiteError: A stage needs a signal that is out of reach.
        """
        made = super().create_scheduler(num_training_steps, optimizer)
        self._graphs.check()
        for stage in self.active_schedule.stages:
            self.distiller.check(stage)
        return made

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Fetches the micro-batches of an optimizer step; see ``Trainer.get_batch_samples``.

        All are known before the first of them runs, so that their items can be counted.
        """
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._parts = list(batches)
        return batches, items

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Runs forward and backward of one micro-batch under the stage of the global step.

        The gradients of a step are those of one batch that holds the samples of all its
        micro-batches and processes, however unequal their lengths; see ``TrainStep``.

        Args:
            model: The wrapped student.
            inputs: The batch.
            num_items_in_batch: Not used; every loss term counts its own items.

        Returns:
            The detached share of the loss: the sum over micro-batches, averaged over processes, is
            the loss of the step.
        """
        # Transformers differ between the two modes in their dropout alone.
        model.train(getattr(self.args, "dropout", True))
        step, length = self.state.global_step, max(self.state.max_steps, 1)
        stage = self.active_schedule(step)
        parts = self._parts if any(inputs is part for part in self._parts) else [inputs]
        begins = inputs is parts[0]
        progress = torch.full((), step / length, device=self.args.device)
        gate = self._gate(step, length)
        with contextlib.nullcontext() if gate is None else ramped(model, gate):
            terms = self._graphs.run(self._prepare_inputs(inputs), stage, progress)
            if terms is None:
                terms = self._eager(model, inputs, parts, stage, progress)
        for name, value in terms.items():
            total, steps = self._sums.get(name, (torch.zeros_like(value), 0))
            self._sums[name] = (total + value, steps + begins)
        return terms["loss"]

    def _gate(self, step: int, length: int) -> Tensor | None:
        """Returns how far the student is quantized at a step, ``None`` once it is so altogether."""
        ramp = getattr(self.args, "ramp", 0.0) * length
        if step >= ramp:
            return None
        return torch.full((), (step + 1) / (ramp + 1), device=self.args.device)

    def _eager(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        parts: list[Any],
        stage: str,
        progress: Tensor,
    ) -> dict[str, Tensor]:
        # Accelerate wraps the student alone in autocast; the teacher is to run in it, too.
        with self.accelerator.autocast():
            if inputs is parts[0]:
                here = [self._prepare_inputs(part) for part in parts]
                self._counts = self._step.counts(here, stage, model=model)
            return self._step.accumulate(
                self._prepare_inputs(inputs),
                stage,
                progress=progress,
                model=model,
                backward=self._backward,
                counts=self._counts,
            )

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # A graph holds the whole step: its gradients are clipped, used and gone.
        return self._graphs.grad_norm if self._graphs.done else super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if self._graphs.done:
            return self._graphs.grad_norm
        return super()._get_grad_norm(model, grad_norm=grad_norm)

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(loss.device.type, enabled=False):
            self.accelerator.backward(loss)

    def prediction_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluates a batch without intervention; see ``Trainer.prediction_step``."""
        inputs = {key: value for key, value in inputs.items() if key != SAMPLE_IDS}
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = cast("list[str]", self._signature_columns)
        if SAMPLE_IDS not in columns:
            columns.append(SAMPLE_IDS)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the mean of every loss term since the last entry, and stops at NaN.

        Args:
            logs: The values.
            start_time: As in ``Trainer``.

        Raises:
            NonFiniteLossError: The loss became NaN or infinite.
        """
        # The processes of a run meet here, so only entries that all of them write may come in.
        if self.args.world_size == 1 or logs.keys() & {"loss", "train_loss"}:
            means = self._finite_means()
            if "loss" in logs and means:
                logs.update({f"loss_{n}": m for n, m in means.items() if n != "loss"})
                logs["intervention"] = float(self.state.global_step <= self.active_schedule.steps)
                self._sums = {}
        super().log(logs, start_time)

    def _finite_means(self) -> dict[str, float]:
        """Returns the mean of every term since the last entry, over all processes."""
        if isinstance(self.distiller.teacher, CachedTeacher):
            self.distiller.teacher.check()
        if not self._sums:
            return {}
        found = torch.stack([total / steps for total, steps in self._sums.values()])
        if self.args.world_size > 1:
            found = cast("Tensor", self.accelerator.reduce(found, reduction="mean"))
        means = dict(zip(self._sums, found.tolist(), strict=True))
        broken = [name for name, mean in means.items() if not math.isfinite(mean)]
        if broken:
            self._sums = {}
            raise NonFiniteLossError(
                f"the loss ({', '.join(broken)}) became NaN or infinite before step "
                f"{self.state.global_step + 1}; lower the learning rate (now "
                f"{self.args.learning_rate:g}) or check the data."
            )
        return means

    def _run_settings(self) -> dict[str, Any]:
        state = prepared(cast("nn.Module", self.model))
        assert state is not None
        steps = self.state.max_steps
        return run_settings(
            self.args,
            state.scheme,
            self.distiller.losses,
            self._active_schedule,
            steps,
            self.accelerator.mixed_precision,
        )
