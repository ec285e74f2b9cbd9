"""How llama.cpp names the tensors and settings of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ExportError

__all__ = ["Layout", "layout_of"]


class Layout:
    """What a GGUF file of one architecture holds.

    Attributes:
        architecture: Its name in llama.cpp.
        config: Configuration of the model.
    """

    architecture: str
    _prefix: str
    _activation: str

    def __init__(self, model: Any) -> None:
        """Checks that llama.cpp computes what the model does.

        Args:
            model: A full-precision model.

        Raises:
            ExportError: It does not.
        """
        import gguf

        self.config = model.config
        self._model = type(model).__name__
        self._need(self.config.hidden_act == self._activation, f"activation {self._activation!r}")
        architecture = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
        self._names = gguf.get_tensor_name_map(
            architecture[self.architecture], self.config.num_hidden_layers
        )

    def _need(self, holds: bool, what: str) -> None:
        if not holds:
            raise ExportError(
                f"llama.cpp computes {self.architecture!r} with {what} only, and {self._model} is "
                "otherwise; export to 'onnx' or 'openvino'."
            )

    def stored(self, state: Iterable[str]) -> list[str]:
        """Returns which tensors are stored.

        Args:
            state: Names of all tensors of the model.
        """
        raise NotImplementedError

    def name_of(self, name: str) -> str:
        """Returns the name of a tensor in the file.

        Args:
            name: Its name in the model.

        Raises:
            ExportError: llama.cpp has no such tensor.
        """
        found = self._names.get_name(self._canonical(name), try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ExportError(
                f"llama.cpp has no place for {name!r} in a {self.architecture!r} model; export to "
                "'onnx' or 'openvino'."
            )
        return str(found)

    def _canonical(self, name: str) -> str:
        return name

    def row_order(self, name: str) -> Tensor | None:
        """Returns in which order the rows of a tensor are stored, ``None`` for as they are.

        Args:
            name: Its name in the model.
        """
        return None

    def write_settings(self, writer: Any) -> None:
        """Writes the shape of the model.

        Args:
            writer: A ``gguf.GGUFWriter``.
        """
        config = self.config
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_vocab_size(config.vocab_size)


class _Llama(Layout):
    architecture = "llama"
    _activation = "silu"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        config = self.config
        self._rope = dict(getattr(config, "rope_parameters", None) or {})
        self._need(self._rope.get("rope_type", "default") == "default", "unscaled rotary positions")
        self._prefix = "" if hasattr(model, "lm_head") else "model."
        self._width = config.head_dim or config.hidden_size // config.num_attention_heads
        self._tied = bool(config.tie_word_embeddings)

    def stored(self, state: Iterable[str]) -> list[str]:
        # Without an output tensor llama.cpp uses that of the embeddings.
        skipped = ("lm_head.weight",) if self._tied else ()
        return [name for name in state if name not in skipped]

    def _canonical(self, name: str) -> str:
        return f"{self._prefix}{name}"

    def row_order(self, name: str) -> Tensor | None:
        # Rotary positions turn neighbouring rows there, here those half a head apart.
        module = name.rsplit(".", 2)[-2]
        if module not in ("q_proj", "k_proj"):
            return None
        config = self.config
        heads = config.num_attention_heads if module == "q_proj" else config.num_key_value_heads
        rows = torch.arange(heads * self._width)
        return rows.reshape(heads, 2, self._width // 2).transpose(1, 2).reshape(-1)

    def write_settings(self, writer: Any) -> None:
        super().write_settings(writer)
        config = self.config
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self._width)
        writer.add_value_length(self._width)
        writer.add_rope_dimension_count(self._width)
        writer.add_rope_freq_base(float(self._rope.get("rope_theta", 10000.0)))
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)


_BERT_HEAD = {"pooler.dense": "classifier.dense", "classifier": "classifier.out_proj"}
"""The two Linears of a classifier, named as those of RoBERTa: the same function of the same."""


class _Bert(Layout):
    architecture = "bert"
    _activation = "gelu"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._need(not getattr(self.config, "is_decoder", False), "attention to both sides")
        self._classifies = hasattr(model, "classifier")

    def stored(self, state: Iterable[str]) -> list[str]:
        # A pooler without a classifier has no use there: what it gives are the hidden states.
        return [name for name in state if self._classifies or not name.startswith("pooler.")]

    def _canonical(self, name: str) -> str:
        name = name.removeprefix("bert.")
        module, _, kind = name.rpartition(".")
        return f"{_BERT_HEAD.get(module, module)}.{kind}"

    def write_settings(self, writer: Any) -> None:
        import gguf

        super().write_settings(writer)
        config = self.config
        writer.add_causal_attention(False)
        writer.add_layer_norm_eps(config.layer_norm_eps)
        writer.add_token_type_count(config.type_vocab_size)
        if self._classifies:
            writer.add_pooling_type(gguf.PoolingType.RANK)
            labels = [config.id2label[index] for index in range(config.num_labels)]
            writer.add_classifier_output_labels(labels)
        else:
            writer.add_pooling_type(gguf.PoolingType.NONE)


_LAYOUTS: dict[str, type[Layout]] = {
    "LlamaForCausalLM": _Llama,
    "LlamaModel": _Llama,
    "BertModel": _Bert,
    "BertForSequenceClassification": _Bert,
}


def layout_of(model: nn.Module) -> Layout:
    """Returns the layout for a model.

    Args:
        model: A full-precision model of transformers.

    Raises:
        ExportError: There is none.
    """
    name = type(model).__name__
    if name not in _LAYOUTS:
        known = ", ".join(_LAYOUTS)
        raise ExportError(
            f"there is no GGUF layout for {name}, only for {known}; export to 'onnx' or 'openvino'."
        )
    return _LAYOUTS[name](model)
