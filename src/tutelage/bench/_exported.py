"""The student in other engines, through ``tutelage.export``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..errors import BenchError
from ..exporters._export import FORMATS, export
from ._engine import Engine, Runner
from ._workspace import Workspace

__all__ = ["ExportedOnnx", "ExportedOpenvino"]


def _write(work: Workspace, engine: Engine, format: str, file: str) -> None:
    """Exports the student and notes the widths of its products, and how many are left in float."""
    from ..artefacts import load
    from ..exporters._layers import quantized_layers

    student = load(work.student)
    try:
        export(student, work.folder(engine.name) / file, format=format)
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.endswith(f".{FORMATS[format]}"):
            raise
        raise BenchError(f"not available: there is no exporter for {format!r} yet") from error
    layers = quantized_layers(student)
    widths = [
        int(layer.codes.shape[1])
        for layer in layers.values()
        if layer.spec.kind in ("linear", "conv1d")
    ]
    plain = sum(type(module) is nn.Linear for module in student.modules())
    work.note(engine.name, widths=widths, plain=plain)


class ExportedOpenvino(Engine):
    """The student as OpenVINO runs it."""

    name, title, source = "student-openvino", "the student in OpenVINO", "student"
    library, extra = ("openvino",), "openvino"

    def convert(self, work: Workspace) -> None:
        """Exports it."""
        _write(work, self, "openvino", "model.xml")

    def load(self, work: Workspace) -> Runner:
        """Compiles it."""
        from ._openvino import OpenvinoRunner

        noted: dict[str, Any] = work.noted(self.name)
        settings = {
            "INFERENCE_PRECISION_HINT": "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": min(noted["widths"]),
        }
        file: Path = work.folder(self.name) / "model.xml"
        return OpenvinoRunner(
            file, settings, work.plan.threads, len(noted["widths"]), floating=noted["plain"]
        )


class ExportedOnnx(Engine):
    """The student as ONNX Runtime runs it."""

    name, title, source = "student-onnx", "the student in ONNX Runtime", "student"
    library, extra = ("onnxruntime", "onnx", "onnxscript"), "onnx"

    def convert(self, work: Workspace) -> None:
        """Exports it."""
        _write(work, self, "onnx", "model.onnx")

    def load(self, work: Workspace) -> Runner:
        """Starts a session."""
        from ._onnx import OnnxRunner

        noted: dict[str, Any] = work.noted(self.name)
        return OnnxRunner(
            work.folder(self.name) / "model.onnx",
            work.plan.threads,
            len(noted["widths"]),
            floating=noted["plain"],
        )
