"""What OpenVINO really executes: it falls back to float32 in silence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from ..errors import ExportError
from ._openvino_graph import MARK, codes_of

__all__ = ["COMPILE_PROPERTIES", "Arithmetic", "compressed_layers", "executions", "grouped_product"]

COMPILE_PROPERTIES: dict[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
"""What ``compile_model`` must be given beside the file.

On CPUs with bf16 instructions OpenVINO otherwise multiplies in bf16, slower and less exactly,
and a file cannot ask for anything else. The group size of activations is in the file.
"""

Arithmetic = Literal["int8", "float32", "other"]
"""How a product was computed: with quantized activations, without, or as none of them."""

_PACKED = ("u2", "i4")


def compressed_layers(compiled: Any) -> dict[str, str]:
    """Returns how a compiled model executes each quantized Linear, by module name.

    Args:
        compiled: An ``openvino.CompiledModel`` of a file that this library wrote.

    Returns:
        Such as ``"brgemm_avx512_f32, u2"``: the primitive and the type of its weights.

    Raises:
        ExportError: A Linear is executed with unpacked weights, or the properties of the compiled
            model rule int8 activations out.
    """
    found: dict[str, str] = {}
    narrow: dict[str, int] = {}
    for node in compiled.get_runtime_model().get_ops():
        info = {key: _text(value) for key, value in node.get_rt_info().items()}
        for original in info.get("originalLayersNames", "").split(","):
            name, mark, _ = original.partition(MARK)
            if not mark or info.get("layerType") not in ("FullyConnected", "MatMul"):
                continue
            weights = node.input_value(1).get_element_type().to_string()
            if info["layerType"] != "FullyConnected" or weights not in _PACKED:
                raise ExportError(
                    f"OpenVINO unpacks the weights of {name!r} to {weights}; compile the file as "
                    "it was written, on a CPU with AVX2 at least."
                )
            found[name] = f"{info.get('primitiveType', '')}, {weights}"
            narrow[name] = node.get_input_shape(1)[1]
    if not found:
        raise ExportError("the model has no quantized Linear; compile a file of tutelage.export.")
    _require_int8(compiled, narrow)
    return found


def _require_int8(compiled: Any, widths: Mapping[str, int]) -> None:
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if precision != "f32":
        raise ExportError(
            f"the model is compiled for {precision}, which rules int8 activations out; pass "
            f"{COMPILE_PROPERTIES} to compile_model."
        )
    size = int(compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE"))
    if size == 0:
        return  # weight-only: float activations are what the student has
    for name, width in widths.items():
        if width < size or size % 16:
            raise ExportError(
                f"with DYNAMIC_QUANTIZATION_GROUP_SIZE={size} the layer {name!r} of {width} inputs "
                "runs in float32; leave the property to the file."
            )


def _text(value: Any) -> str:
    return str(value.astype(str)) if hasattr(value, "astype") else str(value)


def executions(
    file: str | Path | Any, inputs: Mapping[str, Any], properties: Mapping[str, Any] | None = None
) -> dict[str, Arithmetic]:
    """Returns by which arithmetic OpenVINO multiplies each quantized Linear on this machine.

    The runtime information of a compiled model does not tell whether activations are quantized.
    So the model is run, and every product is compared with both formulas on its own input.

    Args:
        file: A file that this library wrote, or an ``openvino.Model`` of it.
        inputs: Numpy arrays by name.
        properties: For ``compile_model``, by default ``COMPILE_PROPERTIES``.

    Returns:
        By module name, ``"int8"`` where every row of the result is that of ``grouped_product``, to
        1e-5 of the range.
    """
    import openvino as ov

    core = ov.Core()
    model = core.read_model(str(file)) if isinstance(file, str | Path) else file.clone()
    marked = [node for node in model.get_ops() if node.get_friendly_name().endswith(MARK)]
    results = [value for node in marked for value in (node.input_value(0), node.output(0))]
    size = int(str(model.get_rt_info(["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"]).value))
    probe = ov.Model(results, model.get_parameters(), "probe")
    probe.set_rt_info(str(size), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    settings = {"INFERENCE_NUM_THREADS": 1, **(properties or COMPILE_PROPERTIES)}
    made = core.compile_model(probe, "CPU", settings)(dict(inputs))
    found: dict[str, Arithmetic] = {}
    for index, node in enumerate(marked):
        x, y = made[2 * index], made[2 * index + 1]
        if node.get_attributes()["transpose_a"]:
            x = x.swapaxes(-1, -2)
        codes, scale = codes_of(node)
        name = node.get_friendly_name().removesuffix(MARK)
        found[name] = _arithmetic(x, y, codes.astype(np.float32), scale, size)
    return found


def _arithmetic(
    x: Float[np.ndarray, "*batch width"],
    y: Float[np.ndarray, "*batch rows"],
    codes: Float[np.ndarray, "rows width"],
    scale: Float[np.ndarray, "rows 1"],
    size: int,
) -> Arithmetic:
    exact = x.astype(np.float64) @ (codes.astype(np.float64) * scale).T
    tolerance = 1e-5 * max(float(np.abs(exact).max()), 1e-12)
    if size:
        tried = [grouped_product(x, codes, scale, size, reciprocal=r) for r in (True, False)]
        apart = [np.abs(product - y).max(-1) for product in tried]
        if np.minimum(*apart).max() <= tolerance:
            return "int8"
    return "float32" if np.abs(exact - y).max() <= tolerance else "other"


def grouped_product(
    x: Float[np.ndarray, "*batch width"],
    codes: Float[np.ndarray, "rows width"],
    scale: Float[np.ndarray, "rows 1"],
    size: int,
    *,
    reciprocal: bool,
) -> Float[np.ndarray, "*batch rows"]:
    """Computes a Linear with one activation scale for every group of inputs.

    Args:
        x: Inputs.
        codes: Codes of the weight.
        scale: Scales of its rows.
        size: Inputs in a group.
        reciprocal: Multiply by the reciprocal of a scale, as OpenVINO does where the student
            divides: a few inputs that lie at half a step are rounded to the other side.
    """
    total = np.zeros((*x.shape[:-1], len(codes)), np.float32)
    for start in range(0, x.shape[-1], size):
        part = x[..., start : start + size]
        step = np.abs(part).max(-1, keepdims=True) / np.float32(127)
        step = np.where(step < np.finfo(np.float32).tiny, np.float32(1), step)
        rounded = np.rint(part * (np.float32(1) / step) if reciprocal else part / step)
        total += (rounded @ codes[:, start : start + size].T) * step
    return total * scale.reshape(-1)
