"""QATTrainer: two steps with a warm-up each, honest evaluation, logged terms, early stops."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

import tutelage
from helpers import (
    ENCODER_TERMS,
    FAMILIES,
    differing,
    hooks_of,
    make_batch,
    pair,
    rows,
    trainer_for,
    weights_of,
)
from tutelage import QATArguments, QATTrainer, Schedule, losses
from tutelage.distill import SAMPLE_IDS
from tutelage.distill.losses import Losses
from tutelage.errors import (
    CheckpointError,
    IncompatibleTeacherError,
    NonFiniteLossError,
    RecipeError,
    UnsupportedModelError,
)
from tutelage.nn._gate import gate_of
from tutelage.train import BertAdam, _limits


class _Watch(TrainerCallback):
    """Notes the learning rate, the stage and the age of the optimizer state at every step."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.ages: list[set[float]] = []
        self.moments: list[float] = []
        self.stages: list[str] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        self.rates.append(optimizer.param_groups[0]["lr"])
        state_of = [s for s in optimizer.state.values() if s]
        self.ages.append({float(s["step"]) for s in state_of if "step" in s})
        self.moments.append(sum(s["exp_avg"].abs().sum().item() for s in state_of))


def _spy(trainer: QATTrainer) -> list[tuple[int, str, bool, float]]:
    """Notes every call of the distiller's step."""
    calls: list[tuple[int, str, bool, float]] = []
    real = trainer.distiller.step

    def step(batch: Any, stage: str, **options: Any) -> Any:
        progress = options["progress"]
        assert progress.dim() == 0
        calls.append((trainer.state.global_step, stage, trainer.model.training, progress.item()))
        return real(batch, stage, **options)

    trainer.distiller.step = step  # type: ignore[method-assign,assignment]
    return calls


# The two steps.


def test_stages_follow_the_global_step(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, schedule=Schedule.gradual(6))
    calls = _spy(trainer)
    trainer.train()
    assert [stage for _, stage, _, _ in calls] == [
        "attention_output",
        "context",
        *["attention_map"] * 4,
        *["none"] * 3,
    ]
    assert [step for step, _, _, _ in calls] == list(range(9))
    assert all(training for _, _, training, _ in calls)
    assert [p for _, _, _, p in calls] == pytest.approx([t / 9 for t in range(9)])


@pytest.mark.parametrize(
    ("max_steps", "length"), [(9, 3), (10, 3), (2, 0), (180, 60), (600, 60)], ids=str
)
def test_the_default_schedule_is_gradual_over_a_third(
    tmp_path: Path, max_steps: int, length: int
) -> None:
    trainer = trainer_for(tmp_path, max_steps=max_steps)
    with pytest.raises(RecipeError, match="known when training begins"):
        _ = trainer.active_schedule
    trainer.create_optimizer()
    trainer.create_scheduler(max_steps)
    assert trainer.active_schedule == Schedule.gradual(length)
    assert trainer.schedule is None


def test_epochs_are_counted_in_steps(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, max_steps=-1, num_train_epochs=2)
    assert trainer.train().global_step == 12
    assert trainer.active_schedule == Schedule.gradual(4)


def _multiplier(t: int, warmup: int, length: int) -> float:
    return t / warmup if t < warmup else max(0.0, (length - t) / max(1, length - warmup))


@pytest.mark.parametrize("optimizer", ["adamw", "bert_adam"])
def test_the_learning_rate_warms_up_twice(tmp_path: Path, optimizer: str) -> None:
    watch = _Watch()
    trainer = trainer_for(
        tmp_path,
        schedule=Schedule.gradual(10),
        max_steps=30,
        warmup_steps=0.2,
        qat_optimizer=optimizer,
        callbacks=[watch],
    )
    trainer.train()
    expected = [_multiplier(t, 2, 10) for t in range(10)]
    expected += [_multiplier(t, 4, 20) for t in range(20)]
    assert watch.rates == pytest.approx([1e-3 * m for m in expected])
    assert watch.rates[0] == watch.rates[10] == 0.0
    assert max(watch.rates[:10]) == max(watch.rates[10:]) == pytest.approx(1e-3)


