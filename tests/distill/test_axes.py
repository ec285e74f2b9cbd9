"""Signals that count other positions than the input's tokens, against float64 loops."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from families import make_inputs, make_model
from helpers import make_batch, pair
from tutelage import Distiller, losses
from tutelage.distill import AttentionMapKL, AttentionScores, LossTerm, SignalMSE, StepContext
from tutelage.distill._items import read_inputs
from tutelage.distill.losses import Losses
from tutelage.errors import DataError
from tutelage.sites import BlockSites, SiteMap, discover

Axes = tuple[Any, Any, bool]

_ENCODER: Axes = ("input", "input", False)
_DECODER: Axes = ("decoder", "decoder", True)
_CROSS: Axes = ("decoder", "input", False)
_FRAMES: Axes = (None, None, False)


def _sites(*axes: Axes) -> SiteMap:
    blocks = tuple(
        BlockSites(
            block=f"stack.{index}",
            attention=f"stack.{index}.attention",
            query="q",
            key="k",
            value="v",
            output=f"o.{index}",
            ffn=("f",),
            heads=2,
            width=2,
            hidden=3,
            query_axis=query,
            key_axis=key,
            causal=causal,
        )
        for index, (query, key, causal) in enumerate(axes)
    )
    return SiteMap(blocks, ())


def _mask(made: torch.Generator, rows: int, tokens: int) -> Tensor:
    mask = torch.rand(rows, tokens, generator=made) < 0.6
    mask[:, 0] = True
    return mask


@st.composite
def _contexts(draw: st.DrawFn) -> StepContext:
    axes = draw(
        st.sampled_from(
            [
                (_ENCODER, _DECODER, _CROSS),
                (_DECODER, _CROSS, _FRAMES),
                (_FRAMES, _FRAMES),
                (("input", "input", True),) * 2,
                (_ENCODER, _ENCODER),
            ]
        )
    )
    rows, heads, width = draw(st.integers(1, 3)), 2, 3
    length: dict[Any, int] = {"input": draw(st.integers(1, 4)), "decoder": 3, None: 5}
    made = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    sites = _sites(*axes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=made)

    def signals() -> Any:
        scores = tuple(normal(rows, heads, length[q], length[k]) for q, k, _ in axes)
        return {
            "attention_scores": scores,
            "attention_map": tuple(s.softmax(-1) for s in scores),
            "context": tuple(normal(rows, length[q], width) for q, _, _ in axes),
        }

    masked = draw(st.booleans())
    used = {axis for q, k, _ in axes for axis in (q, k)}
    masks = {a: _mask(made, rows, length[a]) for a in ("input", "decoder") if a in used and masked}
    return StepContext(
        student=signals(),
        teacher=signals(),
        student_logits=normal(rows, 2),
        teacher_logits=normal(rows, 2),
        has_logits=True,
        token_mask=masks.get("input"),
        labels=None,
        stage="none",
        progress=None,
        decoder_mask=masks.get("decoder"),
        sites=sites,
    )


def _real(context: StepContext, axis: Any, row: int, length: int) -> list[bool]:
    mask = {"input": context.token_mask, "decoder": context.decoder_mask, None: None}[axis]
    return [True] * length if mask is None else mask[row].tolist()


def _mean_of(parts: list[list[float]], context: StepContext) -> float:
    """Mean over items: of all samples together, or of each sample's mean."""
    if context.items.per_sample:
        return sum(sum(p) / len(p) for p in parts) / len(parts)
    return sum(sum(p) for p in parts) / sum(len(p) for p in parts)


def _loop(context: StepContext, site: str, of: Any) -> float:
    assert context.sites is not None
    total = 0.0
    for i, block in enumerate(context.sites.blocks):
        own, other = context.student[site][i].double(), context.teacher[site][i].double()  # type: ignore[index]
        parts = []
        for row in range(own.shape[0]):
            queries = _real(context, block.query_axis, row, own.shape[-2])
            keys = _real(context, block.key_axis, row, own.shape[-1])
            parts.append(of(own[row], other[row], queries, keys, block.causal))
        total += _mean_of(parts, context)
    return total


def _squares(own: Tensor, other: Tensor, queries: list[bool], keys: Any, causal: Any) -> Any:
    each = ((own - other) ** 2).mean(-1).tolist()
    return [e for e, real in zip(each, queries, strict=True) if real]


def _score_squares(own: Tensor, other: Tensor, queries: Any, keys: Any, causal: bool) -> Any:
    each = ((own - other) ** 2).mean(0).tolist()
    return [
        each[q][k]
        for q, real in enumerate(queries)
        for k, seen in enumerate(keys)
        if real and seen and not (causal and k > q)
    ]


