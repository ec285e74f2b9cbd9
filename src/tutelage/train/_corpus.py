"""Plain text for language models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ._readers import READERS, decode, file_type, read_content
from ._sections import DataSection
from ._split import same_source

__all__ = ["Corpus", "read_corpora", "read_corpus"]


@dataclass(frozen=True)
class Corpus:
    """Plain text.

    Attributes:
        texts: One text per file.
        source: Where it comes from, for messages.
    """

    texts: list[str]
    source: str

    def __len__(self) -> int:
        return len(self.texts)


def read_corpora(section: DataSection) -> tuple[Corpus, Corpus]:
    """Reads the training and the evaluation text of a recipe.

    Where the recipe names no evaluation text, or the same file or folder twice, the end of the
    training text is kept for evaluation: a share ``eval_split`` of its characters, cut at the end
    of a line.

    Args:
        section: The recipe's data section.

    Raises:
        DataError: Text is missing, empty or unreadable.
    """
    train = read_corpus(section.train, section)
    if section.eval is not None and not same_source(section.train, section.eval):
        return train, read_corpus(section.eval, section)
    share = section.eval_split
    if share is None:
        raise DataError(
            f"'data.train' and 'data.eval' are both {section.train!r}; set data.eval_split, such "
            "as 0.1, to keep a part of it for evaluation."
        )
    if isinstance(share, int):
        raise DataError(
            f"data.eval_split is {share}, but text has no examples to count; give a share, such "
            "as 0.1."
        )
    return _split(train, share)


def _split(corpus: Corpus, share: float) -> tuple[Corpus, Corpus]:
    left = round((1 - share) * sum(map(len, corpus.texts)))
    index = 0
    while left > len(corpus.texts[index]):
        left -= len(corpus.texts[index])
        index += 1
    text = corpus.texts[index]
    cut = text.rfind("\n", 0, left) + 1
    first = [*corpus.texts[:index], text[:cut]]
    second = [text[cut:], *corpus.texts[index + 1 :]]
    parts = [[t for t in part if t.strip()] for part in (first, second)]
    if not all(parts):
        raise DataError(
            f"eval_split {share} leaves no text on one side of {corpus.source!r}, which is cut "
            "between lines; change it, or give evaluation text as data.eval."
        )
    return Corpus(parts[0], corpus.source), Corpus(parts[1], corpus.source)


def read_corpus(source: str, section: DataSection) -> Corpus:
    """Reads plain text.

    Args:
        source: A text file (also with .gz), or a folder of them, read in the order of their names.
        section: The recipe's data section: the encoding.

    Raises:
        DataError: The source is missing, empty, unreadable or no plain text.
    """
    if not source:
        raise DataError("a path of text is empty; set data.train and data.eval.")
    path = Path(source).expanduser()
    if not path.exists():
        raise DataError(f"there is no file or folder {source!r}; check the path.")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    if not files:
        raise DataError(f"the folder {source!r} holds no text files; fill it, or name another.")
    for file in files:
        if file_type(file) in READERS:
            raise DataError(
                f"{str(file)!r} is a table, not plain text; write the text alone into a .txt file."
            )
    texts = [decode(read_content(file, str(file)), str(file), section) for file in files]
    return Corpus(texts, source)
