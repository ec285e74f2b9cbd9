from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import BertForQuestionAnswering, BertForTokenClassification

import tutelage
from helpers import inputs_of, make_batch, redraw, tiny_config
from tutelage.distill import LabelCrossEntropy, Logits
from tutelage.distill._context import StepContext
from tutelage.distill._teacher import prediction
from tutelage.errors import DataError


def context(
    student: torch.Tensor, teacher: torch.Tensor, mask: Any = None, labels: Any = None
) -> StepContext:
    return StepContext(
        student={},
        teacher={},
        student_logits=student,
        teacher_logits=teacher,
        has_logits=True,
        token_mask=mask,
        labels=labels,
        stage="none",
        progress=None,
    )


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(sum(math.exp(value - top) for value in row)) + top
    return [value - total for value in row]


@pytest.mark.parametrize("entropy", [False, True])
def test_spans_are_compared_over_real_tokens(entropy: bool) -> None:
    student, teacher = torch.randn(3, 2, 5) * 3, torch.randn(3, 2, 5) * 3
    lengths = [5, 3, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    wanted = 0.0
    for row, length in enumerate(lengths):
        for side in range(2):
            log_q = log_softmax(student[row, side, :length].tolist())
            log_p = log_softmax(teacher[row, side, :length].tolist())
            for p, q in zip(log_p, log_q, strict=True):
                wanted += math.exp(p) * ((0.0 if entropy else p) - q)
    student.requires_grad_(True)
    value = Logits(entropy=entropy)(context(student, teacher, mask))
    assert value.count == 6
    assert value.sum.item() == pytest.approx(wanted, rel=1e-5)
    value.sum.backward()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert not student.grad[~mask.unsqueeze(1).expand(3, 2, 5)].any()


def test_padding_of_a_batch_changes_no_loss_of_an_answer() -> None:
    teacher = BertForQuestionAnswering(tiny_config("bert", labels=2, dropout=0.0))
    redraw(teacher)
    student: Any = BertForQuestionAnswering(teacher.config)
    student.load_state_dict(teacher.state_dict())
    tutelage.prepare(student, tutelage.Scheme.preset("ternary-a8"))
    distiller = tutelage.Distiller(student, teacher)
    batch = inputs_of(make_batch(4, 7))
    step = distiller.step(batch)
    assert step.student_logits.shape == (4, 2, 7)
    assert step.terms["logits"] > 1e-4
    longer = {
        key: torch.nn.functional.pad(value, (0, 3), value=1 if key == "input_ids" else 0)
        for key, value in batch.items()
    }
    padded = distiller.step(longer)
    assert padded.terms["logits"].item() == pytest.approx(step.terms["logits"].item(), rel=1e-4)
    step.loss.backward()
    assert student.qa_outputs.weight.grad.abs().sum() > 0


def test_predictions_of_an_answer_are_stacked() -> None:
    model = BertForQuestionAnswering(tiny_config("bert", labels=2)).eval()
    with torch.no_grad():
        output = model(**inputs_of(make_batch(2, 5)))
    values, has_logits = prediction(output)
    assert has_logits
    assert torch.equal(values[:, 0], output.start_logits)
    assert torch.equal(values[:, 1], output.end_logits)


def test_labels_of_an_answer() -> None:
    logits = torch.randn(2, 2, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    labels = torch.tensor([[1, 4], [0, 2]])
    value = LabelCrossEntropy()(context(logits, logits, mask, labels))
    wanted = -sum(
        log_softmax(logits[row, side, : 5 if row == 0 else 3].tolist())[labels[row, side]]
        for row in range(2)
        for side in range(2)
    )
    assert value.sum.item() == pytest.approx(wanted, rel=1e-5)
    assert value.count == 4


@pytest.mark.parametrize("shift", [False, True])
def test_labels_of_tokens(shift: bool) -> None:
    logits = torch.randn(2, 4, 3)
    labels = torch.tensor([[0, 2, 1, 1], [2, 0, -100, -100]])
    value = LabelCrossEntropy(shift=shift)(context(logits, logits, None, labels))
    wanted, count = 0.0, 0
    for row in range(2):
        for at in range(4):
            target = labels[row, at].item()
            source = at - int(shift)
            if target != -100 and source >= 0:
                wanted -= log_softmax(logits[row, source].tolist())[int(target)]
                count += 1
    assert value.sum.item() == pytest.approx(wanted, rel=1e-5)
    assert value.count == count


def test_labels_of_tokens_are_not_guessed() -> None:
    logits, labels = torch.randn(2, 4, 3), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(DataError, match=r"LabelCrossEntropy\(shift=True\) for a causal"):
        LabelCrossEntropy()(context(logits, logits, None, labels))


def test_predictions_of_tokens_are_compared_at_real_tokens() -> None:
    teacher = BertForTokenClassification(tiny_config("bert", dropout=0.0))
    redraw(teacher)
    student: Any = BertForTokenClassification(teacher.config)
    student.load_state_dict(teacher.state_dict())
    tutelage.prepare(student, tutelage.Scheme.preset("ternary-a8"))
    batch = make_batch(4, 7)
    step = tutelage.Distiller(student, teacher).step(inputs_of(batch))
    assert step.values["logits"].count == batch["attention_mask"].sum()


@pytest.mark.parametrize("stage", ["none", "attention_output"])
def test_parts_of_a_batch_of_questions_add_up(stage: str) -> None:
    teacher = BertForQuestionAnswering(tiny_config("bert", labels=2, dropout=0.0))
    redraw(teacher)
    student: Any = BertForQuestionAnswering(teacher.config)
    student.load_state_dict(teacher.state_dict())
    tutelage.prepare(student, tutelage.Scheme.preset("ternary-a8"))
    distiller = tutelage.Distiller(student, teacher)
    batch = inputs_of(make_batch(5, 7))
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(2), slice(2, 5))]
    counts = distiller.counts(parts, stage)
    assert counts["logits"] == 10
    shares = [distiller.step(part, stage, counts=counts).shares["logits"] for part in parts]
    whole = distiller.step(batch, stage).terms["logits"]
    assert sum(shares).item() == pytest.approx(whole.item(), rel=1e-5)
