"""Encoder blocks in one call: the plain block's numbers, and its forward where more is asked."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tutelage
from families import make_any_student, make_inputs, make_model, output_of
from helpers import inputs_of, make_batch, make_student, redraw, same_bits, tiny_config
from tutelage.errors import UnsupportedModelError
from tutelage.kernels import native
from tutelage.nn import fused_blocks

pytestmark = pytest.mark.skipif(not native().has_block, reason=native().reason)

KNOWN = ("bert", "deit", "distilbert", "electra", "roberta", "vit")


def pair(folder: Path, family: str = "bert", preset: str = "ternary-a8") -> tuple[Any, Any]:
    plain = tutelage.load(tutelage.save(make_any_student(family, preset), folder / "out"))
    return plain, tutelage.fuse(copy.deepcopy(plain))


def distance(left: Tensor, right: Tensor) -> float:
    return ((left - right).norm() / right.norm()).item()


@pytest.mark.parametrize("family", KNOWN)
def test_known_blocks_are_fused_and_compute_the_same(family: str, tmp_path: Path) -> None:
    plain, fused = pair(tmp_path, family)
    assert fused_blocks(fused) == plain.config.num_hidden_layers
    assert fused_blocks(plain) == 0
    inputs = make_inputs(family, rows=5)
    with torch.no_grad():
        assert distance(output_of(fused, inputs), output_of(plain, inputs)) < 5e-3
    assert set(fused.state_dict()) == set(plain.state_dict())


@pytest.mark.parametrize("name", ["Camembert", "XLMRoberta"])
def test_architectures_built_as_bert(name: str, tmp_path: Path) -> None:
    config = getattr(transformers, f"{name}Config")(**tiny_config("roberta").to_diff_dict())
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    redraw(model)
    student = tutelage.prepare(model.eval(), tutelage.Scheme.preset("ternary-a8"))
    plain = tutelage.load(tutelage.save(student, tmp_path / "out"))
    fused = tutelage.fuse(copy.deepcopy(plain))
    inputs = inputs_of(make_batch())
    with torch.no_grad():
        assert distance(fused(**inputs).logits, plain(**inputs).logits) < 5e-3
    assert fused_blocks(fused) == 2


@pytest.mark.parametrize("preset", ["ternary-a4", "binary-a8", "binary-a4", "w2-a8"])
def test_every_preset(preset: str, tmp_path: Path) -> None:
    plain, fused = pair(tmp_path, preset=preset)
    inputs = make_inputs("bert", rows=5)
    with torch.no_grad():
        assert distance(output_of(fused, inputs), output_of(plain, inputs)) < 2e-2


def one_block(folder: Path, **shape: Any) -> tuple[nn.Module, nn.Module]:
    student = make_student("bert", "ternary-a8", **{"width": 32, "heads": 4} | shape)
    plain: Any = tutelage.load(tutelage.save(student, folder / "out"))
    fused: Any = tutelage.fuse(copy.deepcopy(plain))
    return plain.bert.encoder.layer[0], fused.bert.encoder.layer[0]


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 40, 130])
@pytest.mark.parametrize(("hidden", "heads"), [(32, 2), (48, 4), (80, 2), (130, 5)])
def test_shapes_and_tails(hidden: int, heads: int, tokens: int, tmp_path: Path) -> None:
    plain, fused = one_block(tmp_path, width=hidden, heads=heads)
    made = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, tokens, hidden, generator=made)
    mask = torch.zeros(3, 1, tokens, tokens)
    mask[1, :, :, (tokens + 1) // 2 :] = torch.finfo(torch.float32).min
    with torch.no_grad():
        for given in (None, mask, mask[:, :, :1], mask[:1]):
            want, got = plain(x, given), fused(x, given)
            # Where no rounding turned out otherwise, only float32's last places differ.
            near = ((got - want).abs() < 1e-5).float().mean().item()
            assert near > 0.5 or distance(got, want) < 2e-3
            assert distance(got, want) < 1e-2


def test_a_sentence_does_not_depend_on_its_batch_or_padding(tmp_path: Path) -> None:
    _, fused = one_block(tmp_path)
    x = torch.randn(9, 40, 32)
    mask = torch.zeros(9, 1, 1, 40)
    mask[:, :, :, 11:] = torch.finfo(torch.float32).min
    with torch.no_grad():
        together = fused(x, mask)
        for row in range(9):
            alone = fused(x[row : row + 1, :11].contiguous(), None)
            assert same_bits(alone[0], together[row, :11])


def test_threads_change_nothing(tmp_path: Path) -> None:
    _, fused = one_block(tmp_path)
    threads = torch.get_num_threads()
    try:
        for batch, tokens in ((1, 40), (2, 200), (40, 30)):
            x = torch.randn(batch, tokens, 32)
            results = []
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                with torch.no_grad():
                    results.append(fused(x))
            assert all(same_bits(results[0], y) for y in results[1:])
    finally:
        torch.set_num_threads(threads)


def test_what_is_no_number_stays_none(tmp_path: Path) -> None:
    _, fused = one_block(tmp_path)
    x = torch.randn(2, 6, 32)
    x[0, 3, 5] = torch.nan
    with torch.no_grad():
        y = fused(x)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_attention_maps_and_hidden_states_are_those_of_the_plain_model(tmp_path: Path) -> None:
    plain, fused = pair(tmp_path)
    inputs = inputs_of(make_batch())
    with torch.no_grad():
        want = plain(**inputs, output_attentions=True)
        got = fused(**inputs, output_attentions=True)
        assert len(got.attentions) == len(want.attentions) > 0
        assert all(same_bits(a, b) for a, b in zip(got.attentions, want.attentions, strict=True))
        assert same_bits(got.logits, want.logits)
        # Afterwards transformers' hooks are still there, and the fused path is taken again.
        calls = count_calls(fused)
        states = fused(**inputs, output_hidden_states=True).hidden_states
        assert calls == []
        assert len(states) == fused.config.num_hidden_layers + 1


def count_calls(model: Any) -> list[int]:
    """Notes calls of a Linear that the fused block passes over, without a hook."""
    linear = model.bert.encoder.layer[0].output.dense
    calls: list[int] = []

    class Watched(type(linear)):  # type: ignore[misc]
        def forward(self, *args: Any) -> Any:
            calls.append(1)
            return super().forward(*args)

    linear.__class__ = Watched
    return calls


def test_hooks_training_and_autocast_take_the_plain_forward(tmp_path: Path) -> None:
    plain, fused = pair(tmp_path)
    inputs = inputs_of(make_batch())
    seen: list[Tensor] = []
    inner = fused.bert.encoder.layer[0].attention.self
    handle = inner.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        fused(**inputs)
        assert len(seen) == 1
        handle.remove()
        calls = count_calls(fused)
        fused(**inputs)
        assert calls == []
        with torch.autocast("cpu", torch.bfloat16):
            got, want = fused(**inputs).logits, plain(**inputs).logits
        assert same_bits(got, want)
        assert len(calls) == 1
        fused.train()
        fused(**inputs)
        assert len(calls) == 2


def test_weights_loaded_later_are_those_that_compute(tmp_path: Path) -> None:
    plain, fused = pair(tmp_path)
    model = make_model("bert")
    redraw(model, seed=9)
    student = tutelage.prepare(model, tutelage.Scheme.preset("ternary-a8"))
    other = tutelage.load(tutelage.save(student, tmp_path / "other"))
    fused.load_state_dict(other.state_dict())
    inputs = inputs_of(make_batch())
    with torch.no_grad():
        assert distance(fused(**inputs).logits, other(**inputs).logits) < 5e-3
        assert distance(plain(**inputs).logits, other(**inputs).logits) > 5e-2


def test_a_fused_model_can_be_copied_pickled_and_saved(tmp_path: Path) -> None:
    plain, fused = pair(tmp_path)
    inputs = inputs_of(make_batch())
    with torch.no_grad():
        want = fused(**inputs).logits
        for made in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert fused_blocks(made) == fused_blocks(fused)
            assert same_bits(made(**inputs).logits, want)
        fused.save_pretrained(tmp_path / "again")
        again = tutelage.load(tmp_path / "again")
        assert same_bits(again(**inputs).logits, plain(**inputs).logits)


def test_what_cannot_be_fused_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    student = make_student("bert")
    with pytest.raises(UnsupportedModelError, match="no packed weight"):
        tutelage.fuse(student)
    decoder = tutelage.load(tutelage.save(make_any_student("llama"), tmp_path / "llama"))
    with pytest.raises(UnsupportedModelError, match="has no encoder block that can be fused"):
        tutelage.fuse(decoder)
    reference = tutelage.load(tutelage.save(make_student("bert", "reference"), tmp_path / "ref"))
    with pytest.raises(UnsupportedModelError, match="scaled per token"):
        tutelage.fuse(reference)
    plain, fused = pair(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no encoder block"):
        tutelage.fuse(fused)
    plain.bert.encoder.layer[1].output.LayerNorm = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="no layer norms"):
        tutelage.fuse(plain)
    assert fused_blocks(plain) == 0


def test_a_block_that_computes_something_else_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, _ = pair(tmp_path)

    def other(self: Any, hidden_states: Tensor) -> Tensor:
        return nn.functional.silu(self.dense(hidden_states))

    monkeypatch.setattr(type(plain.bert.encoder.layer[1].intermediate), "forward", other)
    with pytest.raises(UnsupportedModelError, match="away from the plain one"):
        tutelage.fuse(plain)
    assert fused_blocks(plain) == 0


def test_the_operator_is_a_good_citizen(tmp_path: Path) -> None:
    _, fused = one_block(tmp_path)
    plan = fused.__dict__["_fused"]
    arguments = (
        torch.randn(2, 5, 32),
        torch.zeros(2, 1, 5, 5),
        plan.tensors,
        plan.shapes,
        plan.settings,
        plan.numbers,
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.tutelage.encoder_block, arguments, test_utils=tests)
    wrong: list[tuple[int, Any]] = [
        (0, torch.randn(2, 5, 33)),
        (0, torch.randn(5, 32)),
        (1, torch.zeros(2, 1, 5, 6)),
        (1, torch.zeros(3, 1, 5, 5)),
        (2, plan.tensors[:-1]),
        (2, [plan.tensors[0][:-1], *plan.tensors[1:]]),
        (3, plan.shapes[:-1]),
        (4, [3, *plan.settings[1:]]),
        (4, [*plan.settings[:-1], 99]),
    ]
    for position, value in wrong:
        given = list(arguments)
        given[position] = value
        with pytest.raises((RuntimeError, ValueError)):
            torch.ops.tutelage.encoder_block(*given)
