"""The two steps of a training: their lengths, optimizer states and learning rates."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from ..errors import RecipeError
from ..intervention import Schedule
from ._average import TailAverage
from ._lengths import LengthSampler, lengths_of
from ._optim import BertAdam, reset_state, two_step_multiplier
from ._rates import cap_rates, scale_rates
from ._storing import StoringTrainer

__all__ = ["TwoStepTrainer"]

_DEFAULT_STEPS = 60


class _StepBoundary(TrainerCallback):
    """Gives the second step a fresh optimizer, and every epoch its order, as the step says."""

    def __init__(self, trainer: TwoStepTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Where batches are skipped, accelerate's own call does not reach the sampler.
        if self._trainer._lengths is not None:
            self._trainer._lengths.set_epoch(int((state.epoch or 0.0) + 1e-6))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = self._trainer.active_schedule.steps
        if 0 < steps == state.global_step:
            reset_state(cast("Any", self._trainer.optimizer))


class TwoStepTrainer(StoringTrainer):
    """Trains in two steps, the first of ``schedule.steps``; each has a warm-up and a decay.

    Attributes:
        schedule: What was asked for; ``None`` is ``Schedule.gradual(min(60, max_steps // 3))``.
    """

    def __init__(self, *args: Any, schedule: Schedule | None, **kwargs: Any) -> None:
        """Keeps the schedule.

        Args:
            *args: Passed to ``Trainer``.
            schedule: When the teacher intervenes.
            **kwargs: Passed to ``Trainer``.
        """
        self._lengths: LengthSampler | None = None
        self.schedule = schedule
        self._active_schedule = schedule
        super().__init__(*args, **kwargs)
        self.add_callback(_StepBoundary(self))
        average = getattr(self.args, "average", 0.0)
        if average:
            self.add_callback(TailAverage(self, average))

    @property
    def active_schedule(self) -> Schedule:
        """The schedule of the present run.

        Raises:
            RecipeError: None was given and training has not begun.
        """
        if self._active_schedule is None:
            raise RecipeError("the default schedule is known when training begins.")
        return self._active_schedule

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Makes the optimizer as the arguments ask for it, see ``QATArguments``."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        if getattr(self.args, "qat_optimizer", "adamw") == "bert_adam":
            constants = {
                "lr": self.args.learning_rate,
                "betas": (self.args.adam_beta1, self.args.adam_beta2),
                "eps": 1e-6,
            }
            self.optimizer_cls_and_kwargs = (BertAdam, constants)
        optimizer = super().create_optimizer(model)
        if getattr(self.args, "rate_by_magnitude", False):
            scale_rates(optimizer, cast("nn.Module", self.model if model is None else model))
        cap = getattr(self.args, "rate_cap", 0.0)
        if cap:
            cap_rates(optimizer, self.args.learning_rate, cap)
        return optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        dataset = self.train_dataset if train_dataset is None else train_dataset
        lengths = lengths_of(dataset) if hasattr(dataset, "__len__") else None
        if lengths is None:
            raise RecipeError(
                "train_sampling_strategy is 'group_by_length', and the training data have no "
                "'input_ids' or no length; leave it out."
            )
        count = self.args.gradient_accumulation_steps * max(self.args.world_size, 1)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._lengths = LengthSampler(lengths, self.args.train_batch_size * count, seed)
        return self._lengths

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
