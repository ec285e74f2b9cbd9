"""The average of the latent weights over the end of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

from ._sharded import shard_of

if TYPE_CHECKING:
    from ._two_steps import TwoStepTrainer

__all__ = ["TailAverage", "averaged_steps"]

_AVERAGE = "tutelage_average"


def averaged_steps(average: float, length: int, first: int) -> int:
    """Returns over how many of the last steps the weights are averaged; 0 for none.

    Args:
        average: Part of the training.
        length: Steps of the training.
        first: Steps that are not averaged: those with intervention.
    """
    return min(round(average * length), length - first)


class TailAverage(TrainerCallback):
    """Ends a training at the mean of the weights after each of its last steps.

    Stochastic weight averaging (Izmailov et al., arXiv 1803.05407, equation 1) of the latent
    weights. The mean is kept in the state of the optimizer, so that checkpoints hold it.
    """

    def __init__(self, trainer: TwoStepTrainer, average: float) -> None:
        """Keeps what is averaged.

        Args:
            trainer: Whose weights.
            average: Over which part of the training.
        """
        self._trainer = trainer
        self._average = average

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Takes the weights into the mean; after the last step they become the mean."""
        first = self._trainer.active_schedule.steps
        steps = averaged_steps(self._average, state.max_steps, first)
        done = state.global_step + 1
        count = done - (state.max_steps - steps)
        # Of a single step the weights are their own mean.
        if count < 1 or steps < 2:
            return
        optimizer = cast("torch.optim.Optimizer", self._trainer.optimizer)
        every = [weight for group in optimizer.param_groups for weight in group["params"]]
        # To an optimizer a weight with a state has had a gradient; others are what they were.
        trained = [
            (weight.detach(), optimizer.state[weight])
            for weight in every
            if weight.grad is not None or optimizer.state.get(weight)
        ]
        for weight, values in trained:
            values.setdefault(_AVERAGE, weight.clone())
        # A sharded weight is averaged shard by shard.
        weights = [shard_of(weight) for weight, _ in trained]
        means = [shard_of(values[_AVERAGE]) for _, values in trained]
        torch._foreach_lerp_(means, weights, 1.0 / count)
        if done == state.max_steps:
            torch._foreach_copy_(weights, means)
            for _, values in trained:
                del values[_AVERAGE]