def _divergences(own: Tensor, other: Tensor, queries: Any, keys: Any, causal: Any) -> Any:
    own, other = own.clamp(min=1e-8), other.clamp(min=1e-8)
    each = (other * (other.log() - own.log())).sum(-1).mean(0).tolist()
    return [e for e, real in zip(each, queries, strict=True) if real]


@pytest.mark.parametrize(
    ("term", "site", "of"),
    [
        (SignalMSE("context_local", "context"), "context", _squares),
        (AttentionScores(), "attention_scores", _score_squares),
        (AttentionMapKL(), "attention_map", _divergences),
    ],
    ids=["mse", "scores", "map"],
)
@given(context=_contexts())
def test_terms_over_several_axes(term: LossTerm, site: str, of: Any, context: StepContext) -> None:
    value = term(context)
    found = float(value.sum) / float(value.count)
    assert found == pytest.approx(_loop(context, site, of), rel=1e-4, abs=1e-6)
    assert float(value.count) == float(term.count(context.items))


def test_windows_of_an_image_count_as_their_sample() -> None:
    made = torch.Generator().manual_seed(0)
    own, other = (torch.randn(6, 4, 3, generator=made) for _ in range(2))  # 2 images, 3 windows
    context = StepContext(
        student={"context": (own,)},
        teacher={"context": (other,)},
        student_logits=torch.zeros(2, 5),
        teacher_logits=torch.zeros(2, 5),
        has_logits=True,
        token_mask=None,
        labels=None,
        stage="none",
        progress=None,
        sites=_sites(_FRAMES),
    )
    value = SignalMSE("context_local", "context")(context)
    assert value.count == 2
    assert float(value.sum) / 2 == pytest.approx(float((own - other).double().square().mean()))


@pytest.mark.parametrize("name", ["t5", "whisper", "swin", "llama", "vit"])
def test_parts_of_a_batch_combine_exactly(name: str) -> None:
    import copy

    import tutelage

    teacher = make_model(name)
    student = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset("ternary-a8")).eval()
    weights = dict.fromkeys(("logits", "hidden_states", "attention_scores", "attention_map"), 1.0)
    distiller = Distiller(student, teacher, Losses.of(weights))
    batch = make_inputs(name, 5)
    parts = [{k: v[rows] for k, v in batch.items()} for rows in (slice(2), slice(2, None))]
    counts = distiller.counts(parts)
    whole = distiller.step(batch, "context")
    shares = [
        distiller.step(part, "context", counts=distiller.counts(parts, "context")) for part in parts
    ]
    for term in counts:
        total = sum(float(step.shares[term].detach()) for step in shares)
        assert total == pytest.approx(float(whole.terms[term].detach()), rel=1e-5), term


def test_default_losses_fit_the_model() -> None:
    def names(name: str) -> set[str]:
        return {w.term.name for w in losses.default().fitted(discover(make_model(name))).terms}

    four = {"logits", "hidden_states", "attention_output", "attention_scores"}
    assert names("bert") == names("vit") == four
    assert names("deberta-v2") == four - {"attention_scores"} | {"attention_map"}
    assert names("llama") == names("t5") == {"logits"}
    chosen = Losses.of({"hidden_states": 1.0})
    assert chosen.fitted(discover(make_model("llama"))) is chosen


def test_cross_attention_keeps_its_values_and_gets_its_scores() -> None:
    sites = discover(make_model("t5"))
    added = {w.term.name for w in losses.default().fitted(sites).at("context", sites)}
    assert added == {"logits", "context_local", "attention_scores"}
    sites = discover(make_model("llama"))
    added = {w.term.name for w in losses.default().fitted(sites).at("context", sites)}
    assert added == {"logits", "context_local"}


def test_labels_make_the_decoders_input() -> None:
    model = make_model("t5")
    labels = torch.tensor([[5, 6, 7], [8, -100, -100]])
    given = read_inputs({"input_ids": torch.tensor([[4, 5], [6, 7]]), "labels": labels}, model)
    start = model.config.decoder_start_token_id
    assert given.inputs["decoder_input_ids"].tolist()[0] == [start, 5, 6]
    assert given.decoder_mask is not None
    assert given.decoder_mask.tolist() == [[True] * 3, [True, False, False]]
    assert "labels" not in given.inputs


def test_a_mask_of_another_length_is_refused() -> None:
    student, teacher = pair("bert")
    distiller = Distiller(student, teacher, Losses.of({"hidden_states": 1.0}))
    context: Any = None
    real = SignalMSE.__call__

    def spy(self: Any, given: StepContext) -> Any:
        nonlocal context
        context = given
        return real(self, given)

    with pytest.MonkeyPatch.context() as inside:
        inside.setattr(SignalMSE, "__call__", spy)
        distiller.step(make_batch())
    short = StepContext(**{**context.__dict__, "token_mask": context.token_mask[:, 1:]})
    with pytest.raises(DataError, match="7 positions, the batch's mask 6"):
        SignalMSE("hidden_states", "block_output")(short)
