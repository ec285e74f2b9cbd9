"""What a trainer of students writes and reads: checkpoints and packed models."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import rotate_checkpoints

from ..artefacts import write_artefact
from ..errors import NonFiniteLossError
from . import _checkpoint, _sharded

__all__ = ["StoringTrainer"]


class StoringTrainer(Trainer):
    """A ``Trainer`` whose checkpoints are complete or absent, and whose models are packed.

    A checkpoint is written under a temporary name and renamed; it belongs to one run only.
    """

    _unsharded: _sharded.Unsharded | None

    def _run_settings(self) -> dict[str, Any]:
        """Returns what two runs must share for one to go on with the other's checkpoint."""
        raise NotImplementedError

    def _finite_means(self) -> dict[str, float]:
        """Returns the mean loss terms since the last entry; refuses NaN."""
        raise NotImplementedError

    def _refuse_broken_weights(self) -> None:
        for name in _sharded.non_finite(cast("nn.Module", self.model)):
            raise NonFiniteLossError(
                f"the weight {name!r} became NaN or infinite at step {self.state.global_step}; "
                "nothing was saved, lower the learning rate (now "
                f"{self.args.learning_rate:g})."
            )

    def _whole_student(self) -> nn.Module:
        student = cast("nn.Module", self.model)
        if self._unsharded is None or not _sharded.is_sharded(student):
            return student
        return self._unsharded.gather(student)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self._finite_means()
        self._refuse_broken_weights()
        run_dir = Path(self._get_output_dir(trial))
        checkpoint = run_dir / f"checkpoint-{self.state.global_step}"
        self.store_flos()
        if self.state.best_global_step:
            best = run_dir / f"checkpoint-{self.state.best_global_step}"
            if best == checkpoint or best.exists():
                self.state.best_model_checkpoint = str(best)
        if self.args.should_save:
            stage = _checkpoint.stage_for(checkpoint)
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            stage = checkpoint.with_name(f".{checkpoint.name}.partial")
        student = self._whole_student()
        self._save_optimizer_and_scheduler(str(stage))
        self._save_scaler(str(stage))
        self._save_rng_state(str(stage))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._commit(student, run_dir, stage, checkpoint)
        self.accelerator.wait_for_everyone()

    def _commit(self, student: nn.Module, run_dir: Path, stage: Path, checkpoint: Path) -> None:
        _checkpoint.save_latent(student, stage)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                self._export_callback(callback)
        self.state.save_to_json(str(stage / "trainer_state.json"))
        _checkpoint.commit(stage, checkpoint, self._run_settings())
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=True,
        )

    def _export_callback(self, callback: Any) -> None:
        name = callback.__class__.__name__
        known: Any = self.state.stateful_callbacks
        if isinstance(known[name], list):
            known[name].append(callback.state())
        else:
            known[name] = callback.state()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        _checkpoint.refuse_other_run(Path(resume_from_checkpoint), self._run_settings())
        _checkpoint.load_latent(
            cast("nn.Module", model or self.model), Path(resume_from_checkpoint)
        )

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        _checkpoint.load_latent(cast("nn.Module", self.model), Path(cast("str", best)))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        folder = Path(checkpoint)
        _checkpoint.refuse_other_run(folder, self._run_settings())
        optimizer = cast("torch.optim.Optimizer", self.optimizer)
        if _sharded.is_sharded(cast("nn.Module", self.model)):
            _sharded.load_optimizer(optimizer, folder, self.args.process_index)
        else:
            # To the host first: transformers 5.17 asks torch for "cpu:0", which it does not know.
            state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state)
        scheduler = torch.load(folder / "scheduler.pt", weights_only=True)
        cast("Any", self.lr_scheduler).load_state_dict(scheduler)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not _sharded.is_sharded(cast("nn.Module", self.model)):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder = Path(output_dir)
        optimizer = cast("torch.optim.Optimizer", self.optimizer)
        _sharded.save_optimizer(optimizer, folder, self.args.process_index)
        if self.args.should_save:
            torch.save(cast("Any", self.lr_scheduler).state_dict(), folder / "scheduler.pt")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the packed form with tokenizer and model card.

        Of a sharded student all processes must call it; the first one writes.

        Args:
            output_dir: Folder, by default that of the arguments.
            _internal_call: As in ``Trainer``.

        Raises:
            NonFiniteLossError: A weight is NaN or infinite.
        """
        if not _sharded.is_sharded(cast("nn.Module", self.model)):
            super().save_model(output_dir, _internal_call)
            return
        self._refuse_broken_weights()
        student = self._whole_student()
        if self.args.should_save:
            self._write(student, output_dir)
        self.accelerator.wait_for_everyone()

    def _save(
        self, output_dir: str | None = None, state_dict: Mapping[str, Any] | None = None
    ) -> None:
        if not self.args.should_save:
            return
        self._refuse_broken_weights()
        self._write(cast("nn.Module", self.model), output_dir)

    def _write(self, student: nn.Module, output_dir: str | None) -> None:
        folder = Path(output_dir if output_dir is not None else cast("str", self.args.output_dir))
        metrics = {
            key: value
            for entry in self.state.log_history
            for key, value in entry.items()
            if key.startswith("eval_") and isinstance(value, float)
        }
        write_artefact(student, folder, processor=self._processor(), metrics=metrics)

    def _processor(self) -> Any:
        if self.processing_class is not None:
            return self.processing_class
        return getattr(self.data_collator, "tokenizer", None)
