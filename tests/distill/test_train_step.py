"""TrainStep equals a loop written by hand and touches only what has a gradient."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers import ENCODER_TERMS, FAMILIES, RefuseSync, differing, make_batch, pair, weights_of
from tutelage import Distiller, Schedule, TrainStep, losses
from tutelage.distill import LiveTeacher, LossValue
from tutelage.distill.losses import Losses, WeightedTerm
from tutelage.errors import DataError, RecipeError
from tutelage.intervention import stages
from tutelage.train import BertAdam


def _optimizer(kind: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    return BertAdam(model.parameters(), lr=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["adamw", "bert_adam"])
@pytest.mark.parametrize("norm", [1.0, None], ids=["clipped", "unclipped"])
def test_a_whole_step_equals_a_loop_by_hand(family: str, kind: str, norm: float | None) -> None:
    student, teacher = pair(family)
    other = copy.deepcopy(student)
    schedule, batches = Schedule.gradual(6), [make_batch(seed=s) for s in range(8)]

    torch.manual_seed(5)
    student.train()
    optimizer = _optimizer(kind, student)
    train_step = TrainStep(Distiller(student, teacher), optimizer, max_grad_norm=norm)
    logged = [train_step(batch, schedule(t)) for t, batch in enumerate(batches)]

    torch.manual_seed(5)
    other.train()
    by_hand = _optimizer(kind, other)
    distiller = Distiller(other, teacher)
    for t, batch in enumerate(batches):
        step = distiller.step(batch, schedule(t))
        step.loss.backward()
        present = [p for p in other.parameters() if p.grad is not None]
        if norm is not None:
            whole = torch.stack([p.grad.norm() for p in present]).norm()
            for p in present:
                p.grad.mul_((norm / (whole + 1e-6)).clamp(max=1.0))
        by_hand.step()
        by_hand.zero_grad(set_to_none=True)
        assert torch.equal(logged[t]["loss"], step.loss.detach())
        assert logged[t].keys() == {"loss", *step.terms}
        assert not any(value.requires_grad for value in logged[t].values())
    assert differing(weights_of(student), weights_of(other)) == []
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["adamw", "bert_adam"])
@pytest.mark.parametrize("stage", stages())
def test_only_parameters_with_a_gradient_move(family: str, kind: str, stage: str) -> None:
    # Zero gradients instead of none would decay W_V and W_O, which rest in the published code.
    student, teacher = pair(family)
    student.train()
    distiller = Distiller(student, teacher, losses.default(local="code"))
    optimizer = _optimizer(kind, student)
    train_step = TrainStep(distiller, optimizer)
    train_step(make_batch(), "none")  # moments exist from now on
    distiller.step(make_batch(), stage).loss.backward()
    resting = {name for name, p in student.named_parameters() if p.grad is None}
    optimizer.zero_grad(set_to_none=True)
    before = weights_of(student)
    moments = {
        name: optimizer.state[p]["exp_avg"].clone()
        for name, p in student.named_parameters()
        if name in resting
    }
    train_step(make_batch(), stage)
    moved = set(differing(before, weights_of(student)))
    everything = {name for name, _ in student.named_parameters()}
    assert moved <= everything - resting
    # Key biases shift every score of a row alike: nothing else may stand still.
    assert everything - resting - moved <= {n for n in everything if n.endswith(".bias")}
    assert bool(resting) == (stage in ("attention_output", "context"))
    for name, moment in moments.items():
        assert torch.equal(
            optimizer.state[dict(student.named_parameters())[name]]["exp_avg"], moment
        )


def _gradients(model: torch.nn.Module) -> dict[str, Tensor | None]:
    found = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def _assert_equal_gradients(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert {n for n, g in found.items() if g is None} == {
        n for n, g in expected.items() if g is None
    }
    whole = torch.stack([g.norm() for g in expected.values() if g is not None]).norm()
    for name, gradient in expected.items():
        if gradient is not None:
            assert (found[name] - gradient).norm() <= 1e-6 * whole, name


_PARTS = (slice(0, 1), slice(1, 4), slice(4, 6))
_ALL = ENCODER_TERMS
_RELATIVE = tuple(name for name in ENCODER_TERMS if name.startswith("relative_"))


def _micro_batches(batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Cuts a batch in unequal parts, each as long as its longest row."""
    parts = []
    for rows in _PARTS:
        part = {key: value[rows] for key, value in batch.items()}
        length = int(part["attention_mask"].sum(-1).max())
        parts.append({k: v[:, :length] if v.dim() == 2 else v for k, v in part.items()})
    assert len({part["input_ids"].shape[1] for part in parts}) > 1
    return parts


