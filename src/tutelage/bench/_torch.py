"""Engines of torch: the student as it is loaded, and three precisions of the teacher."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import BenchError
from ._cases import Inputs
from ._engine import Engine, Runner
from ._models import class_of, is_decoder, load_plain, main_output, settings_of
from ._workspace import Workspace

__all__ = ["TorchRunner"]


class TorchRunner(Runner):
    """A transformers model in this process.

    Args:
        model: In eval mode, on the CPU.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self.settings = settings_of(model)
        self.dtype = next((p.dtype for p in model.parameters()), torch.float32)

    def prepare(self, inputs: Inputs) -> dict[str, Tensor]:
        """Makes tensors, floating-point ones in the model's precision."""
        tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
        return {n: t.to(self.dtype) if t.is_floating_point() else t for n, t in tensors.items()}

    def run(self, prepared: dict[str, Tensor]) -> Any:
        """Calls the model."""
        with torch.inference_mode():
            return self.model(**prepared, **self.settings)

    def output(self, inputs: Inputs) -> np.ndarray:
        """Calls the model."""
        return main_output(self.run(self.prepare(inputs))).float().numpy()

    @property
    def generates(self) -> bool:
        """Whether it is a decoder."""
        return is_decoder(self.model)

    def generate(self, prompt: Inputs, tokens: int) -> None:
        """Calls ``model.generate``."""
        with torch.inference_mode():
            self.model.generate(
                **self.prepare(prompt),
                do_sample=False,
                num_beams=1,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
            )

    def weight_bytes(self) -> int:
        """Returns the bytes of all tensors that modules hold, each storage counted once."""
        # Kept alive together: what is unpacked for a look would else take the same address.
        tensors = [tensor for module in self.model.modules() for tensor in _held(module)]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    def linears(self) -> list[tuple[str, nn.Module]]:
        """Returns every module with a matrix that its input is multiplied with."""
        from transformers.pytorch_utils import Conv1D

        plain = (nn.Linear, Conv1D)
        return [(name, m) for name, m in self.model.named_modules() if isinstance(m, plain)]

    def check(self) -> str:
        """Says in which precision the weights are."""
        wrong = [name for name, m in self.linears() if cast("Any", m).weight.dtype != self.dtype]
        if wrong or any(type(m).__module__.startswith("tutelage") for m in self.model.modules()):
            raise BenchError(f"{(wrong or ['a module'])[0]} is not in {self.dtype}")
        return f"{len(self.linears())} Linears in {str(self.dtype).removeprefix('torch.')}"


def _held(module: nn.Module) -> Iterator[Tensor]:
    if type(module).__module__.startswith("torch.ao."):
        # Packed weights are opaque; they are as large as what they unpack to.
        packed: Any = module
        if callable(getattr(packed, "weight", None)):
            yield packed.weight()
            if packed.bias() is not None:
                yield packed.bias()
        return
    own = (module._parameters.values(), module._buffers.values(), module.__dict__.values())
    for value in (v for values in own for v in values):
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, Tensor):
                yield item


class _Packed(TorchRunner):
    def check(self) -> str:
        """Says what multiplies the packed weights."""
        from ..exporters._layers import module_specs
        from ..kernels import active_path, native
        from ..nn import PackedWeight

        specs = {name: spec for name, spec in module_specs(self.model).items() if spec.weight}
        wrong = [n for n in specs if not isinstance(self.model.get_submodule(n), PackedWeight)]
        if wrong:
            raise BenchError(f"{wrong[0]} of the student is not packed")
        count = sum(spec.kind != "embedding" for spec in specs.values())
        if not count:
            raise BenchError("the student has no quantized Linear")
        found = native()
        path = found.isa if found.active else f"torch, {active_path(torch.device('cpu'))}"
        return f"{count} packed Linears, products by {path}"


class Student(Engine):
    """The packed model, as ``tutelage.load`` gives it."""

    name, title, source = "student", "the student, tutelage.load", "student"
    tolerance = 1e-5

    def load(self, work: Workspace) -> Runner:
        """Loads it."""
        from ..artefacts import load

        return _Packed(load(work.student))

    def files(self, work: Workspace) -> list[Path]:
        """Returns its weight files."""
        return weights_in(work.student)


class _Fused(_Packed):
    def check(self) -> str:
        """Says how many blocks are fused besides."""
        from ..nn import fused_blocks

        said = super().check()
        count = fused_blocks(self.model)
        if not count:
            raise BenchError("no block of the student is fused")
        return f"{count} fused blocks, {said}"


class StudentFused(Student):
    """The packed model with its encoder blocks fused."""

    name, title = "student-fused", "the student, tutelage.fuse"
    tolerance = 0.1

    def load(self, work: Workspace) -> Runner:
        """Loads and fuses it."""
        from ..artefacts import load
        from ..nn import fuse

        return _Fused(fuse(load(work.student)))


def weights_in(folder: Path) -> list[Path]:
    """Returns the weight files that ``save_pretrained`` wrote.

    Args:
        folder: A model's folder.
    """
    return [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]


class Float32(Engine):
    """The teacher as it is."""

    name, title = "fp32", "torch float32"
    tolerance = 1e-4

    def load(self, work: Workspace) -> Runner:
        """Loads it."""
        return TorchRunner(load_plain(work.teacher))

    def files(self, work: Workspace) -> list[Path]:
        """Returns its weight files."""
        return weights_in(work.teacher)


class BFloat16(Engine):
    """The teacher with all weights in bfloat16."""

    name, title = "bf16", "torch bfloat16"

    def convert(self, work: Workspace) -> None:
        """Stores it in bfloat16."""
        cast("Any", load_plain(work.teacher, torch.bfloat16)).save_pretrained(
            work.folder(self.name)
        )

    def load(self, work: Workspace) -> Runner:
        """Loads it."""
        return TorchRunner(load_plain(work.folder(self.name), torch.bfloat16))


class _DynamicInt8(TorchRunner):
    def check(self) -> str:
        """Counts the quantized modules and refuses any that is left as it was."""
        quantized = torch.ao.nn.quantized.dynamic.Linear
        count = sum(type(module) is quantized for module in self.model.modules())
        left = [name for name, _ in self.linears()]
        if left or not count:
            raise BenchError(
                f"torch's quantize_dynamic left {left[0] if left else 'every Linear'} as it was"
            )
        if torch.backends.quantized.engine != "x86":
            raise BenchError(f"torch computes int8 by {torch.backends.quantized.engine!r}, not x86")
        return f"{count} dynamic int8 Linears, x86"


class TorchInt8(Engine):
    """The teacher through torch's dynamic quantization of ``nn.Linear``."""

    name, title, int8 = "torch-int8", "torch int8, dynamic, x86", True

    def convert(self, work: Workspace) -> None:
        """Quantizes it and stores the modules."""
        _use_x86()
        model = load_plain(work.teacher)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch announces its removal
            made = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
            torch.save(made, work.folder(self.name) / "model.pt")

    def load(self, work: Workspace) -> Runner:
        """Loads what ``convert`` stored in a folder of this very measurement."""
        _use_x86()
        class_of(work.teacher)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torch.load(work.folder(self.name) / "model.pt", weights_only=False)
        return _DynamicInt8(model.eval())


def _use_x86() -> None:
    if "x86" not in torch.backends.quantized.supported_engines:
        raise BenchError("this build of torch has no int8 engine for x86")
    torch.backends.quantized.engine = "x86"
