"""Words in a text, and words among the pieces of a tokenizer."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["content_words", "whole_words"]

# Letters that stand alone; "don't" is one word, "b2b" is none.
_WORD = re.compile(r"(?<!\w)(?<!\w['’])[^\W\d_]+(?:['’][^\W\d_]+)*(?!\w)")


def content_words(text: str) -> set[tuple[int, int]]:
    """Returns first character and end of every word of letters, English function words left out.

    Args:
        text: The text.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    found = _WORD.finditer(text)
    return {word.span() for word in found if word[0].lower() not in ENGLISH_STOP_WORDS}


def whole_words(tokenizer: Any) -> dict[int, str]:
    """Returns the pieces that are words, and come out as themselves behind another word.

    Args:
        tokenizer: A fast tokenizer.

    Returns:
        Number of the piece to the word.
    """
    numbers = [n for n in range(len(tokenizer)) if n not in tokenizer.all_special_ids]
    decoded = [text.strip() for text in tokenizer.batch_decode([[n] for n in numbers])]
    words = [(n, text) for n, text in zip(numbers, decoded, strict=True) if _WORD.fullmatch(text)]
    if not words:
        return {}
    encoded = tokenizer(
        [f"{text} {text}" for _, text in words],
        add_special_tokens=False,
        return_offsets_mapping=True,
    )
    found = {}
    for (number, text), ids, offsets in zip(
        words, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        second = [n for n, (_, end) in zip(ids, offsets, strict=True) if end > len(text)]
        if second == [number] and tuple(offsets[-1]) == (len(text) + 1, 2 * len(text) + 1):
            found[number] = text
    return found