@pytest.mark.parametrize("dropout", [True, False], ids=["on", "off"])
def test_dropout_is_a_choice(tmp_path: Path, dropout: bool) -> None:
    # Off, the same batch costs the same under every random state; on, it does not.
    trainer = trainer_for(tmp_path, schedule=Schedule.gradual(6), dropout=dropout, eval_rows=4)
    calls = _spy(trainer)
    trainer.evaluate()  # leaves the student in eval mode
    trainer.train()
    assert {training for _, _, training, _ in calls} == {dropout}
    trainer.current_gradient_accumulation_steps = 1
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(trainer.training_step(trainer.model, make_batch()).item())
    assert (found[0] == found[1]) != dropout


def test_without_intervention_there_is_one_warm_up(tmp_path: Path) -> None:
    watch = _Watch()
    trainer = trainer_for(
        tmp_path, schedule=Schedule.none(), max_steps=10, warmup_steps=0.3, callbacks=[watch]
    )
    trainer.train()
    assert watch.rates == pytest.approx([1e-3 * _multiplier(t, 3, 10) for t in range(10)])


def test_a_schedule_as_long_as_training_never_reaches_the_second_step(tmp_path: Path) -> None:
    watch = _Watch()
    trainer = trainer_for(
        tmp_path, schedule=Schedule.constant("context", 9), warmup_steps=0.2, callbacks=[watch]
    )
    calls = _spy(trainer)
    trainer.train()
    assert {stage for _, stage, _, _ in calls} == {"context"}
    assert watch.rates == pytest.approx([1e-3 * _multiplier(t, 2, 9) for t in range(9)])


def test_a_schedule_longer_than_training_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, schedule=Schedule.gradual(10))
    with pytest.raises(RecipeError, match=r"intervenes for 10 steps, training has 9; shorten"):
        trainer.train()


def test_a_learning_rate_that_depends_on_the_metric_is_refused(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        schedule=Schedule.gradual(3),
        lr_scheduler_type="reduce_lr_on_plateau",
        eval_strategy="steps",
        eval_steps=3,
        eval_rows=4,
        metric_for_best_model="loss",
    )
    with pytest.raises(RecipeError, match=r"depends on more than the step; use 'linear'"):
        trainer.train()


@pytest.mark.parametrize("kind", ["cosine", "constant_with_warmup", "constant"])
def test_other_curves_are_split_as_well(tmp_path: Path, kind: str) -> None:
    watch = _Watch()
    trainer = trainer_for(
        tmp_path,
        schedule=Schedule.gradual(4),
        max_steps=12,
        lr_scheduler_type=kind,
        warmup_steps=0.25 if kind != "constant" else 0,
        callbacks=[watch],
    )
    trainer.train()
    if kind == "constant":
        assert watch.rates == [1e-3] * 12
        return
    assert watch.rates[0] == watch.rates[4] == 0.0
    assert watch.rates[1] == watch.rates[6] == pytest.approx(1e-3)


def test_the_second_step_begins_with_a_fresh_optimizer(tmp_path: Path) -> None:
    watch = _Watch()
    trainer = trainer_for(
        tmp_path, schedule=Schedule.constant("attention_map", 5), callbacks=[watch]
    )
    trainer.train()
    assert [ages for ages in watch.ages] == [
        set(), {1.0}, {2.0}, {3.0}, {4.0}, {0.0}, {1.0}, {2.0}, {3.0},
    ]  # fmt: skip
    assert watch.moments[4] > 0
    assert watch.moments[5] == 0
    assert watch.moments[6] > 0


