"""Training arguments under which a student would not train, or would train wrongly."""

from __future__ import annotations

from transformers import Trainer, TrainingArguments

from ..errors import RecipeError, UnsupportedModelError

__all__ = ["check_ddp", "check_parallelism", "check_precision"]


def check_ddp(arguments: TrainingArguments) -> None:
    """Lets DDP look for the parameters without gradient, in training over several processes.

    Args:
        arguments: The training arguments; ``ddp_find_unused_parameters`` is set.

    Raises:
        RecipeError: They say otherwise.
    """
    if arguments.world_size == 1:
        return
    if arguments.ddp_find_unused_parameters is False or arguments.ddp_static_graph:
        raise RecipeError(
            "which parameters receive a gradient depends on the stage; leave out "
            "ddp_find_unused_parameters=False and ddp_static_graph=True."
        )
    arguments.ddp_find_unused_parameters = True


def check_parallelism(trainer: Trainer) -> None:
    """Refuses what splits more than samples and weights.

    Args:
        trainer: A trainer that has its accelerator.

    Raises:
        UnsupportedModelError: DeepSpeed, tensor or context parallelism, ``nn.DataParallel``,
            ``torch_compile`` in several processes, or FSDP that accelerate does not turn on.
    """
    arguments = trainer.args
    if arguments.torch_compile and arguments.world_size > 1:
        raise UnsupportedModelError(
            "a compiled student trains in one process only; leave out torch_compile."
        )
    if arguments.fsdp and not trainer.is_fsdp_enabled:
        # Without a GPU accelerate passes over it in silence.
        raise UnsupportedModelError(
            "accelerate shards models over several GPUs only; leave out fsdp, or call TrainStep in "
            "a loop of your own on a student that went through fully_shard."
        )
    if trainer.is_deepspeed_enabled or getattr(arguments, "parallelism_config", None) is not None:
        raise UnsupportedModelError(
            "QATTrainer trains in parallel over samples only; start it without DeepSpeed and "
            "parallelism_config."
        )
    if arguments.n_gpu > 1:
        raise UnsupportedModelError(
            f"QATTrainer does not split a batch over {arguments.n_gpu} GPUs in one process; "
            "start it with torchrun or accelerate launch, or show it one GPU."
        )


def check_precision(arguments: TrainingArguments, precision: str) -> None:
    """Refuses all but float32 and bfloat16 autocast.

    Args:
        arguments: The training arguments.
        precision: As accelerate names it; the environment may have set it.

    Raises:
        UnsupportedModelError: Another precision.
    """
    full_eval = arguments.fp16_full_eval or arguments.bf16_full_eval
    if arguments.fp16 or precision not in ("no", "bf16") or full_eval:
        raise UnsupportedModelError(
            "QATTrainer trains in float32 or with bf16=True; leave out fp16, whose gradients "
            "vanish, and fp16_full_eval and bf16_full_eval, which would round latent weights."
        )
