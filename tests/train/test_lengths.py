"""Batches of examples of about equal length."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import differing, trainer_for, weights_of
from tutelage.errors import RecipeError
from tutelage.train._lengths import LengthSampler, lengths_of


@given(
    st.lists(st.integers(1, 60), max_size=400),
    st.integers(1, 9),
    st.integers(0, 2**31),
    st.integers(0, 50),
)
def test_every_example_comes_once_and_a_batch_lies_within_its_neighbours(
    lengths: list[int], batch: int, seed: int, epoch: int
) -> None:
    sampler = LengthSampler(lengths, batch, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)
    assert order == list(sampler)
    full = len(order) - len(order) % batch
    for start in range(0, full, 16 * batch):
        part = order[start : min(start + 16 * batch, full)]
        spans = [[lengths[i] for i in part[k : k + batch]] for k in range(0, len(part), batch)]
        spans.sort(key=lambda span: (min(span), max(span)))
        for one, other in itertools.pairwise(spans):
            assert max(one) <= min(other) or min(one) == max(one) == min(other)


def test_epochs_and_seeds_have_other_orders() -> None:
    lengths = [i % 17 + 1 for i in range(500)]
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        sampler = LengthSampler(lengths, 8, seed)
        sampler.set_epoch(epoch)
        orders.append(tuple(sampler))
    assert len(set(orders)) == 4


def test_lengths_are_numbers_of_tokens() -> None:
    assert lengths_of([{"input_ids": [1, 2]}, {"input_ids": [3]}]) == [2, 1]
    assert lengths_of([{"pixel_values": [1.0]}]) is None


SETTINGS = {
    "max_steps": 7,
    "train_sampling_strategy": "group_by_length",
    "save_strategy": "steps",
    "save_steps": 1,
}


def test_a_resumed_training_sees_the_same_batches(tmp_path: Path) -> None:
    straight = trainer_for(tmp_path / "a", **SETTINGS)
    straight.train()
    for step in (2, 5):
        resumed = trainer_for(tmp_path / "b", **SETTINGS)
        resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{step}"))
        assert differing(weights_of(straight.model), weights_of(resumed.model)) == []


def test_data_without_tokens_are_refused(tmp_path: Path) -> None:
    class Pixels:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {"pixel_values": [0.0]}

    trainer = trainer_for(tmp_path, **SETTINGS)
    trainer.train_dataset = Pixels()
    with pytest.raises(RecipeError, match="no 'input_ids'"):
        trainer.train()
