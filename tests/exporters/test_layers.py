"""What exporters read off students and packed models."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import tutelage
from helpers import FAMILIES, inputs_of, make_batch, make_student, tiny
from tutelage.errors import ExportError, UnsupportedModelError
from tutelage.exporters._layers import quantized_layers, twin
from tutelage.scheme import Scheme


@pytest.mark.parametrize("family", FAMILIES)
def test_student_and_packed_model_read_the_same(family: str, tmp_path: Path) -> None:
    student = make_student(family)
    packed = tutelage.load(tutelage.save(student, tmp_path / "out"))
    of_student, of_packed = quantized_layers(student), quantized_layers(packed)
    assert set(of_student) == set(of_packed)
    for name, layer in of_student.items():
        other = of_packed[name]
        assert torch.equal(layer.codes, other.codes)
        assert torch.equal(layer.scale, other.scale)
        assert layer.grid == other.grid


@pytest.mark.parametrize("family", FAMILIES)
def test_the_twin_computes_what_a_weight_only_student_does(family: str) -> None:
    model = tiny(family)
    plain = Scheme(name="w", weight=Scheme.preset("ternary-a8").weight)
    student = tutelage.prepare(copy.deepcopy(model), plain).eval()
    batch = inputs_of(make_batch())
    made = twin(student)
    assert not any(type(m).__module__.startswith("tutelage") for m in made.modules())
    assert not hasattr(made.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(made(**batch).logits, student(**batch).logits)


def test_other_models_and_formats_are_refused(tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(UnsupportedModelError, match="neither a student nor a packed model"):
        quantized_layers(model)
    with pytest.raises(ExportError, match=r"no format 'onx'.*Did you mean 'onnx'"):
        tutelage.export(model, tmp_path / "x", format="onx")
