"""Tiny random models of many families, with a batch for each."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import tutelage
from helpers import PAD, VOCAB, make_batch, redraw
from tutelage._prepare import prepared

_TEXT: dict[str, Any] = {"vocab_size": VOCAB, "pad_token_id": PAD}
_ENDS: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 3}
_SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_LONG: dict[str, Any] = {"max_position_embeddings": 40}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 40,
    **_ENDS,
}
_LLAMA: dict[str, Any] = {**_TEXT, **_ENDS, **_SHAPE, **_LONG, "num_key_value_heads": 2}
_IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 8}
_SEQ2SEQ: dict[str, Any] = {
    **_TEXT,
    **_ENDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
}


@dataclass(frozen=True)
class Family:
    """How a tiny model of a family is made, and what it cannot do.

    Attributes:
        model: Class of the model.
        config: Class of its configuration.
        settings: Arguments of the configuration.
        input: ``"text"``, ``"image"``, ``"speech"``.
        interface: Whether attention runs through ``AttentionInterface``.
        seq2seq: Whether it has an encoder and a decoder.
        checkpointing: Whether the library supports gradient checkpointing for it.
    """

    model: str
    config: str
    settings: dict[str, Any]
    input: str = "text"
    interface: bool = True
    seq2seq: bool = False
    checkpointing: bool = True


def _encoder(name: str, **settings: Any) -> Family:
    settings = {**_TEXT, **_SHAPE, **_LONG, **settings}
    extra = {key: settings.pop(key) for key in ("interface", "checkpointing") if key in settings}
    return Family(f"{name}ForSequenceClassification", f"{name}Config", settings, **extra)


def _image(name: str, model: str = "ForImageClassification", **settings: Any) -> Family:
    return Family(f"{name}{model}", f"{name}Config", settings, "image")


def _decoder(name: str, model: str = "ForCausalLM", **settings: Any) -> Family:
    extra = {"interface": settings.pop("interface")} if "interface" in settings else {}
    return Family(f"{name}{model}", f"{name}Config", settings, **extra)


def _seq2seq(name: str, input: str = "text", **settings: Any) -> Family:
    model, config = f"{name}ForConditionalGeneration", f"{name}Config"
    return Family(model, config, settings, input, seq2seq=True)


FAMILIES: dict[str, Family] = {
    "bert": _encoder("Bert"),
    "roberta": _encoder("Roberta"),
    "distilbert": Family(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {**_TEXT, **_LONG, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    ),
    "electra": _encoder("Electra", embedding_size=16),
    "albert": _encoder("Albert", embedding_size=16, checkpointing=False),
    "mpnet": _encoder("MPNet", interface=False, checkpointing=False),
    "mobilebert": _encoder(
        "MobileBert",
        embedding_size=16,
        intra_bottleneck_size=32,
        true_hidden_size=32,
        num_feedforward_networks=2,
        checkpointing=False,
    ),
    "deberta-v2": _encoder(
        "DebertaV2",
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        position_buckets=8,
        interface=False,
    ),
    "modernbert": _encoder(
        "ModernBert",
        local_attention=4,
        global_attn_every_n_layers=2,
        cls_token_id=2,
        sep_token_id=3,
        **_ENDS,
    ),
    "vit": _image("ViT", **_SHAPE, **_IMAGE),
    "deit": _image("DeiT", **_SHAPE, **_IMAGE),
    "dinov2": _image(
        "Dinov2",
        **{k: v for k, v in _SHAPE.items() if k != "intermediate_size"},
        mlp_ratio=2,
        **_IMAGE,
    ),
    "beit": _image("Beit", **_SHAPE, **_IMAGE, use_relative_position_bias=True),
    "swin": _image(
        "Swin",
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        mlp_ratio=2.0,
    ),
    "clip-vision": Family("CLIPVisionModel", "CLIPVisionConfig", {**_SHAPE, **_IMAGE}, "image"),
    "gpt2": _decoder("GPT2", "LMHeadModel", **_GPT2),
    "opt": _decoder(
        "OPT",
        **{k: v for k, v in _SHAPE.items() if k != "intermediate_size"},
        ffn_dim=64,
        word_embed_proj_dim=32,
        **_TEXT,
        **_LONG,
        **_ENDS,
    ),
    "llama": _decoder("Llama", **_LLAMA),
    "qwen3": _decoder("Qwen3", **_LLAMA, head_dim=8),
    "mistral": _decoder("Mistral", **_LLAMA, sliding_window=4),
    "gemma": _decoder("Gemma", **_LLAMA, head_dim=8),
    "gemma2": _decoder("Gemma2", **_LLAMA, head_dim=8, sliding_window=4),
    "gemma3": Family(
        "Gemma3ForCausalLM", "Gemma3TextConfig", {**_LLAMA, "head_dim": 8, "sliding_window": 4}
    ),
    "gpt-neox": _decoder("GPTNeoX", **_TEXT, **_SHAPE, **_LONG, **_ENDS),
    "phi": _decoder("Phi", **_TEXT, **_SHAPE, **_LONG, **_ENDS),
    "phi3": _decoder("Phi3", **_LLAMA),
    "bloom": _decoder(
        "Bloom", hidden_size=32, n_layer=2, n_head=4, **_TEXT, **_ENDS, interface=False
    ),
    "gptj": _decoder("GPTJ", **_GPT2, rotary_dim=4, interface=False),
    "t5": _seq2seq(
        "T5",
        **_TEXT,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=1,
    ),
    "bart": _seq2seq("Bart", **_SEQ2SEQ, **_LONG, forced_eos_token_id=None),
    "whisper": _seq2seq(
        "Whisper",
        "speech",
        **_SEQ2SEQ,
        max_source_positions=10,
        max_target_positions=20,
        num_mel_bins=8,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    ),
}
"""What is tested in every way."""


def _variant(name: str, model: str | None = None, **settings: Any) -> Family:
    family = FAMILIES[name]
    return replace(family, model=model or family.model, settings={**family.settings, **settings})


VARIANTS: dict[str, Family] = {
    "bert-mlm": _variant("bert", "BertForMaskedLM"),
    "albert-mlm": _variant("albert", "AlbertForMaskedLM"),
    "opt-projected": _variant("opt", word_embed_proj_dim=16),
    "llama-tied": _variant("llama", tie_word_embeddings=True),
    "bart-scaled": _variant("bart", scale_embedding=True),
    "bart-untied": _variant("bart", tie_word_embeddings=False),
    "deberta": _encoder(
        "Deberta", relative_attention=True, pos_att_type=["c2p", "p2c"], interface=False
    ),
    "falcon": Family(
        "FalconForCausalLM",
        "FalconConfig",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "pad_token_id": PAD,
            **_ENDS,
        },
        interface=False,
    ),
}
"""Other heads, other ties and odd code, for what depends on them."""

_ALL = FAMILIES | VARIANTS


@functools.cache
def _made(name: str) -> nn.Module:
    family = _ALL[name]
    config = getattr(transformers, family.config)(**family.settings)
    for key in list(config.to_dict()):
        # Dropout off: tests that want it switch it on.
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    model = getattr(transformers, family.model)(config)
    redraw(model)
    return model


def make_model(name: str) -> Any:
    """Makes a tiny model in eval mode; its matrices have standard deviation 1 / sqrt(fan in)."""
    return copy.deepcopy(_made(name)).eval()


def make_inputs(name: str, rows: int = 3, *, seed: int = 0) -> dict[str, Tensor]:
    """Makes a batch; text is padded on the right to unequal lengths."""
    family = _ALL[name]
    draw = torch.Generator().manual_seed(seed)
    if family.input == "image":
        size = family.settings["image_size"]
        return {"pixel_values": torch.randn(rows, 3, size, size, generator=draw)}
    batch = make_batch(rows, seed=seed)
    del batch["labels"]
    if family.input == "speech":
        batch = {"input_features": torch.randn(rows, 8, 20, generator=draw)}
    if family.seq2seq:
        decoder = make_batch(rows, 5, seed=seed + 1)
        batch["decoder_input_ids"] = decoder["input_ids"]
        batch["decoder_attention_mask"] = decoder["attention_mask"]
    return batch


def output_of(model: nn.Module, inputs: dict[str, Tensor] | None = None) -> Tensor:
    """Returns logits, or the last hidden state of a model without them.

    Without ``inputs`` they are those of ``make_inputs`` for a model of this class.
    """
    if inputs is None:
        named = (name for name, family in _ALL.items() if family.model == type(model).__name__)
        inputs = make_inputs(next(named))
    made = model(**inputs)
    return made.logits if hasattr(made, "logits") else made.last_hidden_state


def make_any_student(name: str, preset: str = "ternary-a8") -> Any:
    """Makes a tiny student in eval mode."""
    return tutelage.prepare(make_model(name), tutelage.Scheme.preset(preset))


def weight_map(student: Any) -> dict[str, tutelage.scheme.ModuleSpec]:
    """Returns the resolved map without attention."""
    state = prepared(student)
    assert state is not None
    return {name: spec for name, spec in state.modules.items() if spec.weight is not None}
