"""Tiny random models of more architectures, with inputs that fit them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tutelage
from helpers import PAD, VOCAB, redraw
from tutelage import _prepare
from tutelage.errors import TutelageError
from tutelage.sites import SiteMap

_TOKENS = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": 3}
_DECODER = {
    **_TOKENS,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_ENCODER = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
}
_IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 3,
}
_SEQ2SEQ = {
    **_TOKENS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 2,
    "scale_embedding": True,
}
_T5 = {
    **_TOKENS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 2,
}

ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40},
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": True}),
    "llama-untied": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_DECODER, "tie_word_embeddings": False},
    ),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_DECODER, "tie_word_embeddings": True}),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_ENCODER, "ffn_dim": 40, "word_embed_proj_dim": 16, "bos_token_id": 2},
    ),
    "bert-mlm": ("BertForMaskedLM", "BertConfig", _ENCODER),
    "albert-mlm": ("AlbertForMaskedLM", "AlbertConfig", {**_ENCODER, "embedding_size": 16}),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "bart": ("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ),
    "vit": ("ViTForImageClassification", "ViTConfig", {**_IMAGE, "intermediate_size": 40}),
    "dinov2": ("Dinov2ForImageClassification", "Dinov2Config", {**_IMAGE, "mlp_ratio": 2}),
}
"""Class, configuration class and settings by name."""


def make_model(name: str, **more: Any) -> Any:
    """Makes a tiny random model in eval mode; equal arguments give equal weights."""
    model, config, settings = ARCHITECTURES[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**{**settings, **more}))
    redraw(made)
    return made.eval()


def inputs_for(model: Any, rows: int = 2, tokens: int = 7) -> dict[str, Tensor]:
    """Makes inputs that fit a model."""
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=generator)}
    ids = torch.randint(4, VOCAB, (rows, tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :5]
    return inputs


def outputs_of(model: Any) -> Tensor:
    """Returns the logits of a fixed input, without gradient."""
    with torch.no_grad():
        return model(**inputs_for(model)).logits


def prepare_any(model: Any, scheme: tutelage.Scheme) -> Any:
    """Prepares a model; where its sites cannot be found the products inside attention stay."""
    found = _prepare.discover

    def discover(model: Any) -> SiteMap:
        try:
            return found(model)
        except (TutelageError, ValueError):
            return SiteMap((), ())

    with pytest.MonkeyPatch.context() as inside:
        inside.setattr(_prepare, "discover", discover)
        return tutelage.prepare(model, scheme)


def make_any_student(name: str, preset: str = "ternary-a8", **more: Any) -> Any:
    """Makes a tiny student of an architecture."""
    return prepare_any(make_model(name, **more), tutelage.Scheme.preset(preset))


def weight_map(student: Any) -> dict[str, tutelage.scheme.ModuleSpec]:
    """Returns the resolved map without attention."""
    state = _prepare.prepared(student)
    assert state is not None
    return {name: spec for name, spec in state.modules.items() if spec.weight is not None}