@pytest.mark.parametrize("stage", stages())
@pytest.mark.parametrize("kind", ["default", "code", "all"])
def test_micro_batches_of_unequal_length_add_up(kind: str, stage: str) -> None:
    student, teacher = pair("bert", dropout=0.0)
    chosen = {
        "default": losses.default(),
        "code": losses.default(local="code"),
        "all": Losses.of(dict.fromkeys(sorted({*_ALL} - {*_RELATIVE}), 0.7)),
    }[kind]
    student.train()
    train_step = TrainStep(Distiller(student, teacher, chosen), None)
    batch = make_batch(6, 9)
    batch["attention_mask"][0, 7:] = 0
    batch["attention_mask"][5] = 1
    whole = train_step.accumulate(batch, stage)
    expected = _gradients(student)
    parts = _micro_batches(batch)
    counts = train_step.counts(parts, stage)
    shares = [train_step.accumulate(part, stage, counts=counts) for part in parts]
    _assert_equal_gradients(_gradients(student), expected)
    for name, value in whole.items():
        torch.testing.assert_close(sum(share[name] for share in shares), value, atol=0, rtol=2e-6)
    # Were the parts to count alike, the gradients would be others.
    for part in parts:
        train_step.accumulate(part, stage, backward=lambda loss: (loss / len(parts)).backward())
    with pytest.raises(AssertionError):
        _assert_equal_gradients(_gradients(student), expected)


def test_relative_errors_of_micro_batches_add_up_but_for_their_variances() -> None:
    student, teacher = pair("bert", dropout=0.0)
    train_step = TrainStep(Distiller(student, teacher, losses.relative()), None)
    batch = make_batch(12, 9)
    batch["attention_mask"][0] = 1
    whole = train_step.accumulate(batch, "none")
    parts = [
        {key: value[rows] for key, value in batch.items()} for rows in (slice(6), slice(6, 12))
    ]
    counts = train_step.counts(parts, "none")
    shares = [train_step.accumulate(part, "none", counts=counts) for part in parts]
    for name, value in whole.items():
        tolerance = 0.1 if name in (*_RELATIVE, "loss") else 2e-6
        torch.testing.assert_close(
            sum(share[name] for share in shares), value, atol=0, rtol=tolerance
        )


def test_unmasked_micro_batches_count_all_positions() -> None:
    student, teacher = pair("bert", "reference", dropout=0.0)
    train_step = TrainStep(Distiller(student, teacher, losses.reference(local="paper")), None)
    batch = make_batch(6, 7)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in _PARTS]
    distiller = train_step.distiller
    for stage in stages():
        counts = distiller.counts(parts, stage)
        whole = distiller.step(batch, stage)
        assert {n: float(c) for n, c in counts.items()} == {
            name: float(value.count) for name, value in whole.values.items()
        }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "no-masks"])
def test_counts_are_those_of_the_forward_pass(family: str, masks: bool) -> None:
    student, teacher = pair(family)
    distiller = Distiller(student.eval(), teacher, Losses.of(dict.fromkeys(_ALL, 1.0)))
    batches = [make_batch(n, t, seed=n) for n, t in ((1, 5), (4, 9), (3, 3))]
    if not masks:
        batches = [{k: v for k, v in b.items() if k != "attention_mask"} for b in batches]
    for stage in stages():
        steps = [distiller.step(batch, stage) for batch in batches]
        for name, count in distiller.counts(batches, stage).items():
            assert float(count) == sum(float(s.values[name].count) for s in steps), name