@pytest.mark.parametrize("kind", ["adamw", "bert_adam"])
def test_the_second_step_equals_a_new_run_from_the_same_weights(tmp_path: Path, kind: str) -> None:
    # Zeroed state must be as good as none: compare with a run that has only the second step.
    whole = trainer_for(
        tmp_path / "a",
        schedule=Schedule.constant("attention_output", 6),
        max_steps=12,
        rate=0.0,
        qat_optimizer=kind,
    )
    kept: dict[str, Tensor] = {}

    class Keep(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 6:
                kept.update(weights_of(kwargs["model"]))

    whole.add_callback(Keep())
    batches: list[Any] = []
    real = whole.distiller.step

    def step(batch: Any, stage: str, **options: Any) -> Any:
        batches.append(batch)
        return real(batch, stage, **options)

    whole.distiller.step = step
    whole.train()
    second = trainer_for(
        tmp_path / "b", schedule=Schedule.none(), max_steps=6, rate=0.0, qat_optimizer=kind
    )
    second.model.load_state_dict(kept)
    fed = iter(batches[6:])
    other = second.distiller.step
    second.distiller.step = lambda batch, stage, **o: other(next(fed), stage, **o)
    second.train()
    assert differing(weights_of(whole.model), weights_of(second.model)) == []


def test_no_intervention_means_no_reset(tmp_path: Path) -> None:
    watch = _Watch()
    trainer_for(tmp_path, schedule=Schedule.none(), callbacks=[watch]).train()
    assert watch.ages[-1] == {8.0}


# What a step is.


def test_training_equals_a_loop_by_hand(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, schedule=Schedule.gradual(6), rate=0.0, max_grad_norm=0.5, warmup_steps=0.0
    )
    other = copy.deepcopy(trainer.model).train()
    batches: list[Any] = []
    real = trainer.distiller.step

    def step(batch: Any, stage: str, **options: Any) -> Any:
        batches.append({key: value.clone() for key, value in batch.items()})
        return real(batch, stage, **options)

    trainer.distiller.step = step
    trainer.train()

    decayed = set(trainer.get_decay_parameter_names(other))
    names = dict(other.named_parameters())
    assert all(names[n].dim() > 1 for n in decayed)
    assert {n for n, p in names.items() if p.dim() > 1} == decayed
    distiller = tutelage.Distiller(other, pair("bert", dropout=0.0)[1])
    schedule = Schedule.gradual(6)
    optimizer = None
    for t, batch in enumerate(batches):
        if t in (0, 6):
            groups = [
                {"params": [p for n, p in names.items() if n in decayed], "weight_decay": 0.01},
                {"params": [p for n, p in names.items() if n not in decayed], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW(groups, lr=1e-3)
        assert optimizer is not None
        length, at = (6, t) if t < 6 else (3, t - 6)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * _multiplier(at, 0, length)
        distiller.step(batch, schedule(t)).loss.backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    for name, value in weights_of(trainer.model).items():
        torch.testing.assert_close(value, names[name].detach(), atol=2e-6, rtol=1e-5)


def test_parameters_of_quantizers_have_no_weight_decay(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path)
    linear = trainer.model.bert.encoder.layer[0].output.dense
    linear.weight_quantizer.register_parameter("step", torch.nn.Parameter(torch.ones(3, 3)))
    names = trainer.get_decay_parameter_names(trainer.model)
    assert not any("quantizer" in name for name in names)
    assert any(name.endswith("word_embeddings.weight") for name in names)


def test_the_published_optimizer(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, qat_optimizer="bert_adam", weight_decay=0.03)
    made = trainer.create_optimizer()
    assert isinstance(made, BertAdam)
    assert trainer.args.max_grad_norm == 0.0  # it clips every tensor on its own
    assert {group["weight_decay"] for group in made.param_groups} == {0.03, 0.0}
    assert {group["eps"] for group in made.param_groups} == {1e-6}
    assert {group["max_grad_norm"] for group in made.param_groups} == {1.0}


def test_gradient_accumulation(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        schedule=Schedule.gradual(3),
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        logging_strategy="steps",
        logging_steps=1,
        losses=losses.Losses.of(dict.fromkeys(set(ENCODER_TERMS) - {"labels"}, 1.0)),
    )
    calls = _spy(trainer)
    seen: list[float] = []
    real = trainer._step.accumulate

    def accumulate(*args: Any, **options: Any) -> Any:
        assert options["counts"].keys() == {
            w.term.name for w in trainer.distiller.losses.at(args[1])
        }
        out = real(*args, **options)
        seen.append(out["loss"].item())
        return out

    trainer._step.accumulate = accumulate
    trainer.train()
    assert [step for step, _, _, _ in calls] == [t for t in range(5) for _ in range(3)]
    # Every micro-batch of a step is in its stage.
    assert [stage for _, stage, _, _ in calls][:9] == [
        s for s in ("attention_output", "attention_map", "attention_map") for _ in range(3)
    ]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for t, entry in enumerate(logged):
        assert entry["loss"] == pytest.approx(sum(seen[3 * t : 3 * t + 3]), rel=1e-5)
        terms = sum(
            value for key, value in entry.items() if key.startswith("loss_") and "local" not in key
        ) + sum(value for key, value in entry.items() if key.endswith("_local"))
        assert entry["loss"] == pytest.approx(terms, rel=1e-4)


def test_accumulating_whole_batches_equals_one_large_batch(tmp_path: Path) -> None:
    results = []
    for size, parts in ((4, 1), (2, 2)):
        trainer = trainer_for(
            tmp_path / str(parts),
            schedule=Schedule.none(),
            losses=Losses.of({"logits": 1.0}),
            max_steps=4,
            rate=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            qat_optimizer="bert_adam",
        )
        trainer.train()
        results.append(weights_of(trainer.model))
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-5, rtol=1e-4)


def test_accumulating_parts_of_unequal_length_equals_one_large_batch(tmp_path: Path) -> None:
    # Each micro-batch is as long as its longest sentence, as padding by a collator makes it; the
    # last step of an epoch has fewer of them.
    def collate(samples: list[Any]) -> dict[str, Tensor]:
        batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
        length = int(batch["attention_mask"].sum(-1).max())
        return {k: v[:, :length] if v.dim() == 2 else v for k, v in batch.items()}

    results, logs = [], []
    for size, parts in ((8, 1), (2, 4)):
        trainer = trainer_for(
            tmp_path / str(parts),
            schedule=Schedule.gradual(6),
            max_steps=8,
            rate=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            qat_optimizer="bert_adam",
            logging_strategy="steps",
            logging_steps=2,
        )
        trainer.train_dataset = [row for row in rows(20) if row["attention_mask"].sum() > 1]
        trainer.data_collator = collate
        trainer.train()
        results.append(weights_of(trainer.model))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    for name, value in results[0].items():
        torch.testing.assert_close(value, results[1][name], atol=1e-5, rtol=1e-4)
    for one, other in zip(*logs, strict=True):
        for key in one.keys() - {"epoch"}:
            assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-9), key


def test_training_leaves_nothing_on_the_models(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, schedule=Schedule.gradual(9))
    trainer.train()
    assert hooks_of(trainer.model) == {}
    assert hooks_of(trainer.distiller.teacher.model) == {}


def test_plain_training_arguments_are_taken_literally(tmp_path: Path) -> None:
    student, teacher = pair("bert")
    plain = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = QATTrainer(student, teacher, args=plain, train_dataset=rows())
    assert trainer.args is plain
    assert trainer.args.learning_rate == 5e-5
    made = trainer.create_optimizer()
    assert isinstance(made, torch.optim.AdamW)


def test_arguments() -> None:
    args = QATArguments(output_dir="x", use_cpu=True)
    assert args.learning_rate == 3e-4
    assert args.warmup_steps == 0.1
    assert args.weight_decay == 0.01
    assert args.logging_nan_inf_filter is False
    assert args.max_grad_norm == 1.0
    assert args.dropout is False
    with pytest.raises(RecipeError, match="qat_optimizer is 'adam'; use 'adamw' or 'bert_adam'"):
        QATArguments(output_dir="x", qat_optimizer="adam")  # type: ignore[arg-type]


# Evaluation.


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def test_evaluation_is_the_students_own_even_in_the_intervention_stage(tmp_path: Path) -> None:
    expected: list[tuple[float, float]] = []
    data = rows(7, seed=5)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}

    class Plain(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model = copy.deepcopy(kwargs["model"]).eval()
            with torch.no_grad():
                output = model(**batch)
            right = (output.logits.argmax(-1) == batch["labels"]).float().mean()
            expected.append((output.loss.item(), right.item()))

    trainer = trainer_for(
        tmp_path,
        schedule=Schedule.constant("attention_output", 6),
        eval_strategy="steps",
        eval_steps=1,
        eval_rows=7,
        compute_metrics=_accuracy,
        callbacks=[Plain()],
    )
    calls = _spy(trainer)
    trainer.train()
    assert len(calls) == 9  # the distiller is not asked in evaluation
    found = [e for e in trainer.state.log_history if "eval_loss" in e]
    assert len(found) == 9
    for entry, (loss, accuracy) in zip(found, expected, strict=True):
        assert entry["eval_loss"] == pytest.approx(loss, rel=1e-5)
        assert entry["eval_accuracy"] == pytest.approx(accuracy)


def test_evaluation_and_prediction_need_no_teacher_and_no_training(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, eval_rows=6)

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("the teacher was asked")

    trainer.distiller.teacher.get = fail
    metrics = trainer.evaluate()
    found = trainer.predict(rows(6, seed=5))
    data = rows(6, seed=5)
    batch = {key: torch.stack([row[key] for row in data]) for key in data[0]}
    with torch.no_grad():
        output = trainer.model.eval()(**batch)
    assert metrics["eval_loss"] == pytest.approx(output.loss.item(), rel=1e-5)
    np.testing.assert_allclose(found.predictions, output.logits.numpy(), atol=1e-6)


def test_logging_and_saving_change_nothing(tmp_path: Path) -> None:
    results = []
    for strategy in ("no", "steps"):
        trainer = trainer_for(
            tmp_path / strategy,
            schedule=Schedule.gradual(6),
            logging_strategy=strategy,
            logging_steps=1,
            save_strategy=strategy,
            save_steps=2,
        )
        trainer.train()
        results.append(weights_of(trainer.model))
    assert differing(*results) == []


# Logging.


def test_terms_are_logged_as_means(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path,
        schedule=Schedule.gradual(6),
        logging_strategy="steps",
        logging_steps=3,
        losses=losses.default(),
    )
    seen: list[dict[str, float]] = []
    real = trainer._step.accumulate

    def accumulate(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        seen.append({key: value.item() for key, value in out.items()})
        return out

    trainer._step.accumulate = accumulate
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss_logits" in entry]
    assert [entry["step"] for entry in logged] == [3, 6, 9]
    assert [entry["intervention"] for entry in logged] == [1.0, 1.0, 0.0]
    for t, entry in enumerate(logged):
        steps = seen[3 * t : 3 * t + 3]
        for name in {name for step in steps for name in step}:
            values = [step[name] for step in steps if name in step]
            key = "loss" if name == "loss" else f"loss_{name}"
            assert entry[key] == pytest.approx(sum(values) / len(values), rel=1e-5), name
    assert "loss_attention_output_local" in logged[0]
    assert "loss_attention_output_local" not in logged[1]
    json.dumps(trainer.state.log_history)


# NaN.


def _poison(trainer: Any, value: float) -> None:
    with torch.no_grad():
        trainer.model.bert.encoder.layer[1].output.dense.bias[3] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_poisoned_weight_stops_training_early(tmp_path: Path, value: float) -> None:
    trainer = trainer_for(
        tmp_path,
        schedule=Schedule.gradual(6),
        max_steps=200,
        logging_strategy="steps",
        logging_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    _poison(trainer, value)
    with pytest.raises(NonFiniteLossError, match=r"became NaN or infinite before step .*0\.001"):
        trainer.train()
    assert trainer.state.global_step == 2
    assert list(tmp_path.glob("*checkpoint-*")) == []  # nothing broken was saved
    assert hooks_of(trainer.model) == {}


def test_a_broken_model_is_not_saved_although_nothing_is_logged(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, save_strategy="steps", save_steps=3)
    _poison(trainer, float("nan"))
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    assert trainer.state.global_step == 3
    assert list(tmp_path.glob("*checkpoint-*")) == []


def test_nan_in_the_last_steps_is_told_at_the_end(tmp_path: Path) -> None:
    class Late(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 7:
                with torch.no_grad():
                    kwargs["model"].classifier.weight[0, 0] = float("nan")

    trainer = trainer_for(tmp_path, callbacks=[Late()], logging_strategy="steps", logging_steps=5)
    with pytest.raises(NonFiniteLossError, match=r"\(.*logits.*\)"):
        trainer.train()


def test_a_stopped_trainer_can_be_evaluated(tmp_path: Path) -> None:
    trainer = trainer_for(
        tmp_path, max_steps=3, logging_strategy="steps", logging_steps=1, eval_rows=4
    )
    good = weights_of(trainer.model)
    _poison(trainer, float("nan"))
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    trainer.model.load_state_dict(good)
    assert np.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("save", ["steps", "no"])
def test_weights_broken_by_the_last_update_are_not_saved(tmp_path: Path, save: str) -> None:
    class Blow(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                kwargs["model"].classifier.weight.grad[0, 0] = float("nan")

    trainer = trainer_for(
        tmp_path,
        callbacks=[Blow()],
        max_grad_norm=0,
        max_steps=3,
        save_strategy=save,
        save_steps=3,
    )
    told = r"weight 'classifier\.weight' became NaN or infinite at step 3; nothing was saved"
    if save == "steps":
        with pytest.raises(NonFiniteLossError, match=told):
            trainer.train()
    else:
        trainer.train()
        with pytest.raises(NonFiniteLossError, match=told):
            trainer.save_model(str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# Sample ids.


def test_sample_ids_reach_the_teacher(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, max_steps=2)
    trainer.train_dataset = [
        {**row, SAMPLE_IDS: torch.tensor(i)} for i, row in enumerate(trainer.train_dataset)
    ]
    seen: list[Any] = []
    real = trainer.distiller.teacher.get

    def get(batch: Any, keys: Any, want: Any) -> Any:
        seen.append(keys)
        return real(batch, keys, want)

    trainer.distiller.teacher.get = get
    trainer.train()
    assert len(seen) == 2
    assert all(isinstance(keys, Tensor) and keys.shape == (4,) for keys in seen)


@pytest.mark.parametrize("family", FAMILIES)
def test_sample_ids_do_no_harm_in_evaluation(tmp_path: Path, family: str) -> None:
    trainer = trainer_for(tmp_path, family=family, remove_unused_columns=False)
    data = [{**row, SAMPLE_IDS: torch.tensor(i)} for i, row in enumerate(rows(4))]
    assert trainer.evaluate(data)["eval_loss"] == trainer.evaluate(rows(4))["eval_loss"]


# Precision.


@pytest.mark.parametrize("kind", ["fp16", "fp16_full_eval", "bf16_full_eval"])
def test_float16_and_rounded_latent_weights_are_refused(tmp_path: Path, kind: str) -> None:
    student, teacher = pair("bert")
    args = QATArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    setattr(args, kind, True)
    with pytest.raises(UnsupportedModelError, match=r"or with bf16=True; leave out fp16"):
        QATTrainer(student, teacher, args=args, train_dataset=rows())


def test_bf16_is_close_to_float32(tmp_path: Path) -> None:
    results: dict[bool, list[float]] = {}
    for bf16 in (False, True):
        trainer = trainer_for(
            tmp_path / str(bf16),
            schedule=Schedule.gradual(6),
            rate=0.0,
            bf16=bf16,
            gradient_accumulation_steps=2,
            logging_strategy="steps",
            logging_steps=1,
            eval_rows=6,
        )
        dtypes: set[torch.dtype] = set()

        def note(module: Any, args: Any, out: Tensor, dtypes: set[torch.dtype] = dtypes) -> None:
            dtypes.add(out.dtype)

        teacher = trainer.distiller.teacher.model
        for model in (trainer.model, teacher):
            model.bert.encoder.layer[0].output.dense.register_forward_hook(note)
        trainer.train()
        assert dtypes == {torch.bfloat16 if bf16 else torch.float32}
        assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
        assert all(
            value.dtype == torch.float32
            for state in trainer.optimizer.state.values()
            for value in state.values()
        )
        results[bf16] = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert results[True] != results[False]
    assert results[True] == pytest.approx(results[False], rel=0.1)


def test_bf16_saves_what_float32_would(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path / "run", bf16=True, max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    tutelage.save(copy.deepcopy(trainer.model), tmp_path / "again")
    batch = {k: v for k, v in make_batch(5, 9, seed=3).items() if k != "labels"}
    plain = pair("bert")[0]
    plain.load_state_dict(trainer.model.state_dict())
    with torch.no_grad():
        expected = plain.eval()(**batch).logits
        assert torch.equal(tutelage.load(tmp_path / "out")(**batch).logits, expected)
        assert torch.equal(tutelage.load(tmp_path / "again")(**batch).logits, expected)


# Refusals.


def test_an_unprepared_student_is_refused(tmp_path: Path) -> None:
    _, teacher = pair("bert")
    with pytest.raises(UnsupportedModelError, match=r"call tutelage\.prepare"):
        trainer_for(tmp_path, student=copy.deepcopy(teacher), teacher=teacher)


def test_a_teacher_of_another_depth_is_refused(tmp_path: Path) -> None:
    student, _ = pair("bert", layers=2)
    _, teacher = pair("bert", layers=3)
    with pytest.raises(IncompatibleTeacherError, match="same depth"):
        trainer_for(tmp_path, student=student, teacher=teacher)


# The result.


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_the_saved_model_is_packed_and_equals_the_student(tmp_path: Path, family: str) -> None:
    trainer = trainer_for(tmp_path / "run", family=family, schedule=Schedule.gradual(3))
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"model.safetensors", "config.json", "README.md"} <= names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "tutelage"
    loaded = tutelage.load(tmp_path / "out")
    batch = {k: v for k, v in make_batch(5, 9, seed=3).items() if k != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer.model.eval()(**batch).logits)
    from transformers import AutoModelForSequenceClassification

    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, loaded(**batch).logits)


def test_the_teacher_is_not_changed_by_training(tmp_path: Path) -> None:
    student, teacher = pair("bert")
    before = weights_of(teacher)
    trainer = trainer_for(tmp_path, student=student, teacher=teacher, schedule=Schedule.gradual(6))
    trainer.train()
    assert differing(before, weights_of(teacher)) == []
    assert differing(before, weights_of(student)) != []


def test_torch_compile_is_refused_in_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(tmp_path)
    trainer.args.torch_compile = True
    _limits.check_parallelism(trainer)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(UnsupportedModelError, match="leave out torch_compile"):
        _limits.check_parallelism(trainer)


class TestRamp:
    def test_goes_linearly_to_quantized_and_evaluation_always_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[float | None] = []
        trainer = trainer_for(
            tmp_path, max_steps=8, ramp=0.5, eval_strategy="steps", eval_steps=2, eval_rows=4
        )
        layer = next(m for m in trainer.model.modules() if isinstance(m, tutelage.nn.QuantLinear))
        layer.register_forward_pre_hook(
            lambda module, args: seen.append(
                None if (found := gate_of(module)) is None else float(found)
            )
        )
        trainer.train()
        steps = [0.2, 0.4, None, 0.6, 0.8, None, None, None, None, None, None, None]
        assert seen == [None if s is None else pytest.approx(s) for s in steps]

    def test_resumed_it_ends_as_if_never_stopped(self, tmp_path: Path) -> None:
        settings = {"max_steps": 8, "ramp": 0.75, "save_strategy": "steps", "save_steps": 1}
        straight = trainer_for(tmp_path / "a", **settings)
        straight.train()
        for step in (2, 5, 6):
            checkpoint = tmp_path / "a" / f"checkpoint-{step}"
            resumed = trainer_for(tmp_path / "b", **settings)
            resumed.train(resume_from_checkpoint=str(checkpoint))
            assert differing(weights_of(straight.model), weights_of(resumed.model)) == []
            other = trainer_for(tmp_path / "c", **{**settings, "ramp": 0.5})
            with pytest.raises(CheckpointError, match="ramp"):
                other.train(resume_from_checkpoint=str(checkpoint))

    def test_is_a_part_of_the_training(self, tmp_path: Path) -> None:
        for ramp in (-0.1, 1.1):
            with pytest.raises(RecipeError, match=r"ramp is .*; use 0 to 1"):
                tutelage.QATArguments(str(tmp_path), ramp=ramp)
