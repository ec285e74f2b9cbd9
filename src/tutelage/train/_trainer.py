"""The Hugging Face trainer of students."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from .._prepare import prepared
from ..distill import SAMPLE_IDS, Distiller, LiveTeacher, TeacherSource, TrainStep
from ..distill.losses import Losses
from ..errors import CheckpointError, NonFiniteLossError, RecipeError
from ..intervention import Schedule
from . import _checkpoint, _limits, _sharded
from ._arguments import QATArguments
from ._optim import BertAdam, reset_state, two_step_multiplier
from ._settings import run_settings
from ._storing import StoringTrainer

__all__ = ["QATTrainer"]

_DEFAULT_STEPS = 60


class _StepBoundary(TrainerCallback):
    """Gives the second step a fresh optimizer; decided from the global step alone."""

    def __init__(self, trainer: QATTrainer) -> None:
        self._trainer = trainer

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = self._trainer.active_schedule.steps
        if 0 < steps == state.global_step:
            reset_state(cast("Any", self._trainer.optimizer))


class QATTrainer(StoringTrainer):
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
        self.schedule = schedule
        self._active_schedule = schedule
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
        self.add_callback(_StepBoundary(self))
        self._step = TrainStep(self.distiller, None)
        self._parts: list[Any] = []
        self._counts: Mapping[str, Tensor | int] | None = None
        self._sums: dict[str, tuple[Tensor, int]] = {}

    @property
    def active_schedule(self) -> Schedule:
        """The schedule of the present run.

        Raises:
            RecipeError: None was given and training has not begun.
        """
        if self._active_schedule is None:
            raise RecipeError("the default schedule is known when training begins.")
        return self._active_schedule

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
        micro-batches and processes, however unequal their lengths.

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
        # Accelerate wraps the student alone in autocast; the teacher is to run in it, too.
        with self.accelerator.autocast():
            if begins:
                here = [self._prepare_inputs(part) for part in parts]
                self._counts = self._step.counts(here, stage, model=model)
            terms = self._step.accumulate(
                self._prepare_inputs(inputs),
                stage,
                progress=torch.full((), step / length, device=self.args.device),
                model=model,
                backward=self._backward,
                counts=self._counts,
            )
        for name, value in terms.items():
            total, steps = self._sums.get(name, (torch.zeros_like(value), 0))
            self._sums[name] = (total + value, steps + begins)
        return terms["loss"]

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

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Makes the optimizer; the published one where the arguments ask for it."""
        if getattr(self.args, "qat_optimizer", "adamw") == "bert_adam":
            constants = {
                "lr": self.args.learning_rate,
                "betas": (self.args.adam_beta1, self.args.adam_beta2),
                "eps": 1e-6,
            }
            self.optimizer_cls_and_kwargs = (BertAdam, constants)
        return super().create_optimizer(model)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Returns the parameters with weight decay; those of quantizers have none."""
        names = super().get_decay_parameter_names(cast("PreTrainedModel", model))
        return [name for name in names if "_quantizer." not in name]

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Makes the learning-rate schedule: warm-up and decay in each of the two steps.

        Args:
            num_training_steps: Length of the run.
            optimizer: As in ``Trainer``.

        Raises:
            RecipeError: The schedule is longer than the run, or ``lr_scheduler_type`` cannot be
                split in two.
        """
        if self.schedule is None:
            steps = min(_DEFAULT_STEPS, num_training_steps // 3)
            self._active_schedule = Schedule.gradual(steps)
        steps = self.active_schedule.steps
        if steps > num_training_steps:
            raise RecipeError(
                f"the schedule intervenes for {steps} steps, training has {num_training_steps}; "
                "shorten the schedule or raise max_steps."
            )
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer if optimizer is not None else cast("Any", self.optimizer),
                two_step_multiplier(self.args, steps, num_training_steps),
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

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