class _PerToken(torch.nn.Module):
    """Predicts at every token, as a token classifier does."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Any:
        found = self.model.bert(**inputs)
        return SimpleNamespace(logits=self.model.classifier(found.last_hidden_state))


def test_predictions_per_token_count_tokens() -> None:
    student, teacher = pair("bert")
    live = LiveTeacher(teacher)
    live.model = _PerToken(teacher)
    live.get = lambda batch, keys, want: (  # type: ignore[method-assign]
        live.model(**batch).logits.detach(),
        Distiller(student, teacher).teacher.get(batch, keys, want)[1],
    )
    distiller = Distiller(student, live, Losses.of({"logits": 1.0}))
    batches = [make_batch(n, t, seed=n) for n, t in ((1, 5), (4, 9))]
    steps = [distiller.step(batch, model=_PerToken(student)) for batch in batches]
    counts = distiller.counts(batches)
    assert counts["logits"] == sum(batch["attention_mask"].sum() for batch in batches)
    assert counts["logits"] == sum(step.values["logits"].count for step in steps)


def test_counting_asks_the_teacher_once_and_draws_no_random_number() -> None:
    student, teacher = pair("bert")
    distiller = Distiller(student.train(), teacher)
    calls: list[int] = []
    real = distiller.teacher.get
    distiller.teacher.get = lambda *args: calls.append(1) or real(*args)  # type: ignore[method-assign,func-returns-value]
    state = torch.get_rng_state()
    for seed in range(3):
        distiller.counts([make_batch(3, 4 + seed, seed=seed), make_batch()], "context")
    assert calls == [1]
    assert torch.equal(torch.get_rng_state(), state)


def test_counting_waits_for_no_device() -> None:
    student, teacher = pair("bert")
    train_step = TrainStep(Distiller(student, teacher), None)
    batches = [make_batch(2, 5), make_batch(3, 8)]
    with RefuseSync():
        counts = train_step.counts(batches)
        for batch in batches:
            train_step.accumulate(batch, counts=counts)


def test_a_list_of_micro_batches_is_one_step() -> None:
    student, teacher = pair("bert", dropout=0.0)
    other = copy.deepcopy(student)
    batch = make_batch(6, 9)
    parts = _micro_batches(batch)
    found = TrainStep(Distiller(student, teacher), torch.optim.SGD(student.parameters(), lr=0.1))(
        parts, "context"
    )
    whole = TrainStep(Distiller(other, teacher), torch.optim.SGD(other.parameters(), lr=0.1))(
        batch, "context"
    )
    assert found.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, atol=0, rtol=2e-6)
    for name, value in weights_of(student).items():
        torch.testing.assert_close(value, weights_of(other)[name], atol=1e-6, rtol=0)
    assert all(p.grad is None for p in student.parameters())
    with pytest.raises(DataError, match="empty list of micro-batches"):
        TrainStep(Distiller(student, teacher), None)([])


def test_one_batch_needs_no_counts() -> None:
    student, teacher = pair("bert")
    assert (
        TrainStep(Distiller(student, teacher), None).counts([make_batch()], model=student) is None
    )


def test_a_term_that_does_not_count_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Constant:
        name, requires, needs_labels = "constant", (), False

        def __call__(self, context: Any) -> LossValue:
            return LossValue(context.student_logits.sum(), 2)

    student, teacher = pair("bert")
    chosen = Losses((WeightedTerm(Constant()),))  # type: ignore[arg-type]
    train_step = TrainStep(Distiller(student, teacher, chosen), None)
    train_step.accumulate(make_batch())
    with pytest.raises(RecipeError, match=r"'constant' cannot be split.*a method count\(items\)"):
        train_step.counts([make_batch(), make_batch()])


def test_a_model_that_sees_other_items_is_refused() -> None:
    student, teacher = pair("bert")

    class Longer(torch.nn.Module):
        def forward(self, **inputs: Tensor) -> Any:
            return student(**{k: torch.cat([v, v[:, :1]], 1) for k, v in inputs.items()})

    distiller = Distiller(student, teacher, Losses.of({"hidden_states": 1.0}))
    counts = distiller.counts([make_batch(4, 7)])
    with pytest.raises(DataError, match="has 8 positions, the batch's mask 7"):
        distiller.step(make_batch(4, 7), model=Longer(), counts=counts)
    with pytest.raises(DataError, match="holds no tensor"):
        distiller.counts([{"labels": torch.zeros(3)}])


def test_a_backward_of_ones_own_gets_the_share() -> None:
    student, teacher = pair("bert")
    student.eval()
    train_step = TrainStep(Distiller(student, teacher), None)
    seen: list[Any] = []
    batch = make_batch()
    counts = train_step.counts([batch] * 4, "context")
    terms = train_step.accumulate(batch, "context", backward=seen.append, counts=counts)
    assert len(seen) == 1
    assert seen[0].requires_grad
    assert torch.equal(seen[0].detach(), terms["loss"])
    whole = train_step.accumulate(batch, "context", backward=lambda loss: None)
    for name, value in whole.items():
        torch.testing.assert_close(terms[name] * 4, value)
    assert all(p.grad is None for p in student.parameters())


def test_progress_and_the_wrapped_model_are_handed_on() -> None:
    student, teacher = pair("bert")
    distiller = Distiller(student, teacher)
    seen: dict[str, Any] = {}
    real = distiller.step

    def spy(batch: Any, stage: str, **options: Any) -> Any:
        seen.update(options, stage=stage)
        return real(batch, stage, **options)

    distiller.step = spy  # type: ignore[method-assign,assignment]
    progress = torch.tensor(0.25)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    TrainStep(distiller, optimizer)(make_batch(), "context", progress=progress, model=student)
    assert seen == {"progress": progress, "model": student, "stage": "context", "counts": None}


def test_updating_without_an_optimizer_is_refused() -> None:
    student, teacher = pair("bert")
    with pytest.raises(ValueError, match="no optimizer; pass one"):
        TrainStep(Distiller(student, teacher), None).update()


def test_training_lowers_the_loss() -> None:
    student, teacher = pair("bert", dropout=0.0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    train_step = TrainStep(Distiller(student, teacher), optimizer)
    batch = make_batch(8, 8)
    found = [train_step(batch)["loss"].item() for _ in range(30)]
    assert found[-1] < 0.7 * found[0]
