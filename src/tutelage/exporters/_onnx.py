"""ONNX: weights in 2 bits, products in integers, the same roundings as the student."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from ..errors import ArtefactError, ExportError, nearest
from ._layers import QuantizedLayer
from ._onnx_graph import OPSET, Product, expand, name_axes, strip
from ._onnx_modules import Kernel, substitute
from ._trace import Graph, graph_of, sample_inputs
from ._verify import deviation, evaluating, refuse_other_outputs, refuse_standing

__all__ = ["KERNELS", "write"]

KERNELS = ("matmulinteger", "matmulnbits")
"""Ways to multiply, the default first."""

_EXACT, _NEAR = 0.15, 0.25
"""Largest relative deviation of the outputs, with the student's own roundings and with others.

Even then single roundings fall on the other side where float sums differ in their last bit.
"""


def write(
    student: nn.Module,
    path: Path,
    *,
    processor: Any = None,
    overwrite: bool = False,
    kernel: str = "matmulinteger",
    quantized_attention: bool = True,
) -> Path:
    """Writes a student as an ONNX file that ONNX Runtime 1.24 or later runs.

    Quantized weights and word embeddings are ``INT2`` tensors of opset 25; ONNX Runtime unpacks
    them to int8 at load. Batch and tokens are open. Every quantized Linear gives the integers of
    the student on equal input; outputs differ by roundings that fall on the other side. The file
    is run and compared with the student before it takes its place.

    Args:
        student: A student or packed model, on the CPU.
        path: The file.
        processor: Not stored in this format.
        overwrite: Replace a file.
        kernel: ``"matmulinteger"``, exact, or ``"matmulnbits"``: 2 bits in memory too and faster
            for up to about 8 tokens, but activations are rounded in blocks of 128.
        quantized_attention: Quantize the products inside attention as the student does; without,
            they are computed in float32, faster and a little off.

    Returns:
        The path.

    Raises:
        ExportError: onnx, onnxscript or onnxruntime is missing, the model cannot be expressed, or
            ONNX Runtime computes something else.
        OutputExistsError: The file exists and ``overwrite`` is off.
        ArtefactError: Writing failed; nothing is left behind.
        UnsupportedModelError: The model is neither prepared nor packed.
    """
    if kernel not in KERNELS:
        known = " or ".join(map(repr, KERNELS))
        raise ExportError(f"there is no kernel {kernel!r}; use {known}.{nearest(kernel, KERNELS)}")
    _require_libraries()
    refuse_standing(path, overwrite=overwrite)
    chosen = cast("Kernel", kernel)

    def stand_in(layer: QuantizedLayer, plain: nn.Module) -> nn.Module:
        return substitute(layer, plain, chosen)

    exact = kernel == "matmulinteger" and quantized_attention
    with evaluating(student):
        graph = graph_of(student, stand_in, attention=quantized_attention)
        model = _convert(graph)
        products = expand(model, graph.layers, chosen)
        strip(model, cast("Any", student).config)
        name_axes(model)
        _check(student, graph, model, products, _EXACT if exact else _NEAR)
    _store(model, path)
    return path


def _require_libraries() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"{name} is not installed; pip install 'tutelage[onnx]'.")
    import onnx

    if onnx.defs.onnx_opset_version() < OPSET or not hasattr(onnx.TensorProto, "INT2"):
        raise ExportError(
            f"onnx {onnx.__version__} has no 2-bit integers; pip install 'onnx>=1.20'."
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's and onnxscript's own, about their own
            yield
    finally:
        logger.setLevel(level)


def _convert(graph: Graph) -> Any:
    import torch

    program = graph.program()
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                input_names=list(graph.inputs),
                output_names=list(graph.outputs),
                verbose=False,
            )
    except Exception as error:  # whatever the converter makes of an operator it does not know
        text = str(error).strip().splitlines()
        raise ExportError(
            f"torch cannot express the model in ONNX ({text[0] if text else type(error).__name__})"
            "; deploy it with tutelage.load."
        ) from error
    return cast("Any", made).model_proto


def _session(model: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own exceptions have no common base
        raise ExportError(
            f"onnxruntime {onnxruntime.__version__} does not load the graph "
            f"({str(error).splitlines()[0]}); pip install -U onnxruntime."
        ) from error


def _check(
    student: nn.Module, graph: Graph, model: Any, products: list[Product], tolerance: float
) -> None:
    _check_products(student, graph, model, products)
    session = _session(model.SerializeToString())

    def run(inputs: Any) -> list[Any]:
        return cast("list[Any]", session.run(list(graph.outputs), dict(inputs)))

    found = deviation(student, graph, run)
    refuse_other_outputs(found, tolerance, "ONNX Runtime")


def _check_products(student: nn.Module, graph: Graph, model: Any, products: list[Product]) -> None:
    """Compares every product with the codes of the student."""
    from onnx import ValueInfoProto

    probe = type(model)()
    probe.CopyFrom(model)
    for product in products:
        names = {value.name for value in probe.graph.output}
        for name in {product.x, product.y} - names - set(graph.inputs):
            probe.graph.output.append(ValueInfoProto(name=name))
    session = _session(probe.SerializeToString())
    inputs = sample_inputs(student, graph.inputs)
    for product in products:
        feed = {name: tensor.numpy() for name, tensor in inputs.items()}
        x, y = session.run([product.x, product.y], feed)
        layer = graph.layers[product.layer]
        if product.offset is None:
            expected = x.astype(np.float64) @ layer.values.double().numpy().T
            size = np.sqrt(np.mean(expected**2)) + 1e-12
            wrong = np.sqrt(np.mean((y - expected) ** 2)) > 0.05 * size
        else:
            expected = (x.astype(np.int64) - product.offset) @ layer.codes.numpy().astype(
                np.int64
            ).T
            wrong = not np.array_equal(y, expected)
        if wrong:
            raise ExportError(
                f"ONNX Runtime multiplies the layer {product.layer!r} wrongly on this machine, so "
                "nothing was written; update onnxruntime, or deploy with tutelage.load."
            )


def _store(model: Any, path: Path) -> None:
    stage = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stage.write_bytes(model.SerializeToString())
        os.replace(stage, path)
    except OSError as error:
        raise ArtefactError(
            f"could not write {path} ({error.strerror or error}); free some space or name another "
            "file."
        ) from error
    finally:
        stage.unlink(missing_ok=True)
