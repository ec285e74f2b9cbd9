"""What makes a run the run it is: a checkpoint remembers it, and a resumed run must match."""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from ..distill import LossTerm
from ..distill.losses import Losses
from ..intervention import Schedule
from ..scheme import Scheme

__all__ = ["run_settings"]


def run_settings(
    arguments: TrainingArguments,
    scheme: Scheme,
    losses: Losses,
    schedule: Schedule | None,
    steps: int,
    precision: str,
) -> dict[str, Any]:
    """Returns the settings of a run as plain data, as far as they are known.

    Args:
        arguments: The training arguments.
        scheme: The student's scheme.
        losses: The loss terms.
        schedule: When the teacher intervenes; ``None`` while it is not known.
        steps: Length of the training; 0 while it is not known.
        precision: Of the forward pass, as accelerate names it.
    """
    known: dict[str, Any] = {
        "scheme": scheme.model_dump(mode="json"),
        "losses": [(_describe(w.term), w.weight) for w in losses.terms],
        "local": losses.local,
        "optimizer": f"{getattr(arguments, 'qat_optimizer', 'adamw')}/{arguments.optim}",
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": str(arguments.lr_scheduler_type),
        "lr_scheduler_kwargs": str(arguments.lr_scheduler_kwargs),
        "warmup_steps": arguments.warmup_steps,
        "weight_decay": arguments.weight_decay,
        "max_grad_norm": arguments.max_grad_norm,
        "adam": [arguments.adam_beta1, arguments.adam_beta2, arguments.adam_epsilon],
        "batch_size": arguments.per_device_train_batch_size,
        "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
        "processes": arguments.world_size,
        "dropout": getattr(arguments, "dropout", True),
        "ramp": getattr(arguments, "ramp", 0.0),
        "average": getattr(arguments, "average", 0.0),
        "rate_cap": getattr(arguments, "rate_cap", 0.0),
        "rate_by_magnitude": getattr(arguments, "rate_by_magnitude", False),
        "order": str(arguments.train_sampling_strategy),
        "seed": arguments.seed,
        "precision": precision,
    }
    if schedule is not None:
        known["schedule"] = repr(schedule)
    if steps > 0:
        known["max_steps"] = steps
    return known


def _describe(term: LossTerm) -> str:
    plain = (bool, int, float, str, tuple)
    settings = (f"{k}={v!r}" for k, v in sorted(vars(term).items()) if isinstance(v, plain))
    return f"{type(term).__name__}({', '.join(settings)})"
