"""The two trainings of a run: the teacher's fine-tuning, and the student under the teacher."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from .._prepare import prepare
from ..artefacts import staged_directory, write_failures_as_os_error
from ..distill import CachedTeacher, with_sample_ids
from ..intervention import Schedule
from ._arguments import QATArguments
from ._checkpoint import latest_checkpoint
from ._log import LogPoints, log_every, training_log, write_training_log
from ._models import load_config, load_model
from ._output import CHECKPOINTS, TEACHER
from ._plan import Plan, save_and_eval_steps
from ._teacher_cache import keeping_ids, teacher_source
from ._trainer import QATTrainer
from .progress import Progress

__all__ = ["ProgressFactory", "obtain_teacher", "train_student"]

ProgressFactory = Callable[[str], Progress]
"""From the name of a phase to its display."""

_KEPT_CHECKPOINTS = 2


def obtain_teacher(
    plan: Plan, report: Callable[[str], None], progress: ProgressFactory | None
) -> tuple[nn.Module, bool]:
    """Returns the teacher, fine-tuned first where nobody has a head for the task.

    A fine-tuned teacher is written whole or not at all, and read back, so that a resumed run
    starts from the same bits.

    Args:
        plan: The run.
        report: Told what happens.
        progress: Makes the display.

    Returns:
        The teacher, and whether this run (or the one it resumes) fine-tuned it.
    """
    if plan.teacher is not None:
        return plan.teacher, False
    if plan.model_has_head:
        return plan.model, False
    folder = plan.folder / TEACHER
    if folder.is_dir():
        report(f"the teacher in {folder} is complete already")
    else:
        name = plan.recipe.model.name_or_path
        report(
            f"{name} has no {plan.task.head.short or plan.task.head.name} for the task: it is "
            "fine-tuned first, to be the teacher"
        )
        _fine_tune(plan, progress)
    config = load_config(str(folder), "the teacher")
    return load_model(str(folder), config, plan.task, "the teacher"), True


def _fine_tune(plan: Plan, progress: ProgressFactory | None) -> None:
    section, model = plan.recipe.teacher, cast("Any", plan.model)
    set_seed(plan.recipe.seed)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            num_train_epochs=section.epochs,
            max_steps=section.max_steps,
            learning_rate=section.learning_rate,
            per_device_train_batch_size=section.batch_size,
            warmup_steps=_share(section.warmup_ratio),
            weight_decay=section.weight_decay,
            bf16=section.bf16,
            save_strategy="no",
            logging_steps=log_every(_teacher_steps(plan)),
            **_common(plan),
        ),
        train_dataset=plan.train,
        data_collator=cast("Any", plan.task.collator(plan.processor)),
        compute_loss_func=plan.task.loss,
        callbacks=[LogPoints(Schedule.none())],
    )
    _train(trainer, "teacher", progress)
    with staged_directory(plan.folder / TEACHER) as stage:
        with write_failures_as_os_error():
            model.save_pretrained(stage)
        plan.processor.save_pretrained(stage)
        state = trainer.state
        log = training_log(state.log_history, Schedule.none(), state.global_step)
        write_training_log(log, stage)


def _teacher_steps(plan: Plan) -> int:
    section = plan.recipe.teacher
    if section.max_steps > 0:
        return section.max_steps
    return math.ceil(section.epochs * math.ceil(len(plan.train) / section.batch_size))


def train_student(
    plan: Plan,
    teacher: nn.Module,
    report: Callable[[str], None],
    progress: ProgressFactory | None,
    *,
    resume: bool,
    watchers: Sequence[TrainerCallback] = (),
    store: bool = True,
) -> nn.Module:
    """Trains the student and returns it in eval mode.

    It starts from the model where that has a head of its own, else from the teacher.

    Args:
        plan: The run.
        teacher: The teacher.
        report: Told what happens.
        progress: Makes the display.
        resume: Go on from the newest complete checkpoint, if there is one.
        watchers: Told of every step, see ``Trainer``.
        store: Write checkpoints, and the log of the training.
    """
    section = plan.recipe.student
    source = plan.model if plan.model_has_head else teacher
    student = prepare(copy.deepcopy(source), plan.scheme).requires_grad_(True)
    save_steps, eval_steps = save_and_eval_steps(section)
    chosen: dict[str, Any] = {}
    if section.learning_rate is not None:
        chosen["learning_rate"] = section.learning_rate
    if eval_steps is not None:
        chosen |= {"eval_strategy": "steps", "eval_steps": eval_steps}
    if section.keep == "best":
        chosen["load_best_model_at_end"] = True
        chosen["metric_for_best_model"] = plan.task.metric
        chosen["greater_is_better"] = plan.task.greater_is_better
    set_seed(plan.recipe.seed)
    with teacher_source(plan, student, teacher, report) as guide:
        stored = isinstance(guide, CachedTeacher)
        trainer = QATTrainer(
            cast("Any", student),
            guide,
            QATArguments(
                max_steps=section.max_steps,
                per_device_train_batch_size=section.batch_size,
                warmup_steps=_share(section.warmup_ratio),
                weight_decay=section.weight_decay,
                bf16=section.bf16,
                qat_optimizer=section.optimizer,
                dropout=section.dropout,
                ramp=section.ramp,
                average=section.average,
                rate_cap=section.rate_cap,
                rate_by_magnitude=section.rate_by_magnitude,
                train_sampling_strategy="group_by_length" if section.group_by_length else "random",
                save_strategy="steps" if store else "no",
                save_steps=save_steps,
                save_total_limit=_KEPT_CHECKPOINTS,
                logging_steps=log_every(section.max_steps),
                **chosen,
                **_common(plan),
            ),
            schedule=plan.schedule,
            losses=plan.losses,
            graph=section.graph,
            train_dataset=with_sample_ids(plan.train) if stored else plan.train,
            eval_dataset=plan.eval,
            data_collator=cast("Any", keeping_ids(plan.task.collator(plan.processor))),
            processing_class=plan.processor,
            callbacks=[LogPoints(plan.schedule), *watchers],
            compute_metrics=lambda found: plan.task.metrics(list(found.predictions), plan.eval),
            compute_loss_func=plan.task.loss,
            preprocess_logits_for_metrics=lambda outputs, labels: plan.task.reduce(
                plan.task.values(outputs), labels
            ),
        )
        checkpoint = latest_checkpoint(plan.folder / CHECKPOINTS) if resume else None
        if checkpoint is not None:
            report(f"the student goes on from {checkpoint}")
        _train(trainer, "student", progress, checkpoint)
    if store:
        log = training_log(trainer.state.log_history, plan.schedule, section.max_steps)
        write_training_log(log, plan.folder)
    return student.eval()


def _common(plan: Plan) -> dict[str, Any]:
    return {
        "output_dir": str(plan.folder / CHECKPOINTS),
        "per_device_eval_batch_size": plan.task.eval_batch_size,
        "label_names": ["labels"],
        "seed": plan.recipe.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        # Said outright: transformers refuses bf16 on a processor that it was not told to use.
        "use_cpu": not torch.accelerator.is_available(),
    }


def _share(ratio: float) -> float:
    # transformers takes numbers from 1 up for a count of steps.
    return min(ratio, math.nextafter(1.0, 0.0))


def _train(
    trainer: Trainer,
    phase: str,
    progress: ProgressFactory | None,
    checkpoint: Path | None = None,
) -> None:
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    shown = None if progress is None else progress(phase)
    try:
        if shown is not None:
            shown.attach(trainer)
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        if shown is not None:
            shown.close()
