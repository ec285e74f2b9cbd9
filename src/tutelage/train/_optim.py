"""The optimizer of the published code, and what happens between the two steps of a training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.optimization import get_scheduler

from ..errors import RecipeError

__all__ = ["BertAdam", "reset_state", "two_step_multiplier"]


class BertAdam(torch.optim.Optimizer):
    """Adam without bias correction, as TernaryBERT's and Teacher Intervention's code use it.

    Per tensor: clip the gradient to norm ``max_grad_norm``, then::

        m = b1 m + (1 - b1) g,    v = b2 v + (1 - b2) g^2
        w = w - lr (m / (sqrt(v) + eps) + weight_decay w)

    Without bias correction the first steps are 3 to 6 times as large as AdamW's at one rate. The
    published code also keeps a learning-rate schedule per tensor; here the schedule follows the
    global step.
    """

    capturable = True
    """Its update is made of tensors alone, so that a CUDA graph can hold it."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 2e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_grad_norm: float = 1.0,
    ) -> None:
        """Sets the constants.

        Args:
            params: Parameters or groups.
            lr: Learning rate.
            betas: Decay of the two moments.
            eps: Added to the root of the second moment.
            weight_decay: Decoupled weight decay.
            max_grad_norm: Largest norm of the gradient of one tensor.
        """
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "max_grad_norm": max_grad_norm,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates every parameter that has a gradient.

        Args:
            closure: Recomputes the loss, or ``None``.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        grad = parameter.grad
        assert grad is not None
        factor = (group["max_grad_norm"] / (grad.norm() + 1e-6)).clamp(max=1.0)
        grad = grad * factor
        b1, b2 = group["betas"]
        first, second = state["exp_avg"], state["exp_avg_sq"]
        first.mul_(b1).add_(grad, alpha=1 - b1)
        second.mul_(b2).addcmul_(grad, grad, value=1 - b2)
        update = first / second.sqrt().add_(group["eps"])
        if group["weight_decay"]:
            update.add_(parameter, alpha=group["weight_decay"])
        parameter.sub_(update * group["lr"])


@torch.no_grad()
def reset_state(optimizer: torch.optim.Optimizer) -> None:
    """Zeroes the state of an optimizer in place, as if it were new.

    Args:
        optimizer: Any optimizer whose fresh state is zero, such as Adam's.
    """
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def two_step_multiplier(
    arguments: TrainingArguments, first: int, total: int
) -> Callable[[int], float]:
    """Returns the factor of the learning rate at each global step.

    Each of the two steps has a warm-up and a decay of its own.

    Args:
        arguments: Say ``lr_scheduler_type`` and ``warmup_steps``.
        first: Length of the first step, 0 for none.
        total: Length of the training.

    Raises:
        RecipeError: ``lr_scheduler_type`` depends on more than the step.
    """
    before, after = _multiplier(arguments, first), _multiplier(arguments, total - first)
    return lambda step: before(step) if step < first else after(step - first)


def _multiplier(arguments: TrainingArguments, steps: int) -> Callable[[int], float]:
    if steps == 0:
        return lambda step: 0.0
    made = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0),
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=cast("Any", arguments.lr_scheduler_kwargs),
    )
    lambdas = getattr(made, "lr_lambdas", None)
    if not lambdas:
        raise RecipeError(
            f"lr_scheduler_type {arguments.lr_scheduler_type!r} depends on more than the step; "
            "use 'linear', 'cosine' or 'constant_with_warmup'."
        )
    return cast("Callable[[int], float]", lambdas[0])
