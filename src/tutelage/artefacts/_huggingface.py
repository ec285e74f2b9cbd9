"""The packed format as a quantization method of transformers."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ArtefactError, SchemeError
from ..nn import PackedWeight, QuantWeight
from ..quantizers import ENCODINGS, Encoding
from ..scheme import WEIGHT_QUANTIZERS, ModuleSpec, Scheme
from ._guard import guard, lift
from ._hollow import make_hollow, not_stored, refuse_other_tensors
from ._pack import (
    REST_DTYPES,
    digest,
    known_storage,
    pack_state_dict,
    repack_state_dict,
    store_rest,
    weights_digest,
)
from ._reader import read_header
from ._verify import metadata_of, verify_config, verify_files

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "READABLE_VERSIONS",
    "PackedConfig",
    "PackedQuantizer",
    "attach_quantizer",
    "of_unknown_version",
    "stored_as",
]

QUANT_METHOD = "tutelage"
FORMAT_VERSION = 3
"""Version of the packed format that is written.

1: Linears and embeddings. 2: also ``Conv1D``, patch embeddings and weights that modules share.
3: also base-3 bytes and a rest in bfloat16; the digests cover class, dtype and one another.
"""
READABLE_VERSIONS = (1, 2, 3)
"""Versions of the packed format that can be read."""


def of_unknown_version(version: Any) -> str:
    """Returns the end of a sentence about a model that was stored in another version.

    Args:
        version: What its configuration names.
    """
    known = f"{READABLE_VERSIONS[0]} to {READABLE_VERSIONS[-1]}"
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
        encoding: How codes became bytes, ``"bits"`` or ``"base3"``.
        rest: Dtype in which all that is not quantized is stored, ``"float32"`` or ``"bfloat16"``.
        weights: Digest of all tensors; ``None`` before version 3, and before the first save.
    """

    encoding: Encoding

    def __init__(
        self,
        scheme: dict[str, Any],
        modules: dict[str, Any],
        version: int = FORMAT_VERSION,
        encoding: Encoding = "bits",
        rest: str = "float32",
        weights: str | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = cast("Any", QUANT_METHOD)
        self.scheme = scheme
        self.modules = modules
        self.version = version
        self.encoding = encoding
        self.rest = rest
        self.weights = weights

    def specs(self) -> dict[str, ModuleSpec]:
        """Returns the module map.

        Raises:
            ArtefactError: The file was written by a later version.
        """
        if self.version not in READABLE_VERSIONS:
            raise ArtefactError(f"the model {of_unknown_version(self.version)}")
        if self.encoding not in ENCODINGS or self.rest not in REST_DTYPES:
            raise ArtefactError(
                f"the model is stored as {self.encoding!r} and {self.rest!r}, which this library "
                "does not know; install the tutelage that wrote it."
            )
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
        config.version = FORMAT_VERSION
        specs = config.specs()
        if any(isinstance(m, QuantWeight) for m in model.modules()):
            state = pack_state_dict(model, specs, config.encoding)
        else:
            state = repack_state_dict(model, config.encoding)
        for name in not_stored(model, state):
            del state[name]
        store_rest(state, config.rest)
        # save_pretrained sets these two after this call.
        model.config.dtype = str(model.dtype).removeprefix("torch.")
        model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
        digests = {name: digest(tensor) for name, tensor in state.items()}
        config.weights = weights_digest(digests)
        written = json.loads(model.config.to_json_string())
        return state, metadata_of(digests, written, FORMAT_VERSION)

    def update_attn_implementation(self, config: Any) -> Any:
        """Refuses an edited configuration and lifts the guard, before a model is built from it."""
        folder = Path(str(getattr(config, "name_or_path", None) or ""))
        if (folder / "config.json").is_file():
            for file in sorted(folder.glob("model*.safetensors")):
                verify_config(read_header(file))
        lift(config)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """As ``update_attn_implementation``, which transformers 5.17 does not call."""
        return self.update_attn_implementation(config)

    def update_ep_plan(self, config: Any) -> Any:
        """Leaves the configuration as it is."""
        return config

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

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = cast("PackedConfig", self.quantization_config)
        modules = config.specs()
        files = [Path(str(file)) for file in kwargs.get("checkpoint_files") or ()]
        stored = verify_files(files, config.weights)
        make_hollow(model, modules, config.encoding)
        refuse_other_tensors(model, stored)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, PackedWeight) and not module.holds_codes():
                raise ArtefactError(
                    f"the tensor '{name}.weight' holds bytes that are no codes; restore the file "
                    "from a good copy."
                )
        _keep_names(model)
        guard(model.config)
        return model


@contextlib.contextmanager
def stored_as(model: Any, encoding: Encoding, rest: str) -> Iterator[None]:
    """Makes ``save_pretrained`` of a student write in a way of its own, for a while.

    Args:
        model: The student.
        encoding: How codes become bytes.
        rest: Dtype of all that is not quantized.

    Raises:
        SchemeError: There is no such way, or no weight for which it would make a difference.
    """
    known_storage(encoding, rest)
    config = cast("PackedConfig", model.hf_quantizer.quantization_config)
    weights = [spec.weight for spec in config.specs().values() if spec.weight is not None]
    if encoding == "base3" and all(WEIGHT_QUANTIZERS[w.kind].grid.levels != 3 for w in weights):
        raise SchemeError(
            f"{type(model).__name__} has no ternary weight that base 3 would make smaller; leave "
            "out encoding."
        )
    before = config.encoding, config.rest
    config.encoding, config.rest = encoding, rest
    try:
        yield
    finally:
        config.encoding, config.rest = before


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
