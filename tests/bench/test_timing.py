"""Turns, ratios, and sizes of batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from families import make_model
from helpers import tiny
from tutelage.bench._cases import Case, default_cases, make_inputs, parse_cases, sample
from tutelage.bench._timing import paired_rounds, ratio, timed
from tutelage.errors import BenchError


def test_every_engine_has_a_turn_in_every_round_and_the_order_moves() -> None:
    seen: list[str] = []
    calls = {name: (lambda name=name: seen.append(name)) for name in "abc"}

    def once(call: object) -> float:
        call()  # type: ignore[operator]
        return float(len(seen))

    times, failed = paired_rounds(calls, 3, 0.0, once)
    assert seen == list("abcbcacab")
    assert not failed
    assert times == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_an_engine_that_fails_leaves_the_others_alone() -> None:
    def bad() -> None:
        raise ValueError("no")

    times, failed = paired_rounds({"good": lambda: None, "bad": bad}, 2, 0.0)
    assert list(times) == ["good"]
    assert len(times["good"]) == 2
    assert str(failed["bad"]) == "no"


def test_the_first_calls_do_not_count() -> None:
    taken = iter([0.2])

    def call() -> None:
        import time

        time.sleep(next(taken, 0.001))

    assert timed(call) < 0.1


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=9), st.floats(0.1, 10))
def test_ratios_are_paired(base: list[float], factor: float) -> None:
    found = ratio(base, [b / factor for b in base])
    for value in (found.median, found.low, found.high):
        assert value == pytest.approx(factor)


def test_quartiles_of_the_ratio() -> None:
    found = ratio([1, 2, 3, 4, 5], [1, 1, 1, 1, 1])
    assert (found.low, found.median, found.high) == (2, 3, 4)


def test_sizes_are_read_and_refused() -> None:
    model = tiny()  # 40 positions
    assert default_cases(model) == (Case(1, 32), Case(32, 40))
    assert parse_cases("1x8, 2x16,1x8", model) == (Case(1, 8), Case(2, 16))
    for text in ("8", "1x", "0x8", "1x8,", "axb"):
        with pytest.raises(BenchError, match=r"write --cases 1x32,32x128"):
            parse_cases(text, model)
    with pytest.raises(BenchError, match=r"1x41: .* has positions for 40 tokens"):
        parse_cases("1x41", model)
    image = make_model("vit")
    assert default_cases(image) == (Case(1), Case(32))
    assert parse_cases("3", image) == (Case(3),)
    with pytest.raises(BenchError, match="write --cases 1,32"):
        parse_cases("1x8", image)


def test_inputs_have_the_size_and_the_sample_is_padded() -> None:
    model = tiny()
    made = make_inputs(model, Case(2, 9))
    assert {n: a.shape for n, a in made.items()} == dict.fromkeys(made, (2, 9))
    assert made["attention_mask"].all()
    assert (
        make_inputs(model, Case(2, 9), seed=1)["input_ids"].tolist() != made["input_ids"].tolist()
    )
    padded = sample(model, (Case(1, 32),))
    assert padded["attention_mask"].sum(1).tolist() == [16, 8, 16, 16]
    assert make_inputs(make_model("vit"), Case(5))["pixel_values"].shape == (5, 3, 16, 16)
