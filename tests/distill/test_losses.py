"""Loss terms against float64 loops written from the formulas, and the rules of sets of losses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helpers import FAMILIES, STAGES, make_batch, pair
from tutelage import Distiller, losses
from tutelage.distill import (
    AttentionMapKL,
    AttentionScores,
    LabelCrossEntropy,
    Logits,
    LossTerm,
    LossValue,
    SignalMSE,
    StepContext,
)
from tutelage.distill._token_scaled import TokenScaledLogits
from tutelage.distill.losses import Losses, WeightedTerm
from tutelage.errors import DataError, RecipeError, UnsupportedModelError
from tutelage.intervention import stages


@st.composite
def _contexts(draw: st.DrawFn, *, masks: bool | None = None) -> StepContext:
    """Random signals of random shapes; real tokens need not be on the left."""
    batch, tokens, width = (draw(st.integers(1, n)) for n in (3, 4, 3))
    heads, blocks, classes = draw(st.integers(1, 2)), draw(st.integers(1, 2)), 3
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    mask = None
    if draw(st.booleans()) if masks is None else masks:
        flat = draw(st.lists(st.booleans(), min_size=batch * tokens, max_size=batch * tokens))
        mask = torch.tensor(flat).reshape(batch, tokens)
        mask[:, draw(st.integers(0, tokens - 1))] = True

    def signals() -> Any:
        scores = [30 * normal(batch, heads, tokens, tokens) for _ in range(blocks)]
        blocked = scores
        if mask is not None:
            blocked = [s.masked_fill(~mask[:, None, None, :], -torch.inf) for s in scores]
        return {
            "embeddings": (normal(batch, tokens, width),),
            "attention_scores": tuple(scores),
            "attention_map": tuple((s / 30).softmax(-1) for s in blocked),
            **{
                site: tuple(normal(batch, tokens, width) for _ in range(blocks))
                for site in ("context", "attention_output", "ffn_input", "block_output")
            },
        }

    return StepContext(
        student=signals(),
        teacher=signals(),
        student_logits=3 * normal(batch, classes),
        teacher_logits=3 * normal(batch, classes),
        has_logits=True,
        token_mask=mask,
        labels=torch.randint(classes, (batch,), generator=made),
        stage="none",
        progress=None,
    )


def _with(context: StepContext, **changes: Any) -> StepContext:
    return StepContext(**{**context.__dict__, **changes})


def _mean(value: LossValue) -> float:
    return float(value.sum) / float(value.count)


def _real(context: StepContext) -> list[list[bool]]:
    batch, tokens = context.student["embeddings"][0].shape[:2]
    if context.token_mask is None:
        return [[True] * tokens for _ in range(batch)]
    return context.token_mask.tolist()


def _loop_mse(context: StepContext, sites: tuple[str, ...], masked: bool) -> float:
    """Sum over layers of mean over (tokens, width) of (S - T)^2."""
    real, loss = _real(context), 0.0
    for site in sites:
        for own, other in zip(context.student[site], context.teacher[site], strict=True):  # type: ignore[index]
            total, count = 0.0, 0
            for b, (s_rows, t_rows) in enumerate(zip(own.tolist(), other.tolist(), strict=True)):
                for i, (s_row, t_row) in enumerate(zip(s_rows, t_rows, strict=True)):
                    if masked and not real[b][i]:
                        continue
                    for s, t in zip(s_row, t_row, strict=True):
                        total, count = total + (s - t) ** 2, count + 1
            loss += total / count
    return loss


@given(context=_contexts(), masked=st.booleans(), embeddings=st.booleans())
def test_signal_mse(context: StepContext, masked: bool, embeddings: bool) -> None:
    term = SignalMSE("x", "block_output", masked=masked, embeddings=embeddings)
    sites = ("embeddings", "block_output") if embeddings else ("block_output",)
    assert term.requires == sites
    assert _mean(term(context)) == pytest.approx(_loop_mse(context, sites, masked), rel=1e-5)


def _loop_scores(context: StepContext, masked: bool) -> float:
    real, loss = _real(context), 0.0
    name: Any = "attention_scores"
    for own, other in zip(context.student[name], context.teacher[name], strict=True):
        batch, heads, queries, keys = own.shape
        own, other = own.tolist(), other.tolist()
        total, count = 0.0, 0
        for b in range(batch):
            for h in range(heads):
                for i in range(queries):
                    for j in range(keys):
                        s, t = own[b][h][i][j], other[b][h][i][j]
                        if masked:
                            if not (real[b][i] and real[b][j]):
                                continue
                        else:
                            # The published rule: S + (1 - mask)(-1e4), then 0 where <= -1e2.
                            s, t = (x + (0.0 if real[b][j] else -1e4) for x in (s, t))
                            s, t = (0.0 if x <= -1e2 else x for x in (s, t))
                        total, count = total + (s - t) ** 2, count + 1
        loss += total / count
    return loss


@given(context=_contexts(), masked=st.booleans())
def test_attention_scores(context: StepContext, masked: bool) -> None:
    value = AttentionScores(masked=masked)(context)
    assert _mean(value) == pytest.approx(_loop_scores(context, masked), rel=1e-5)


def test_published_scores_below_minus_hundred_count_as_zero_on_each_side() -> None:
    own = torch.tensor([[[[-100.0, -99.5], [-250.0, 3.0]]]])
    other = torch.tensor([[[[2.0, -99.0], [-300.0, -101.0]]]])
    context = _context(student={"attention_scores": (own,)}, teacher={"attention_scores": (other,)})
    value = AttentionScores(masked=False)(context)
    assert _mean(value) == pytest.approx((2.0**2 + 0.5**2 + 0.0 + 3.0**2) / 4)
    assert own[0, 0, 1, 0] == -250.0  # the signals are not touched


def _context(**changes: Any) -> StepContext:
    base: dict[str, Any] = {
        "student": {},
        "teacher": {},
        "student_logits": torch.zeros(2, 3),
        "teacher_logits": torch.zeros(2, 3),
        "has_logits": True,
        "token_mask": None,
        "labels": None,
        "stage": "none",
        "progress": None,
    }
    return StepContext(**{**base, **changes})


def _loop_map(context: StepContext) -> float:
    """Sum over layers of KL(P_T || P_S), clamped at 1e-8, mean over heads and real queries."""
    real, loss = _real(context), 0.0
    name: Any = "attention_map"
    for own, other in zip(context.student[name], context.teacher[name], strict=True):
        batch, heads, queries, keys = own.shape
        own, other = own.tolist(), other.tolist()
        total, count = 0.0, 0
        for b in range(batch):
            for h in range(heads):
                for i in range(queries):
                    if not real[b][i]:
                        continue
                    count += 1
                    for j in range(keys):
                        t, s = max(other[b][h][i][j], 1e-8), max(own[b][h][i][j], 1e-8)
                        total += t * math.log(t / s)
        loss += total / count
    return loss


@given(context=_contexts())
def test_attention_map_kl(context: StepContext) -> None:
    value = AttentionMapKL()(context)
    assert _mean(value) == pytest.approx(_loop_map(context), rel=1e-4, abs=1e-6)


def _softmax(row: list[float]) -> list[float]:
    top = max(row)
    powers = [math.exp(x - top) for x in row]
    return [p / sum(powers) for p in powers]


def _loop_logits(context: StepContext, entropy: bool) -> float:
    rows = zip(context.student_logits.tolist(), context.teacher_logits.tolist(), strict=True)
    each = []
    for s_row, t_row in rows:
        s, t = _softmax(s_row), _softmax(t_row)
        cross = -sum(p * math.log(q) for p, q in zip(t, s, strict=True))
        own = -sum(p * math.log(p) for p in t)
        each.append(cross if entropy else cross - own)
    return sum(each) / len(each)


@given(context=_contexts(masks=False), entropy=st.booleans())
def test_logits(context: StepContext, entropy: bool) -> None:
    value = Logits(entropy=entropy)(context)
    assert _mean(value) == pytest.approx(_loop_logits(context, entropy), rel=1e-4, abs=1e-6)


@given(context=_contexts(masks=False))
def test_divergence_and_cross_entropy_have_one_gradient(context: StepContext) -> None:
    gradients = []
    for entropy in (False, True):
        own = context.student_logits.clone().requires_grad_()
        Logits(entropy=entropy)(_with(context, student_logits=own)).sum.backward()
        gradients.append(own.grad)
        expected = own.softmax(-1) - context.teacher_logits.softmax(-1)
        torch.testing.assert_close(own.grad, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)


def test_equal_predictions_cost_nothing() -> None:
    logits = torch.randn(5, 4)
    context = _context(student_logits=logits, teacher_logits=logits.clone())
    assert abs(_mean(Logits()(context))) < 1e-6
    assert _mean(Logits(entropy=True)(context)) > 0.1


def test_regression_is_the_squared_error() -> None:
    own, other = torch.randn(5, 1), torch.randn(5, 1)
    expected = sum((s - t) ** 2 for [s], [t] in zip(own.tolist(), other.tolist(), strict=True)) / 5
    for term in (Logits(), Logits(entropy=True)):
        value = term(_context(student_logits=own, teacher_logits=other))
        assert _mean(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("has_logits", [True, False], ids=["logits", "hidden"])
def test_predictions_per_token_are_compared_at_real_tokens(has_logits: bool) -> None:
    own, other = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    value = Logits()(
        _context(student_logits=own, teacher_logits=other, token_mask=mask, has_logits=has_logits)
    )
    total, count = 0.0, 0
    for b, i in mask.nonzero().tolist():
        s, t, count = own[b, i].tolist(), other[b, i].tolist(), count + 1
        if has_logits:
            p, q = _softmax(t), _softmax(s)
            total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        else:
            total += sum((x - y) ** 2 for x, y in zip(s, t, strict=True)) / 4
    assert _mean(value) == pytest.approx(total / count, rel=1e-5)


def test_label_cross_entropy() -> None:
    logits, labels = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    expected = -sum(
        math.log(_softmax(row)[label])
        for row, label in zip(logits.tolist(), labels.tolist(), strict=True)
    )
    value = LabelCrossEntropy()(_context(student_logits=logits, labels=labels))
    assert float(value.sum) == pytest.approx(expected, rel=1e-5)
    assert value.count == 4
    numbers = torch.randn(4)
    value = LabelCrossEntropy()(_context(student_logits=logits[:, :1], labels=numbers))
    expected = sum(
        (s - t) ** 2 for s, t in zip(logits[:, 0].tolist(), numbers.tolist(), strict=True)
    )
    assert _mean(value) == pytest.approx(expected / 4, rel=1e-5)


def test_labels_must_be_there() -> None:
    with pytest.raises(DataError, match="'labels' needs 'labels' in every batch"):
        LabelCrossEntropy()(_context())


_TERMS = (
    *(SignalMSE("x", "context", masked=m, embeddings=e) for m in (True, False) for e in (0, 1)),
    AttentionScores(),
    AttentionScores(masked=False),
    AttentionMapKL(),
    Logits(),
    Logits(entropy=True),
    LabelCrossEntropy(),
)


@pytest.mark.parametrize("term", _TERMS, ids=lambda t: f"{type(t).__name__}-{vars(t)}")
def test_gradients_equal_numerical_ones(term: LossTerm) -> None:
    made = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made, dtype=torch.float64)

    mask = torch.tensor([[True, True, False], [True, False, False]])
    teacher: Any = {
        "embeddings": (draw(2, 3, 2),),
        "context": (draw(2, 3, 2),),
        "attention_scores": (draw(2, 1, 3, 3),),
        "attention_map": (draw(2, 1, 3, 3).softmax(-1),),
    }
    leaves = [value[0].clone() + 0.1 for value in teacher.values()] + [draw(2, 3)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    other = draw(2, 3)

    def loss(*own: Tensor) -> Tensor:
        student = {site: (x,) for site, x in zip(teacher, own, strict=False)}
        value = term(
            _context(
                student=student,
                teacher=teacher,
                student_logits=own[-1],
                teacher_logits=other,
                token_mask=mask,
                labels=torch.tensor([0, 2]),
            )
        )
        return value.sum / value.count

    loss(*leaves).backward()
    for leaf in leaves:
        if leaf.grad is None:
            continue
        step = 1e-3  # logits are computed in float32
        flat = leaf.detach().reshape(-1)
        for k in range(flat.numel()):
            ends = []
            for sign in (1, -1):
                moved = flat.clone()
                moved[k] += sign * step
                ends.append(
                    loss(*(moved.view_as(x) if x is leaf else x.detach() for x in leaves)).item()
                )
            numerical = (ends[0] - ends[1]) / (2 * step)
            assert leaf.grad.reshape(-1)[k].item() == pytest.approx(numerical, rel=1e-2, abs=2e-3)


@given(context=_contexts(masks=True))
def test_default_terms_do_not_see_padded_positions(context: StepContext) -> None:
    mask = context.token_mask
    assert mask is not None

    def disturb(signals: Any) -> Any:
        out = {}
        for site, tensors in signals.items():
            if tensors[0].dim() == 3:
                hidden = ~mask[..., None]
            else:
                hidden = ~(mask[:, None, :, None] & mask[:, None, None, :])
            if site == "attention_map":
                hidden = ~mask[:, None, :, None]
            out[site] = tuple(
                torch.where(hidden, torch.rand_like(t) if site == "attention_map" else 1e3, t)
                for t in tensors
            )
        return out

    other = _with(context, student=disturb(context.student))
    for weighted in (*losses.default().terms, WeightedTerm(AttentionMapKL())):
        before, after = weighted.term(context), weighted.term(other)
        assert torch.equal(before.sum, after.sum), weighted.term.name
        assert float(before.count) == float(after.count)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("stage", stages())
def test_padded_ids_change_no_default_loss(family: str, stage: str) -> None:
    student, teacher = pair(family)
    student.eval()
    distiller = Distiller(student, teacher)
    batch = make_batch(5, 8)
    other = dict(batch)
    noise = make_batch(5, 8, padded=False, seed=77)["input_ids"]
    if family == "roberta":  # counts positions from the ids: padding must stay padding or real
        noise = noise.clamp(min=3)
    other["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], noise)
    assert not torch.equal(other["input_ids"], batch["input_ids"])
    first, second = distiller.step(batch, stage), distiller.step(other, stage)
    assert torch.equal(first.student_logits, second.student_logits)
    assert torch.equal(first.teacher_logits, second.teacher_logits)
    for name, value in first.terms.items():
        assert torch.equal(value, second.terms[name]), name


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_losses_do_see_padding(family: str) -> None:
    # The published quirk must not be lost by accident.
    student, teacher = pair(family, "reference")
    student.eval()
    distiller = Distiller(student, teacher, losses.reference())
    batch = make_batch(4, 7)
    longer = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 5), value=1),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 5)),
    }
    short, long = distiller.step(batch), distiller.step(longer)
    assert abs(long.terms["hidden_states"] / short.terms["hidden_states"] - 1) > 1e-3
    assert long.terms["attention_scores"] < 0.9 * short.terms["attention_scores"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["default", "everything"])
@pytest.mark.parametrize("stage", stages())
def test_parts_of_a_batch_combine_exactly(family: str, kind: str, stage: str) -> None:
    student, teacher = pair(family)
    student.eval()
    chosen = losses.default()
    if kind == "everything":
        names = (*_names(chosen), "attention_map", "attention_output_local")
        chosen = Losses.of(dict.fromkeys((*names, "context_local", "labels"), 0.5))
    distiller = Distiller(student, teacher, chosen)
    batch = make_batch(6, 7)
    whole = distiller.step(batch, stage)
    cut = 2  # unequal parts, with unequal numbers of real tokens
    parts = [
        distiller.step({key: value[rows] for key, value in batch.items()}, stage)
        for rows in (slice(cut), slice(cut, None))
    ]
    for name, mean in whole.terms.items():
        total = sum(part.values[name].sum.item() for part in parts)
        count = sum(float(part.values[name].count) for part in parts)
        assert total / count == pytest.approx(mean.item(), rel=1e-6), name
        assert count == float(whole.values[name].count)


def _names(chosen: Losses) -> list[str]:
    return [weighted.term.name for weighted in chosen.terms]


@pytest.mark.parametrize("stage", stages())
def test_loss_is_the_weighted_sum(stage: str) -> None:
    student, teacher = pair("bert")
    weights = {
        "logits": 0.3,
        "hidden_states": 2.0,
        "attention_output": 0.0,
        "attention_scores": 1.7,
        "labels": 0.11,
    }
    step = Distiller(student, teacher, Losses.of(weights)).step(make_batch(), stage)
    extra = set(step.terms) - set(weights)
    assert len(extra) == (stage in ("attention_output", "context"))
    expected = sum(weights.get(name, 1.0) * value.item() for name, value in step.terms.items())
    assert step.loss.item() == pytest.approx(expected, rel=1e-6)
    for name, value in step.values.items():
        mean = value.sum.item() / float(value.count)
        assert mean == pytest.approx(step.terms[name].item(), rel=1e-6)


def _loop_token_scaled(
    student: Tensor, teacher: Tensor, ids: Tensor, mask: Tensor | None, temperature: float
) -> float:
    total = 0.0
    for row in range(len(ids)):
        surprise, divergence = [], []
        for t in range(ids.shape[1] - 1):
            if mask is not None and not (mask[row, t] and mask[row, t + 1]):
                continue
            p = teacher[row, t].double().softmax(-1).tolist()
            q = student[row, t].double().softmax(-1).tolist()
            surprise.append(-math.log(p[int(ids[row, t + 1])]) / temperature)
            divergence.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
        scale = sum(math.exp(s) for s in surprise)
        total += sum(math.exp(s) / scale * d for s, d in zip(surprise, divergence, strict=True))
    return total / len(ids)


@given(_contexts(), st.floats(0.1, 20.0))
def test_token_scaled_logits(context: StepContext, temperature: float) -> None:
    made = torch.Generator().manual_seed(3)
    rows, tokens = context.student["embeddings"][0].shape[:2]
    student, teacher = (3 * torch.randn(rows, tokens, 5, generator=made) for _ in range(2))
    ids = torch.randint(5, (rows, tokens), generator=made)
    context = _with(
        context, student_logits=student, teacher_logits=teacher, token_ids=ids, stage="none"
    )
    value = TokenScaledLogits(temperature=temperature)(context)
    expected = _loop_token_scaled(student, teacher, ids, context.token_mask, temperature)
    assert _mean(value) == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_token_scaled_logits_need_a_language_model() -> None:
    student, teacher = pair("bert")
    distiller = Distiller(student, teacher, Losses.of({"token_scaled_logits": 1.0}))
    with pytest.raises(UnsupportedModelError, match="prediction of the next token at every token"):
        distiller.step(make_batch())


# Sets of losses.


def test_published_and_default_terms() -> None:
    names = ["logits", "hidden_states", "attention_output", "attention_scores"]
    assert _names(losses.default()) == _names(losses.reference()) == names
    assert [w.weight for w in losses.default().terms] == [1.0, 3.0, 3.0, 10.0]
    assert [w.weight for w in losses.reference().terms] == [1.0] * 4
    assert losses.default().local == "paper"
    assert losses.reference().local == "code"
    assert losses.default(local="code").local == "code"
    assert losses.reference().with_local("paper").local == "paper"


def test_every_name_makes_a_term_of_that_name() -> None:
    for name in losses._TERMS:
        made = losses.term(name)
        assert isinstance(made, LossTerm)
        assert made.name == name


@pytest.mark.parametrize(
    ("make", "message"),
    [
        pytest.param(lambda: Losses(()), "at least one term, such as 'logits'", id="empty"),
        pytest.param(lambda: Losses.of({}), "at least one term", id="empty-names"),
        pytest.param(
            lambda: Losses((WeightedTerm(Logits()), WeightedTerm(Logits()))),
            "the loss term 'logits' is listed twice; list it once",
            id="duplicate",
        ),
        pytest.param(
            lambda: Losses.of({"hidden_state": 1.0}),
            r"no loss term 'hidden_state'; use one of 'logits'.*mean 'hidden_states'\?",
            id="unknown-with-hint",
        ),
        pytest.param(
            lambda: Losses.of({"zzz": 1.0}),
            r"no loss term 'zzz'; use one of .*'token_scaled_logits'\.$",
            id="odd",
        ),
        pytest.param(
            lambda: losses.default(local="papers"),  # type: ignore[arg-type]
            "local is 'papers'; use 'paper' or 'code'",
            id="local",
        ),
    ],
)
def test_invalid_sets_are_refused(make: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make()


def test_a_registered_term_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_TERMS", dict(losses._TERMS))

    class Constant:
        name, requires, needs_labels = "constant", (), False

        def __call__(self, context: StepContext) -> LossValue:
            return LossValue(context.student_logits.sum() * 0 + 6.0, 2)

    losses.register("constant", Constant)
    student, teacher = pair("bert")
    step = Distiller(student, teacher, Losses.of({"constant": 2.0})).step(make_batch())
    assert step.loss.item() == 6.0
    with pytest.raises(ValueError, match="the loss term 'constant' exists already"):
        losses.register("constant", Constant)


_LOCAL = {
    "attention_output": "attention_output_local",
    "context": "context_local",
    "attention_map": "attention_scores",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("names", [("logits",), ("logits", "hidden_states"), ("labels",)], ids=str)
def test_a_set_is_completed_by_the_local_term(stage: str, names: tuple[str, ...]) -> None:
    chosen = Losses.of(dict.fromkeys(names, 0.5))
    assert [w.term.name for w in chosen.at(stage)] == [*names, _LOCAL[stage]]
    assert chosen.at(stage)[-1].weight == 1.0
    assert chosen.at("none") == chosen.terms


@pytest.mark.parametrize("stage", STAGES)
def test_a_complete_set_is_left_alone(stage: str) -> None:
    chosen = Losses.of({"logits": 1.0, _LOCAL[stage]: 0.2})
    assert chosen.at(stage) == chosen.terms
    assert chosen.with_local("code").at(stage) == chosen.terms


def test_the_map_loss_stands_in_for_the_scores() -> None:
    chosen = Losses.of({"logits": 1.0, "attention_map": 1.0})
    assert chosen.at("attention_map") == chosen.terms
    assert [w.term.name for w in chosen.at("context")] == [
        "logits",
        "attention_map",
        "context_local",
    ]


@pytest.mark.parametrize("stage", STAGES)
def test_the_code_form_refuses_to_rest_the_whole_attention(stage: str) -> None:
    chosen = Losses.of({"logits": 1.0, "hidden_states": 1.0}, local="code")
    with pytest.raises(RecipeError, match=rf"in stage '{stage}'.*add 'attention_scores', or use"):
        chosen.at(stage)
    student, teacher = pair("bert")
    with pytest.raises(RecipeError, match="reaches the query and key projections"):
        Distiller(student, teacher, chosen).step(make_batch(), stage)
    assert chosen.at("none") == chosen.terms


def test_an_unknown_stage_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"no stage 'attention'.*Did you mean"):
        losses.default().at("attention")
