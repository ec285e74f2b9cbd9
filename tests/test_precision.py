"""Half precision becomes float32, and a student equals what is loaded from its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from families import make_model, output_of
from helpers import same_bits
from tutelage._precision import upcast
from tutelage.errors import UnsupportedModelError

HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def loose_buffers(model: Any) -> dict[str, torch.Tensor]:
    """What no file holds."""
    return {name: buffer.clone() for name, buffer in model.named_non_persistent_buffers()}


@HALF
@pytest.mark.parametrize("name", ["llama-tied", "gemma3"])
def test_what_no_file_holds_is_computed_anew(name: str, dtype: torch.dtype) -> None:
    model = make_model(name)
    want = loose_buffers(model)
    model.to(dtype)
    assert any(not torch.equal(b, want[n]) for n, b in loose_buffers(model).items())
    weights = {name: p.float() for name, p in model.named_parameters()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    random = torch.get_rng_state()
    upcast(model)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert all(same_bits(p, weights[name]) for name, p in model.named_parameters())
    got = loose_buffers(model)
    assert got.keys() == want.keys()
    assert all(same_bits(got[name], buffer) for name, buffer in want.items())


@pytest.mark.parametrize("name", ["llama-tied", "gemma3", "t5"])
def test_a_student_of_a_half_precision_model_is_what_loads(name: str, tmp_path: Path) -> None:
    make_model(name).save_pretrained(tmp_path / "plain")
    model = type(make_model(name)).from_pretrained(tmp_path / "plain", dtype=torch.bfloat16)
    student = tutelage.prepare(model.eval(), tutelage.Scheme.preset("ternary-a8"))
    head, words = student.get_output_embeddings(), student.get_input_embeddings()
    assert head.weight is words.weight
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    tutelage.save(student, tmp_path / "out")
    assert same_bits(output_of(tutelage.load(tmp_path / "out")), output_of(student))


def test_float32_is_left_alone() -> None:
    model = make_model("gemma3")
    model.model.embed_tokens.embed_scale.fill_(3.0)
    upcast(model)
    assert model.model.embed_tokens.embed_scale == 3.0


def test_foreign_code_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("gemma3").to(torch.bfloat16)
    monkeypatch.setattr(type(model.model), "_init_weights", lambda self, module: None)
    with pytest.raises(UnsupportedModelError, match=r"'embed_scale'.*load the model with dtype"):
        upcast(model)
    assert next(model.parameters()).dtype == torch.bfloat16
