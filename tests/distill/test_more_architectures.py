"""Architectures beyond the families: each works from tracing to loading, or is one typed error."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tutelage
from helpers import PAD, VOCAB, redraw, same_bits
from tutelage.distill import Distiller
from tutelage.errors import SchemeError, TutelageError
from tutelage.intervention import stages
from tutelage.sites import discover, synthesize_inputs

_WORDS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_BLOCKS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_ENCODER: dict[str, Any] = {**_WORDS, **_BLOCKS, "max_position_embeddings": 40}
_DECODER: dict[str, Any] = {**_ENCODER, "num_key_value_heads": 2}
_EIGHT: dict[str, Any] = {**_DECODER, "head_dim": 8}
_GPT: dict[str, Any] = {**_WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40}
_IMAGE: dict[str, Any] = {**_BLOCKS, "image_size": 16, "patch_size": 8}
_TWO_TOWERS: dict[str, Any] = {"vision_config": _IMAGE, "text_config": _ENCODER}
_SEQ2SEQ: dict[str, Any] = {
    **_WORDS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
    "max_position_embeddings": 40,
}
_T5: dict[str, Any] = {
    **_WORDS,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 1,
}
_LM, _TEXT, _SEEN, _MADE = (
    "ForCausalLM",
    "ForSequenceClassification",
    "ForImageClassification",
    "ForConditionalGeneration",
)

_WORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": (_LM, _DECODER),
    "StableLm": (_LM, _DECODER),
    "Granite": (_LM, _DECODER),
    "Cohere": (_LM, _DECODER),
    "Olmo2": (_LM, _DECODER),
    "Starcoder2": (_LM, _DECODER),
    "SmolLM3": (_LM, _DECODER),
    "Nemotron": (_LM, _DECODER),
    "Exaone4": (_LM, _DECODER),
    "Glm4": (_LM, _EIGHT),
    "Helium": (_LM, _EIGHT),
    "Ernie4_5": (_LM, _EIGHT),
    "ModernBertDecoder": (_LM, _ENCODER),
    "GPTBigCode": (_LM, _GPT),
    "CodeGen": (_LM, {**_GPT, "rotary_dim": 4}),
    "GPTNeo": (
        _LM,
        {
            **_WORDS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 40,
        },
    ),
    "XLMRoberta": (_TEXT, _ENCODER),
    "Camembert": (_TEXT, _ENCODER),
    "MegatronBert": (_TEXT, _ENCODER),
    "Ernie": (_TEXT, _ENCODER),
    "RoFormer": (_TEXT, {**_ENCODER, "embedding_size": 32}),
    "BigBird": (_TEXT, {**_ENCODER, "attention_type": "original_full"}),
    "Funnel": (
        _TEXT,
        {
            "vocab_size": VOCAB,
            "block_sizes": [1, 1],
            "d_model": 32,
            "n_head": 4,
            "d_head": 8,
            "d_inner": 64,
        },
    ),
    "MBart": (_MADE, _SEQ2SEQ),
    "Pegasus": (_MADE, _SEQ2SEQ),
    "M2M100": (_MADE, _SEQ2SEQ),
    "MT5": (_MADE, _T5),
    "LongT5": (_MADE, _T5),
    "CLIP": (_SEEN, _TWO_TOWERS),
    "Dinov2WithRegisters": (_SEEN, {k: v for k, v in _IMAGE.items() if k != "intermediate_size"}),
    "ViTMSN": (_SEEN, _IMAGE),
    "Swinv2": (
        _SEEN,
        {
            "image_size": 32,
            "patch_size": 4,
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [2, 4],
            "window_size": 4,
        },
    ),
    "Segformer": (
        _SEEN,
        {
            "num_encoder_blocks": 2,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "num_attention_heads": [2, 4],
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
        },
    ),
    "Yolos": ("ForObjectDetection", {**_IMAGE, "image_size": [16, 16]}),
}

_REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "Mixtral": (_LM, {**_DECODER, "num_local_experts": 4}, "no feed-forward Linear was found"),
    "GptOss": (_LM, {**_EIGHT, "num_local_experts": 4}, "passes 's_aux' to its attention"),
    "Mamba": (
        _LM,
        {**_WORDS, "hidden_size": 32, "num_hidden_layers": 1},
        "has no attention site",
    ),
    "SqueezeBert": (_TEXT, {**_ENCODER, "embedding_size": 32}, "could not be told: 0 Linears"),
    "Longformer": (_TEXT, {**_ENCODER, "attention_window": [4, 4]}, "could not be told"),
    "CLIP": ("Model", _TWO_TOWERS, "does not run on a synthesized input"),
    "ConvNext": (_SEEN, {"hidden_sizes": [8] * 4, "depths": [1] * 4}, "has no attention site"),
    "VideoMAE": ("ForVideoClassification", {**_IMAGE, "num_frames": 2}, "synthesized input"),
    "Wav2Vec2": (
        "ForCTC",
        {
            **_BLOCKS,
            "conv_dim": [8],
            "conv_stride": [5],
            "conv_kernel": [10],
            "num_feat_extract_layers": 1,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        "takes 'input_values' as its main input",
    ),
}


def _make(name: str, head: str, settings: dict[str, Any]) -> Any:
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this transformers has no {name}")
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}{head}")(config)
    redraw(model)
    return model.eval()


def _prepare(model: Any) -> Any:
    scheme = tutelage.Scheme.preset("ternary-a8")
    try:
        return tutelage.prepare(copy.deepcopy(model), scheme)
    except SchemeError:
        return tutelage.prepare(copy.deepcopy(model), scheme.without_attention())


@pytest.mark.parametrize("name", _WORKS)
def test_from_tracing_to_loading(name: str, tmp_path: Path) -> None:
    model = _make(name, *_WORKS[name])
    sites, inputs = discover(model), synthesize_inputs(model)
    student = _prepare(model)
    distiller = Distiller(student, model)
    for stage in stages():
        distiller.step(inputs, stage).loss.backward()
    for block in sites.blocks:
        for projection in {block.query, block.key, block.value, block.output}:
            gradient = student.get_submodule(projection).weight.grad
            assert gradient is not None
            assert gradient.isfinite().all()
            assert gradient.ne(0).any(), projection
    tutelage.save(student.eval(), tmp_path / "out")
    loaded = tutelage.load(tmp_path / "out")
    with torch.no_grad():
        assert same_bits(loaded(**inputs).logits, student(**inputs).logits)


@pytest.mark.parametrize("name", _REFUSED)
def test_refused_in_one_sentence(name: str) -> None:
    head, settings, message = _REFUSED[name]
    model = _make(name, head, settings)
    with pytest.raises(TutelageError, match=message):
        _prepare(model)
