"""Changes of codes against a loop over single weights, and in a training."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers import make_student, trainer_for
from tutelage.errors import StudyError
from tutelage.study._oscillation import OscillationWatcher, watched_layers

LAYER = "bert.encoder.layer.0.attention.self.query"


def step(watcher: OscillationWatcher, student: Any) -> None:
    watcher.on_step_end(None, SimpleNamespace(global_step=1), None, model=student)


def test_counts_are_those_of_a_loop() -> None:
    student = make_student("bert", "ternary-a8")
    layer = watched_layers(student)[LAYER]
    watcher = OscillationWatcher(momentum=0.25)
    watcher.on_train_begin(None, None, None, model=student)
    history = [layer.quantized_weight().codes.tolist()]
    made = torch.Generator().manual_seed(0)
    for _ in range(6):
        with torch.no_grad():
            layer.weight.add_(0.3 * torch.randn(layer.weight.shape, generator=made))
        step(watcher, student)
        history.append(layer.quantized_weight().codes.tolist())
    found = {layer.layer: layer for layer in watcher.layers()}[LAYER]
    flips, backs = [0] * 6, [0] * 6
    frequencies, ever, moved = [], 0, 0
    rows, width = layer.weight.shape
    for row in range(rows):
        for column in range(width):
            last, frequency, changed = 0, 0.0, False
            for t in range(6):
                difference = history[t + 1][row][column] - history[t][row][column]
                direction = (difference > 0) - (difference < 0)
                oscillates = direction != 0 and last != 0 and direction != last
                frequency = 0.25 * oscillates + 0.75 * frequency
                flips[t] += direction != 0
                backs[t] += oscillates
                last = direction or last
                changed |= direction != 0
            frequencies.append(frequency)
            ever += changed
            moved += history[0][row][column] != history[-1][row][column]
    count = rows * width
    assert found.weights == count
    assert found.flipped == pytest.approx([n / count for n in flips])
    assert found.oscillated == pytest.approx([n / count for n in backs])
    assert sum(backs) > 0
    assert found.ever == pytest.approx(ever / count)
    assert found.moved == pytest.approx(moved / count)
    assert found.frequency == pytest.approx(sum(frequencies) / count)
    assert found.frequent == pytest.approx(sum(f > 0.005 for f in frequencies) / count)


@pytest.mark.parametrize("preset", ["binary-a8", "w2-a8"])
def test_a_code_that_goes_and_comes_back_oscillates_once(preset: str) -> None:
    student = make_student("bert", preset)
    layer = watched_layers(student)[LAYER]
    watcher = OscillationWatcher()
    watcher.on_train_begin(None, None, None, model=student)
    start = layer.weight.detach().clone()
    for weight in (-start, start, start):
        with torch.no_grad():
            layer.weight.copy_(weight)
        step(watcher, student)
    found = next(entry for entry in watcher.layers() if entry.layer == LAYER)
    assert found.flipped == (1.0, 1.0, 0.0)
    assert found.oscillated == (0.0, 1.0, 0.0)
    assert (found.ever, found.moved, found.frequent) == (1.0, 0.0, 1.0)
    assert found.frequency == pytest.approx(0.01 * 0.99)


def test_a_training_is_watched(tmp_path: Path) -> None:
    watcher = OscillationWatcher()
    trainer = trainer_for(tmp_path, callbacks=[watcher], max_steps=4, learning_rate=0.01)
    trainer.train()
    found = watcher.layers()
    assert {entry.layer for entry in found} == set(watched_layers(trainer.model))
    assert not any("embeddings" in entry.layer for entry in found)
    assert all(len(entry.flipped) == 4 for entry in found)
    assert sum(entry.ever for entry in found) > 0


def test_refusals() -> None:
    with pytest.raises(StudyError, match="no step"):
        OscillationWatcher().layers()
    with pytest.raises(StudyError, match="momentum is 0"):
        OscillationWatcher(0.0)
