"""Token classification: one label for every word, entity F1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...errors import DataError, UnsupportedModelError
from .._bio import is_bio
from .._processors import load_tokenizer
from .._sections import DataSection
from .._tagged import TaggedExamples, read_tagged
from ..metrics import compute_metrics
from ._dataset import EncodedDataset, predict_rows
from ._labels import (
    class_labels,
    class_settings,
    head_names,
    label_ids,
    spellings_of,
    unlabelled_names,
)
from ._prediction import WordLabels
from ._task import AGREEMENT, Array, Head
from ._text import TokenInputs, padded_right

__all__ = ["TaggedDataset", "TokenTask"]

_IGNORED = -100


class TaggedDataset(EncodedDataset):
    """Tokenized sentences; ``labels`` are -100 but at the first token of a word.

    Attributes:
        starts: The positions of the first tokens of every sentence's words.
        words: The numbers of those words.
    """

    def __init__(
        self,
        columns: dict[str, list[list[int]]],
        labels: list[list[int]] | None,
        starts: list[list[int]],
        words: list[list[int]],
    ):
        """Keeps the columns.

        Args:
            columns: What the tokenizer gave.
            labels: One label per token; ``None`` for data without labels.
            starts: The positions of the first tokens of words.
            words: The numbers of those words.
        """
        super().__init__(columns, labels)
        self.starts, self.words = starts, words


@dataclass(frozen=True)
class TokenTask(TokenInputs):
    """One class for every word.

    A word's label stands at its first token, all other tokens carry -100. Words after
    ``data.max_length`` tokens are cut off and not measured. Where the labels are tags of entities
    (BIO, IOBES, BILOU) the metrics are ``entity_f1`` with precision and recall, and
    ``token_accuracy``, the share of right words; else the latter alone.

    Attributes:
        label_names: The names of the outputs, in their order.
        metric: The name of the headline metric.
        spellings: The labels as the data write them, as in ``TextTask``.
    """

    label_names: tuple[str, ...]
    metric: str
    spellings: tuple[str, ...] = ()

    kind = "token_classification"
    reader = staticmethod(read_tagged)
    head: ClassVar[Head] = Head(
        suffixes=("ForTokenClassification",),
        auto="AutoModelForTokenClassification",
        name="token classification head",
        model="token classifier",
        example="a text encoder such as BERT",
    )

    @property
    def model_settings(self) -> dict[str, Any]:
        """Number and names of the outputs."""
        return class_settings(self.label_names)

    @classmethod
    def build(
        cls,
        train: TaggedExamples,
        section: DataSection,
        eval: TaggedExamples,
        model_config: Any = None,
    ) -> TokenTask:
        """Finds the labels as those of texts are found, see ``build_task``.

        A label of the evaluation data that training lacks is taken where ``data.labels`` or the
        model's head names it.
        """
        head = head_names(model_config) if cls.head.on(model_config) else None
        if train.labels is None or eval.labels is None:
            return cls(unlabelled_names(head), AGREEMENT)
        ours, theirs = (
            {label for labels in examples for label in labels}
            for examples in (train.labels, eval.labels)
        )
        if len(ours) > 1:
            ours |= theirs & {*(section.labels or ()), *(head or ())}
        sources = (train.source, eval.source)
        names, spellings = class_labels(ours, theirs, section, sources, head)
        return cls(names, _metric(section, names), spellings)

    @classmethod
    def of_model(
        cls, model: nn.Module, section: DataSection, examples: TaggedExamples
    ) -> TokenTask:
        """Makes the task of a trained model; data may spell its labels in several ways."""
        names = head_names(model.config)
        if examples.labels is None:
            return cls(names, AGREEMENT)
        present = {label for labels in examples.labels for label in labels}
        return cls(names, _metric(section, names), spellings_of(present, names, section))

    @classmethod
    def load_processor(cls, name: str, model_config: Any, key: str = "model.name_or_path") -> Any:
        """Loads the tokenizer of a model, which must know the word of every token.

        Raises:
            RecipeError: There is none.
            UnsupportedModelError: It cannot pad, or does not know words.
        """
        tokenizer = load_tokenizer(name, key)
        if getattr(tokenizer, "add_prefix_space", None) is False:
            tokenizer = load_tokenizer(name, key, add_prefix_space=True)
        if not tokenizer.is_fast:
            raise UnsupportedModelError(
                f"the tokenizer of {name!r} does not tell the word of a token; give a model with a "
                "tokenizer.json."
            )
        return tokenizer

    def encode(self, examples: TaggedExamples, processor: Any, max_length: int) -> TaggedDataset:
        """Tokenizes sentences word by word, without padding.

        Args:
            examples: The sentences.
            processor: A fast Hugging Face tokenizer.
            max_length: Tokens after which a sentence is cut.

        Raises:
            DataError: If a label is not one of the task.
        """
        limit = min(max_length, getattr(processor, "model_max_length", max_length))
        encoded = processor(
            examples.words, is_split_into_words=True, truncation=True, max_length=limit
        )
        starts: list[list[int]] = []
        words: list[list[int]] = []
        for row in range(len(examples)):
            numbers = encoded.word_ids(row)
            first = {word: at for at, word in reversed(list(enumerate(numbers)))}
            pairs = sorted((at, word) for word, at in first.items() if word is not None)
            starts.append([at for at, _ in pairs])
            words.append([word for _, word in pairs])
        labels: list[list[int]] | None = None
        if examples.labels is not None:
            labels = []
            spellings = self.spellings or self.label_names
            for row, given in enumerate(examples.labels):
                ids = label_ids(given, spellings, examples.source)
                found = [_IGNORED] * len(encoded["input_ids"][row])
                for at, word in zip(starts[row], words[row], strict=True):
                    found[at] = ids[word]
                labels.append(found)
        return TaggedDataset(dict(encoded), labels, starts, words)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """Returns what pads a batch to its longest sentence, labels with -100."""

        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = padded_right(items, processor)
            if "labels" in items[0]:
                batch["labels"] = torch.full_like(batch["input_ids"], _IGNORED)
                for row, item in zip(batch["labels"], items, strict=True):
                    row[: len(item["labels"])] = torch.tensor(item["labels"])
            return batch

        return collate

    def reduce(
        self, values: Float[Tensor, "batch tokens classes"], labels: Tensor | None
    ) -> Int[Tensor, "batch tokens"]:
        """Returns the likeliest class of every token."""
        return values.argmax(dim=-1)

    def compared(
        self, values: Float[Tensor, "tokens classes"], data: TaggedDataset, row: int
    ) -> Float[Tensor, "rows classes"]:
        """Returns the logits at the first tokens of words."""
        return values[data.starts[row]]

    def metrics(self, reduced: Sequence[Array], data: TaggedDataset) -> dict[str, float]:
        """Computes entity scores (for BIO tags) and the share of right words."""
        assert data.labels is not None
        predicted, given = [], []
        for row, (found, labels) in enumerate(zip(reduced, data.labels, strict=True)):
            predicted.append([self.label_names[int(found[at])] for at in data.starts[row]])
            given.append([self.label_names[labels[at]] for at in data.starts[row]])
        values = compute_metrics(self.kind, predicted, given)
        if is_bio(self.label_names):
            return values
        return {name: value for name, value in values.items() if not name.startswith("entity")}

    @classmethod
    def predict(
        cls,
        model: nn.Module,
        processor: Any,
        inputs: Sequence[str],
        pairs: Sequence[str] | None = None,
        max_length: int | None = None,
        section: DataSection | None = None,
    ) -> list[WordLabels]:
        """Returns the likeliest label of every word; words stand between blanks."""
        if pairs is not None:
            raise DataError("a token classifier takes no second text; leave out --pair.")
        task = cls(head_names(model.config), AGREEMENT)
        sentences = [text.split() for text in inputs]
        if not all(sentences):
            raise DataError("a text has no words; give at least one.")
        wanted = max_length or processor.model_max_length
        given = DataSection(task="token_classification", train="-", eval="-", max_length=wanted)
        limit = task.limit(given, [model], processor)
        encoded = task.encode(TaggedExamples(sentences, None, "the texts"), processor, limit)
        rows = predict_rows(model, encoded, task.collator(processor))
        found = [WordLabels(words, [None] * len(words)) for words in sentences]
        for row, logits in enumerate(rows):
            best = logits[encoded.starts[row]].argmax(-1)
            for word, index in zip(encoded.words[row], best, strict=True):
                found[row].labels[word] = task.label_names[index]
        return found


def _metric(section: DataSection, names: tuple[str, ...]) -> str:
    bio = is_bio(names)
    metric = section.metric or ("entity_f1" if bio else "token_accuracy")
    if metric.startswith("entity") and not bio:
        raise DataError(
            f"the metric {metric!r} needs tags of entities such as B-PER, I-PER and O, and the "
            f"labels are {', '.join(names[:10])}; set data.metric=token_accuracy."
        )
    return metric
