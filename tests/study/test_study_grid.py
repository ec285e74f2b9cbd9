"""Keys of runs: what they depend on, and what they must never depend on."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest

from tutelage.study._grid import _key
from tutelage.train.recipe import Recipe, recipe_from_dict


def made(**student: Any) -> Recipe:
    return recipe_from_dict(
        {
            "model": {"name_or_path": "model"},
            "data": {"train": "train.tsv", "eval": "dev.tsv"},
            "student": {"scheme": "ternary-a8", **student},
            "output": "out",
        }
    )


def test_an_untrained_run_is_known_by_its_whole_scheme() -> None:
    keys = {
        _key(made(**student), 0, 0, ["print"])
        for student in (
            {},
            {"quantize_attention": False},
            {"learned_scales": True},
            {"scheme": "binary-a8"},
        )
    }
    assert len(keys) == 4


@pytest.mark.parametrize(
    "student", [{"max_steps": 7}, {"learning_rate": 1e-3}, {"losses": {"logits": 1.0}}]
)
def test_an_untrained_run_does_not_depend_on_training(student: dict[str, Any]) -> None:
    other = made(**student).model_copy(update={"seed": 5})
    assert _key(other, 0, 0, ["print"]) == _key(made(), 0, 0, ["print"])


def test_the_key_of_a_trained_run_is_that_of_its_recipe() -> None:
    recipe = made(quantize_attention=False)
    plain = recipe.model_dump(exclude={"output", "threads"})
    text = json.dumps([plain, 6, 3, ["print"]], sort_keys=True)
    expected = hashlib.sha256(text.encode()).hexdigest()[:20]
    assert _key(recipe, 6, 3, ["print"]) == expected
