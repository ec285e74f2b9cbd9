"""The packed format as a quantization method of transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ArtefactError
from ..nn import QuantWeight
from ..scheme import ModuleSpec, Scheme
from ._guard import guard, lift
from ._hollow import make_hollow, not_stored, refuse_other_tensors
from ._pack import METADATA_KEY, config_digest, digest, pack_state_dict

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "READABLE_VERSIONS",
    "PackedConfig",
    "PackedQuantizer",
    "attach_quantizer",
    "of_unknown_version",
    "verify_files",
]

QUANT_METHOD = "tutelage"
FORMAT_VERSION = 2
"""Version of the packed format that is written.

1: Linears and embeddings. 2: also ``Conv1D``, patch embeddings and weights that modules share.
"""
READABLE_VERSIONS = (1, 2)
"""Versions of the packed format that can be read."""


def of_unknown_version(version: Any) -> str:
    """Returns the end of a sentence about a model that was stored in another version.

    Args:
        version: What its configuration names.
    """
    known = " and ".join(map(str, READABLE_VERSIONS))
    return (
        f"is stored in version {version} of the packed format, this library reads versions "
        f"{known}; install the tutelage that wrote it, or save the model again."
    )


class PackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed model: the scheme and the resolved module map.

    Attributes:
        scheme: The scheme as plain data.
        modules: Qualified module name to spec, as plain data.
        version: Version of the format.
    """

    def __init__(
        self,
        scheme: dict[str, Any],
        modules: dict[str, Any],
        version: int = FORMAT_VERSION,
        **_: Any,
    ) -> None:
        self.quant_method = cast("Any", QUANT_METHOD)
        self.scheme = scheme
        self.modules = modules
        self.version = version

    def specs(self) -> dict[str, ModuleSpec]:
        """Returns the module map.

        Raises:
            ArtefactError: The file was written by a later version.
        """
        if self.version not in READABLE_VERSIONS:
            raise ArtefactError(f"the model {of_unknown_version(self.version)}")
        return {name: ModuleSpec(**spec) for name, spec in self.modules.items()}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for ``config.json``."""
        return copy.deepcopy(self.__dict__)

    def to_diff_dict(self) -> dict[str, Any]:
        """Returns plain data for ``config.json``."""
        return self.to_dict()


class PackedQuantizer(HfQuantizer):
    """Writes students packed and reads packed models; transformers calls it."""

    requires_calibration = True

    def is_serializable(self) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """A packed model is for inference; train the student instead."""
        return False

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Returns what ``save_pretrained`` writes."""
        config = cast("PackedConfig", self.quantization_config)
        specs = config.specs()
        if any(isinstance(m, QuantWeight) for m in model.modules()):
            state = pack_state_dict(model, specs)
        else:
            state = dict(model.state_dict())
        for name in not_stored(model, state):
            del state[name]
        digests = {name: digest(tensor) for name, tensor in state.items()}
        written = json.loads(model.config.to_json_string())
        record = {"tensors": digests, "config": config_digest(written)}
        return state, {METADATA_KEY: json.dumps(record)}

    def update_dtype(self, dtype: Any) -> Any:
        """Packed models compute in float32."""
        if dtype not in (None, torch.float32):
            raise ArtefactError(
                f"a packed model computes in float32, not in {dtype}; leave out dtype."
            )
        return dtype

    def update_weight_conversions(self, weight_conversions: Any, *_: Any) -> list[Any]:
        """Packed files carry the names of the modules in the map, not those of older formats.

        transformers up to 5.17 passes the conversions alone, later versions the model as well.
        """
        return []

    def update_attn_implementation(self, config: Any) -> Any:
        """Lifts the guard: transformers asks here, before it reads the rest of ``config``."""
        lift(config)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """As ``update_attn_implementation``, which transformers up to 5.17 does not know."""
        return self.update_attn_implementation(config)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = cast("PackedConfig", self.quantization_config)
        modules = config.specs()
        stored = verify_files([Path(str(f)) for f in kwargs.get("checkpoint_files") or ()])
        make_hollow(model, modules)
        refuse_other_tensors(model, stored)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _keep_names(model)
        guard(model.config)
        return model


def verify_files(files: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Compares packed files, and the ``config.json`` beside them, with the digests they carry.

    Args:
        files: The safetensors files of one model.

    Returns:
        Name and shape of every tensor.

    Raises:
        ArtefactError: A file is truncated, edited or incomplete.
    """
    seen: dict[str, tuple[int, ...]] = {}
    expected: dict[str, str] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as handle:
                record = json.loads((handle.metadata() or {}).get(METADATA_KEY, "null"))
                if record is None:
                    raise ArtefactError(f"{file} carries no digests; save the model again.")
                config = json.loads((file.parent / "config.json").read_text(encoding="utf-8"))
                if record["config"] != config_digest(config):
                    raise ArtefactError(
                        f"{file.parent / 'config.json'} is not the one that {file.name} was saved "
                        "with; restore both files from one save."
                    )
                expected = dict(record["tensors"])
                for name in list(handle.keys()):
                    tensor = handle.get_tensor(name)
                    if digest(tensor) != expected.get(name):
                        raise ArtefactError(
                            f"the tensor {name!r} in {file} was changed after it was saved; "
                            "restore the file from a good copy."
                        )
                    seen[name] = tuple(tensor.shape)
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            if isinstance(error, ArtefactError):
                raise
            raise ArtefactError(
                f"{file} is truncated or corrupt ({error}); restore it from a good copy."
            ) from error
    missing = sorted(set(expected) - set(seen))
    if missing:
        raise ArtefactError(
            f"the tensor {missing[0]!r} is missing from the files; restore them from a good copy."
        )
    return seen


def _keep_names(model: Any) -> None:
    # save_pretrained would write the names that the model's first release used.
    model._weight_conversions = []


def attach_quantizer(model: nn.Module, scheme: Scheme, modules: Mapping[str, ModuleSpec]) -> None:
    """Makes ``model.save_pretrained`` write the packed form.

    Args:
        model: A student.
        scheme: Its scheme.
        modules: Its resolved map.
    """
    config = PackedConfig(
        scheme=scheme.model_dump(mode="json", exclude_none=True),
        modules={
            name: spec.model_dump(mode="json", exclude_none=True) for name, spec in modules.items()
        },
    )
    target = cast("Any", model)
    target.config.quantization_config = config
    target.hf_quantizer = PackedQuantizer(config)
    guard(target.config)
    _keep_names(target)


def register() -> None:
    """Registers the format with transformers; idempotent."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(PackedConfig)
        register_quantizer(QUANT_METHOD)(PackedQuantizer)


register()
