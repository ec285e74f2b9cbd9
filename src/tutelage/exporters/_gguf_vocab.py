"""Tokenizers as llama.cpp describes them."""

from __future__ import annotations

import json
from typing import Any

from ..errors import ExportError
from ._gguf_models import Layout

__all__ = ["write_vocabulary"]

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Llama 3 cuts text."""


def write_vocabulary(
    writer: Any, processor: Any, layout: Layout, pre_tokenizer: str | None
) -> None:
    """Writes a tokenizer, or that there is none.

    Args:
        writer: A ``gguf.GGUFWriter``.
        processor: Tokenizer of transformers, or ``None``.
        layout: Of the model.
        pre_tokenizer: See ``write`` of the format.

    Raises:
        ExportError: llama.cpp has no tokenizer of that kind.
    """
    if processor is None:
        writer.add_tokenizer_model("none")
        return
    backend = getattr(processor, "backend_tokenizer", None)
    if backend is None:
        raise _unknown(processor, "is none of the library tokenizers")
    plan = json.loads(backend.to_str())
    wanted = "WordPiece" if layout.architecture == "bert" else "BPE"
    if plan["model"]["type"] != wanted:
        raise _unknown(processor, f"is of the kind {plan['model']['type']}, not {wanted}")
    tokens, kinds = _tokens(processor, layout.config.vocab_size)
    if wanted == "WordPiece":
        _word_piece(writer, processor, plan, tokens, kinds)
    else:
        _byte_level(writer, processor, plan, tokens, pre_tokenizer)
    writer.add_token_types(kinds)
    for kind in ("eos", "unk", "sep", "pad", "mask"):
        index = getattr(processor, f"{kind}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{kind}_token_id")(index)


def _unknown(processor: Any, what: str) -> ExportError:
    return ExportError(
        f"the tokenizer {type(processor).__name__} {what}, which llama.cpp does not have for this "
        "architecture; export to 'onnx' or 'openvino'."
    )


def _tokens(processor: Any, size: int) -> tuple[list[str], list[int]]:
    """Returns every token and what it is, unused ones where the tokenizer has fewer."""
    from gguf import TokenType

    vocabulary = processor.get_vocab()
    added = processor.added_tokens_decoder
    if max(vocabulary.values()) >= size:
        raise ExportError(
            f"the tokenizer has the token id {max(vocabulary.values())}, the model has {size} "
            "tokens; pass the model's own tokenizer as processor."
        )
    by_id = {index: token for token, index in vocabulary.items()}
    tokens, kinds = [], []
    for index in range(size):
        kind = TokenType.NORMAL
        if index not in by_id:
            kind = TokenType.UNUSED
        elif index in added:
            kind = TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        kinds.append(int(kind))
    return tokens, kinds


def _word_piece(
    writer: Any, processor: Any, plan: Any, tokens: list[str], kinds: list[int]
) -> None:
    from gguf import TokenType

    normalizer, model = plan.get("normalizer") or {}, plan["model"]
    # llama.cpp always lower-cases, and takes "##" for what continues a word.
    if not normalizer.get("lowercase") or model.get("continuing_subword_prefix", "##") != "##":
        raise _unknown(processor, "tells upper from lower case")
    special = {int(TokenType.CONTROL), int(TokenType.UNUSED)}
    words = [
        token if kind in special else token[2:] if token.startswith("##") else f"\u2581{token}"
        for token, kind in zip(tokens, kinds, strict=True)
    ]
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    if processor.cls_token_id is not None:
        writer.add_bos_token_id(processor.cls_token_id)


def _byte_level(
    writer: Any, processor: Any, plan: Any, tokens: list[str], pre_tokenizer: str | None
) -> None:
    merges = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in plan["model"]["merges"]
    ]
    name = _recognized(plan.get("pre_tokenizer"))
    if name is None and pre_tokenizer is None:
        raise ExportError(
            f"how {type(processor).__name__} cuts text is not recognized; pass pre_tokenizer, the "
            "name llama.cpp has for it, such as 'gpt-2'."
        )
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer or name)
    writer.add_token_list(tokens)
    writer.add_token_merges(merges)
    made = processor("a").input_ids
    if processor.bos_token_id is not None:
        writer.add_bos_token_id(processor.bos_token_id)
    writer.add_add_bos_token(made[0] == processor.bos_token_id)
    writer.add_add_eos_token(made[-1] == processor.eos_token_id)
    if isinstance(getattr(processor, "chat_template", None), str):
        writer.add_chat_template(processor.chat_template)


def _recognized(plan: Any) -> str | None:
    """Returns llama.cpp's name for a way to cut text, ``None`` for one that is not known."""
    steps = plan["pretokenizers"] if plan and plan["type"] == "Sequence" else [plan or {}]
    last = steps[-1]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    first = steps[0] if len(steps) == 2 else {}
    if len(steps) == 1 and last.get("use_regex"):
        return "gpt-2"
    if first.get("type") == "Digits" and first.get("individual_digits") and last.get("use_regex"):
        return "smollm"
    if first.get("pattern") == {"Regex": _LLAMA_3} and not last.get("use_regex"):
        return "llama-bpe"
    return None
