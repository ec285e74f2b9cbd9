"""Training arguments with defaults for quantization-aware distillation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

from ..errors import RecipeError

__all__ = ["QATArguments"]


@dataclass
class QATArguments(TrainingArguments):
    """``transformers.TrainingArguments`` with defaults that fit low-bit students.

    With ``bf16=True`` teacher and student run under autocast. Latent weights, optimizer state,
    quantized products, softmax and losses stay in float32.

    Attributes:
        learning_rate: 3e-4, larger than in fine-tuning: low-bit weights must move far.
        warmup_steps: A tenth of each of the two steps (intervention, then plain distillation).
        logging_nan_inf_filter: Off; it waits for the device at every step and hides NaN.
        qat_optimizer: ``"adamw"`` follows ``optim``; ``"bert_adam"`` is the published optimizer
            without bias correction, which clips every tensor on its own and not the whole gradient.
        ramp: Part of the training, 0 to 1, in which weights and activations go from full precision
            to quantized, linearly, see ``tutelage.nn.ramped``. Evaluation is always quantized.
        rate_by_magnitude: The learning rate of every quantized weight is multiplied by its mean
            magnitude at the start over 0.04, from 0.1 to 10 at the most: codes of small weights
            would change in a few steps where those of large ones hardly do.
        rate_cap: The learning rate of a quantized weight is at most this part of its mean
            magnitude; a higher ``learning_rate`` is lowered, with a warning. Needs
            ``rate_by_magnitude``. 0 for no limit.
        average: Part of the training, 0 to 1, over whose steps the latent weights are averaged: the
            last step ends at the mean of the weights after each of the last ``average`` of all
            steps. Steps with intervention are left out.
        dropout: Train the student with its dropout on, as the published code does. Off by default:
            the teacher's signals carry none, and what dropout adds is noise in every loss term.
    """

    learning_rate: float = field(default=3e-4)
    weight_decay: float = field(default=0.01)
    warmup_steps: float = field(default=0.1)
    logging_steps: float = field(default=10)
    logging_nan_inf_filter: bool = field(default=False)
    per_device_train_batch_size: int = field(default=32)
    per_device_eval_batch_size: int = field(default=64)
    qat_optimizer: Literal["adamw", "bert_adam"] = field(default="adamw")
    ramp: float = field(default=0.0)
    rate_by_magnitude: bool = field(default=False)
    rate_cap: float = field(default=0.0)
    average: float = field(default=0.0)
    dropout: bool = field(default=False)

    def __post_init__(self) -> None:
        """Completes and checks the settings."""
        if self.qat_optimizer not in ("adamw", "bert_adam"):
            raise RecipeError(
                f"qat_optimizer is {self.qat_optimizer!r}; use 'adamw' or 'bert_adam'."
            )
        for name in ("ramp", "average"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise RecipeError(f"{name} is {value!r}, a part of the training; use 0 to 1.")
        if not self.rate_cap >= 0:
            raise RecipeError(f"rate_cap is {self.rate_cap!r}; use a positive number, or 0.")
        if self.rate_cap and not self.rate_by_magnitude:
            raise RecipeError(
                "rate_cap is a part of the magnitude of every weight, and rate_by_magnitude is "
                "off; set it, or leave rate_cap out."
            )
        if self.qat_optimizer == "bert_adam":
            self.max_grad_norm = 0.0
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        super().__post_init__()
