"""OpenVINO: weights in 2 bits on disk and in memory, products in int8."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from pathlib import Path
from typing import Any, cast

from torch import nn

from ..errors import ArtefactError, ExportError
from ._layers import QuantizedLayer
from ._openvino_check import COMPILE_PROPERTIES, executions
from ._openvino_graph import compress, group_size, substitute
from ._trace import Graph, graph_of, sample_inputs
from ._verify import deviation, evaluating, refuse_other_outputs, refuse_standing

__all__ = ["write"]

_TOLERANCE = 0.25
"""Largest relative deviation of the outputs from the student's.

Activations are rounded a little otherwise, and over many layers that adds up.
"""


def write(
    student: nn.Module,
    path: Path,
    *,
    processor: Any = None,
    overwrite: bool = False,
    quantized_attention: bool = False,
) -> Path:
    """Writes a student as OpenVINO IR: an .xml file and a .bin file beside it.

    Ternary and binary weights take 2 bits on disk and in memory, four-level weights 4; word
    embeddings 2 bits on disk and 8 in memory. Batch and tokens are open. Load the file with
    ``openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})``: without
    the hint CPUs with bf16 instructions multiply in bf16. Before the files take their place they
    are run: every quantized Linear must be computed in int8, the outputs near the student's.

    Activations have one scale per token and group of inputs; a group is as wide as the narrowest
    Linear, so that layers of that width compute exactly what the student does, while wider ones
    round a little finer.

    Args:
        student: A student or packed model, on the CPU.
        path: The .xml file.
        processor: Not stored in this format.
        overwrite: Replace files.
        quantized_attention: Quantize the products inside attention as the student does; by default
            they are computed in float32, which is faster.

    Returns:
        The path.

    Raises:
        ExportError: openvino is missing, the model cannot be expressed, or OpenVINO computes
            something else.
        OutputExistsError: A file exists and ``overwrite`` is off.
        ArtefactError: Writing failed; nothing is left behind.
        UnsupportedModelError: The model is neither prepared nor packed.
    """
    if importlib.util.find_spec("openvino") is None:
        raise ExportError("openvino is not installed; pip install 'tutelage[openvino]'.")
    if path.suffix != ".xml":
        raise ExportError(f"{path} is no .xml file; OpenVINO wants that name, use model.xml.")
    weights = path.with_suffix(".bin")
    refuse_standing(path, weights, overwrite=overwrite)
    tags: dict[str, QuantizedLayer] = {}

    def stand_in(layer: QuantizedLayer, plain: nn.Module) -> nn.Module:
        tag = f"quantized_{len(tags)}_weight"
        tags[tag] = layer
        return substitute(layer, plain, tag)

    with evaluating(student):
        graph = graph_of(student, stand_in, attention=quantized_attention, fused=True)
        size = group_size(graph.layers)
        model = _convert(graph, student)
        compress(model, tags)
        model.validate_nodes_and_infer_types()
        model.set_rt_info(str(size), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
        labels = getattr(cast("Any", student).config, "id2label", None)
        if labels:
            model.set_rt_info(json.dumps(labels), ["model_info", "id2label"])
        _store(student, graph, model, path, weights, "int8" if size else "float32")
    return path


def _convert(graph: Graph, student: nn.Module) -> Any:
    import openvino as ov

    program = graph.program()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of OpenVINO and torch, about each other
            model = ov.convert_model(program)
    except Exception as error:  # whatever the converter makes of an operator it does not know
        text = str(error).strip().splitlines()
        raise ExportError(
            f"OpenVINO cannot express the model ({text[0] if text else type(error).__name__}); "
            "export with format='onnx'."
        ) from error
    shapes = {}
    for value, (name, tensor) in zip(
        model.inputs, sample_inputs(student, graph.inputs).items(), strict=True
    ):
        value.get_tensor().set_names({name})
        open_axes = 1 if tensor.dim() > 2 else 2
        shapes[name] = ov.PartialShape([-1] * open_axes + list(tensor.shape[open_axes:]))
    for value, name in zip(model.outputs, graph.outputs, strict=True):
        value.get_tensor().set_names({name})
    model.reshape(shapes)
    return model


def _check(student: nn.Module, graph: Graph, file: Path, wanted: str) -> None:
    import openvino as ov

    inputs = sample_inputs(student, graph.inputs)
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    for name, arithmetic in executions(file, arrays).items():
        if arithmetic != wanted:
            raise ExportError(
                f"OpenVINO {ov.__version__} computes the layer {name!r} in {arithmetic} on this "
                f"machine, not in {wanted}, so nothing was written; export with format='onnx'."
            )
    settings = {"INFERENCE_NUM_THREADS": 1, **COMPILE_PROPERTIES}
    compiled = ov.Core().compile_model(str(file), "CPU", settings)

    def run(inputs: Any) -> list[Any]:
        made = compiled(dict(inputs))
        return [made[name] for name in graph.outputs]

    found = deviation(student, graph, run)
    refuse_other_outputs(found, _TOLERANCE, "OpenVINO")


def _store(
    student: nn.Module, graph: Graph, model: Any, path: Path, weights: Path, wanted: str
) -> None:
    import openvino as ov

    stage = path.with_name(f".{path.stem}.partial-{os.getpid()}.xml")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        ov.save_model(model, stage, compress_to_fp16=False)
        _check(student, graph, stage, wanted)
        os.replace(stage.with_suffix(".bin"), weights)
        os.replace(stage, path)
    except OSError as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(
            f"could not write {path} ({error.strerror or error}); free some space or name another "
            "file."
        ) from error
    finally:
        stage.unlink(missing_ok=True)
        stage.with_suffix(".bin").unlink(missing_ok=True)
