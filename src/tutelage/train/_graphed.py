"""Steps of the trainer as CUDA graphs, where they can be."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from ..distill import GraphedTrainStep, Recorder, TrainStep
from ..errors import RecipeError, TutelageError

if TYPE_CHECKING:
    from ._trainer import QATTrainer

__all__ = ["GraphedSteps"]


class _WholeStep(TrainStep):
    """A step as the trainer runs it: forward and loss under autocast, backward and update not."""

    def __init__(self, trainer: QATTrainer, optimizer: torch.optim.Optimizer) -> None:
        norm = trainer.args.max_grad_norm
        super().__init__(trainer.distiller, optimizer, max_grad_norm=norm if norm > 0 else None)
        self._autocast: Callable[[], Any] = trainer.accelerator.autocast
        self._backward: Callable[[Tensor], None] = trainer._backward

    def accumulate(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        with self._autocast():
            return super().accumulate(*args, **{**kwargs, "backward": self._backward})


class GraphedSteps:
    """Runs optimizer steps of a trainer as recorded graphs, or leaves them to the trainer.

    Attributes:
        recorder: What records, ``CudaRecorder()`` if ``None``.
        done: Whether the last step is over, its update included.
        grad_norm: Norm of its gradient before clipping, ``None`` where nothing is clipped.
    """

    recorder: Recorder | None = None

    def __init__(self, trainer: QATTrainer, wanted: bool | None) -> None:
        """Keeps what was asked for.

        Args:
            trainer: Whose steps.
            wanted: ``True`` to refuse what cannot be recorded, ``None`` to record where it works,
                ``False`` never to.
        """
        self._trainer = trainer
        self._wanted = wanted
        self._off = wanted is False
        self._step: GraphedTrainStep | None = None
        self.done = False
        self.grad_norm: Tensor | None = None

    def check(self) -> None:
        """Refuses a setting under which steps cannot be recorded, if that was asked for.

        Raises:
            RecipeError: It was, and they cannot.
        """
        reason = self._reason()
        if self._wanted and reason:
            raise RecipeError(f"graph=True, but {reason}; leave graph out to train without.")

    def begin(self) -> None:
        """Forgets the graphs of an earlier training, whose optimizer state may be another."""
        self._step = None

    def run(
        self, batch: Mapping[str, Any], stage: str, progress: Tensor
    ) -> dict[str, Tensor] | None:
        """Runs one optimizer step.

        Args:
            batch: On the student's device.
            stage: Name of the stage.
            progress: See ``Distiller.step``.

        Returns:
            The loss and its terms; ``None`` where the trainer is to run the step itself.

        Raises:
            RecipeError: As ``check``.
            DataError: Graphs were asked for, and the batches come in too many shapes.
            TutelageError: As ``TrainStep``.
        """
        self.done = False
        step = None if self._off else self._ready()
        if step is None or not self._has_room(step, batch, stage, progress):
            return None
        groups = step.train_step.optimizer.param_groups  # type: ignore[union-attr]
        rates = [group["lr"] for group in groups]
        try:
            terms = step(batch, stage, progress=progress)
        except TutelageError:
            raise
        except RuntimeError as error:
            if self._wanted or len(step):
                raise
            self._give_up(f"recording a step failed: {error}")
            return None
        finally:
            # Schedulers, logs and checkpoints keep numbers; the tensors belong to the graphs.
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        self.done, self.grad_norm = True, step.grad_norm
        return terms

    def _ready(self) -> GraphedTrainStep | None:
        wrapped = cast("Any", self._trainer.optimizer)
        optimizer = getattr(wrapped, "optimizer", wrapped)
        if self._step is not None and self._step.train_step.optimizer is optimizer:
            return self._step
        self.check()
        reason = self._reason()
        if reason:
            self._give_up(reason)
            return None
        rates = [group["lr"] for group in optimizer.param_groups]
        try:
            whole = _WholeStep(self._trainer, optimizer)
            self._step = GraphedTrainStep(whole, recorder=self.recorder)
        except TutelageError as error:
            if self._wanted:
                raise
            self._give_up(str(error))
            return None
        finally:
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        return self._step

    def _has_room(
        self, step: GraphedTrainStep, batch: Mapping[str, Any], stage: str, progress: Tensor
    ) -> bool:
        reason = step.reason_against(batch, stage, progress=progress)
        if not reason or self._wanted:
            return True
        self._tell(f"some steps run without a graph: {reason}")
        return False

    def _reason(self) -> str:
        """Returns why the trainer's settings do not allow graphs, as the end of a sentence."""
        trainer, arguments = self._trainer, self._trainer.args
        if self.recorder is None and arguments.device.type != "cuda":
            return "there is no CUDA device"
        if arguments.world_size > 1 or trainer.is_fsdp_enabled:
            return "several processes train together"
        if arguments.torch_compile:
            return "the student goes through torch.compile"
        if arguments.gradient_accumulation_steps > 1:
            return "gradients are accumulated over micro-batches"
        modules = trainer.distiller.student.modules()
        if any(getattr(module, "gradient_checkpointing", False) for module in modules):
            return "gradient checkpointing keeps random states on the host"
        return ""

    def _give_up(self, reason: str) -> None:
        self._off, self._step = True, None
        if self._trainer.args.device.type == "cuda" or self.recorder is not None:
            self._tell(f"steps run without CUDA graphs: {reason}")

    _told = False

    def _tell(self, message: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"{message} (graph=False says so in advance, graph=True insists).",
                RuntimeWarning,
                stacklevel=4,
            )
