"""A recipe for a model whose attention is written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from families import make_model
from helpers import make_tokenizer, write_rows
from tutelage.errors import SchemeError
from tutelage.train.recipe import recipe_from_dict
from tutelage.train.run import run_recipe


def _values(folder: Path, **student: Any) -> dict[str, Any]:
    make_model("deberta-v2").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    return {
        "model": {"name_or_path": str(folder / "model")},
        "data": {
            "train": str(write_rows(folder / "train.tsv", ("LABEL_0", "LABEL_1"))),
            "eval": str(write_rows(folder / "dev.tsv", ("LABEL_0", "LABEL_1"), seed=1)),
            "max_length": 16,
        },
        "student": {"max_steps": 6, "batch_size": 8, **student},
        "output": str(folder / "out"),
    }


def test_it_is_trained_without_quantized_products(tmp_path: Path) -> None:
    result = run_recipe(recipe_from_dict(_values(tmp_path, quantize_attention=False)))
    assert result.kl is not None
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    assert modules
    assert not any(spec["kind"] == "attention" for spec in modules.values())


def test_quantized_products_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    recipe = recipe_from_dict(_values(tmp_path))
    with pytest.raises(SchemeError, match=r"student\.quantize_attention=false"):
        run_recipe(recipe)
    assert not (tmp_path / "out").exists()
