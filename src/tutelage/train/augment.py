"""More training texts: copies in which a masked language model has replaced words.

The method is TinyBERT's data augmentation (Jiao et al., Findings of EMNLP 2020, Algorithm 1), of
which the ternary BERT papers train on the smaller GLUE tasks. Of every text there are `copies`
copies, in which each word is replaced with `probability` by one of the `candidates` words that the
masked language model finds likeliest at its place, all equally likely. As in the published code the
model sees the masked text with the whole one behind it, and English function words stay.

What differs: only words that are a single piece of the model's tokenizer are replaced. The
published code replaces the others by their neighbours among GloVe vectors, which are not shipped
here. A word is never its own candidate, candidates are whole words, and a copy that equals another
one is kept, so that every example weighs the same.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ..errors import DataError, NonFiniteLossError, UnsupportedModelError
from ._models import auto_class, load_config, load_tokenizer
from ._processors import one_line, position_limit
from ._sections import AugmentSection
from ._words import content_words, whole_words
from .data import Examples
from .tasks import Head

__all__ = ["Augmenter", "Replaceable"]

_KEY = "data.augment.model"
_HEAD = Head(
    suffixes=("ForMaskedLM",),
    auto="AutoModelForMaskedLM",
    name="masked language model head",
    model="masked language model",
    example="one such as bert-base-uncased",
)
_CHUNK = 256
_TOKENS = 4096


class Replaceable(NamedTuple):
    """A word of a text that others may replace.

    Attributes:
        start: Its first character.
        end: The character behind it.
        candidates: What may take its place, the likeliest first.
    """

    start: int
    end: int
    candidates: tuple[str, ...]


@dataclass(frozen=True)
class Augmenter:
    """Makes altered copies of texts.

    Attributes:
        section: How many copies and candidates, and how likely a replacement is.
        seed: Decides, with the number of the example, what is replaced by what.
        model: The masked language model, in eval mode.
        tokenizer: Its fast tokenizer.
        words: The text of every piece that is a whole word, by its number.
        allowed: Which outputs of the model are whole words.
    """

    section: AugmentSection
    seed: int
    model: Any
    tokenizer: Any
    words: dict[int, str]
    allowed: Bool[Tensor, " outputs"]

    @classmethod
    def load(cls, section: AugmentSection, seed: int) -> Augmenter:
        """Loads the masked language model of a recipe.

        Args:
            section: The recipe's section.
            seed: The recipe's seed.

        Raises:
            RecipeError: There is no such model or tokenizer.
            UnsupportedModelError: It has no masked language model head, or its tokenizer has no
                mask or knows no words.
        """
        name = section.model
        config = load_config(name, _KEY)
        auto = auto_class(name, config, _HEAD, _KEY)
        tokenizer = load_tokenizer(name, _KEY)
        if not tokenizer.is_fast or tokenizer.mask_token_id is None:
            lacks = "does not tell the place of a token" if not tokenizer.is_fast else "has no mask"
            raise UnsupportedModelError(
                f"the tokenizer of {_KEY} {name!r} {lacks}; give {_HEAD.example}."
            )
        with one_line(_KEY, name):
            model, info = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        missing = sorted(info["missing_keys"])
        if missing:
            raise UnsupportedModelError(
                f"{_KEY} {name!r} has no trained {_HEAD.name} (it lacks {missing[0]!r}); give "
                f"{_HEAD.example}."
            )
        words = whole_words(tokenizer)
        outputs = model.get_input_embeddings().num_embeddings
        if len(words) < 2 or max(words) >= outputs:
            raise UnsupportedModelError(
                f"the tokenizer of {_KEY} {name!r} knows {len(words)} whole words up to number "
                f"{max(words, default=0)}, and the model {outputs} pieces; give {_HEAD.example}."
            )
        allowed = torch.zeros(outputs, dtype=torch.bool)
        allowed[list(words)] = True
        return cls(section, seed, model.eval(), tokenizer, words, allowed)

    @property
    def choice(self) -> int:
        """The number of candidates of a word: fewer than the recipe says in a tiny vocabulary."""
        return min(self.section.candidates, len(self.words) - 1)

    def expand(
        self, examples: Examples, report: Callable[[str], None] = lambda line: None
    ) -> Examples:
        """Returns every example followed by its altered copies.

        Of a pair one text is altered at a time, as in the published code: `copies` copies have
        another first text, as many another second one. Labels are copied.

        Args:
            examples: Texts or pairs of texts.
            report: Told how many examples there are in the end.

        Raises:
            DataError: No word of any text can be replaced.
            NonFiniteLossError: An output of the model is NaN or infinite.
        """
        columns = [examples.texts] if examples.pairs is None else [examples.texts, examples.pairs]
        made: list[list[str]] = [[] for _ in columns]
        origin: list[int] = []
        words = 0
        with self._on_device():
            for start in range(0, len(examples), _CHUNK):
                rows = range(start, min(start + _CHUNK, len(examples)))
                distinct = list(dict.fromkeys(column[row] for column in columns for row in rows))
                found = dict(zip(distinct, self.candidates(distinct), strict=True))
                words += sum(map(len, found.values()))
                for row in rows:
                    given = [column[row] for column in columns]
                    versions = [given]
                    for number, text in enumerate(given):
                        copies = self._copies(text, found[text], (number, row))
                        versions += [[*given[:number], c, *given[number + 1 :]] for c in copies]
                    for version in versions:
                        origin.append(row)
                        for column, text in zip(made, version, strict=True):
                            column.append(text)
        if not words:
            raise DataError(
                f"no word of {examples.source!r} is a single piece of the tokenizer of {_KEY} "
                f"{self.section.model!r}; give a model of the texts' language, or remove "
                "data.augment."
            )
        report(f"{len(examples):,} training examples became {len(origin):,}")
        labels: Any = examples.labels and [examples.labels[row] for row in origin]
        pairs = None if examples.pairs is None else made[1]
        return Examples(made[0], pairs, labels, examples.source)

    def candidates(self, texts: Sequence[str]) -> list[list[Replaceable]]:
        """Finds the words that can be replaced, and by what.

        Args:
            texts: The texts.

        Returns:
            Of every text its words in their order, each with ``choice`` candidates. Words beyond
            half of the model's length are not among them.

        Raises:
            NonFiniteLossError: An output of the model is NaN or infinite.
        """
        limit = min(self.tokenizer.model_max_length, position_limit(self.model) or 512)
        encoded = self.tokenizer(
            list(texts),
            list(texts),
            truncation="longest_first",
            max_length=limit,
            return_offsets_mapping=True,
        )
        offsets = encoded.pop("offset_mapping")
        masked = []
        special = set(self.tokenizer.all_special_ids)
        for row, text in enumerate(texts):
            spans = content_words(text)
            sequences = encoded.sequence_ids(row)
            for position, span in enumerate(offsets[row]):
                known = encoded["input_ids"][row][position] not in special
                if sequences[position] == 0 and tuple(span) in spans and known:
                    masked.append((row, position))
        found: list[list[Replaceable]] = [[] for _ in texts]
        best = self._predict(encoded, masked)
        for (row, position), numbers in sorted(best.items()):
            words = tuple(self.words[number] for number in numbers)
            start, end = offsets[row][position]
            found[row].append(Replaceable(start, end, words))
        return found

    def _predict(
        self, encoded: Any, masked: list[tuple[int, int]]
    ) -> dict[tuple[int, int], list[int]]:
        """Returns the numbers of the likeliest whole words at places that are masked in turn."""
        accepted = inspect.signature(self.model.forward).parameters
        names = [name for name in encoded if name in accepted]
        device = self.model.device
        best: dict[tuple[int, int], list[int]] = {}
        for places in _batches(masked, [len(ids) for ids in encoded["input_ids"]]):
            batch = self.tokenizer.pad(
                {name: [encoded[name][row] for row, _ in places] for name in names},
                padding_side="right",
                return_tensors="pt",
            ).to(device)
            at = torch.arange(len(places)), torch.tensor([position for _, position in places])
            original = batch["input_ids"][at].clone()
            batch["input_ids"][at] = self.tokenizer.mask_token_id
            with torch.inference_mode():
                logits = self.model(**batch).logits[at].float()[:, : len(self.allowed)]
            if not logits.isfinite().all():
                raise NonFiniteLossError(
                    f"the outputs of {_KEY} {self.section.model!r} are NaN or infinite; give "
                    "another model."
                )
            logits = logits.masked_fill(~self.allowed.to(device), -torch.inf)
            logits.scatter_(1, original[:, None], -torch.inf)
            numbers = logits.topk(self.choice).indices.tolist()
            best.update(zip(places, numbers, strict=True))
        return best

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        try:
            yield
        finally:
            self.model.to("cpu")

    def _copies(self, text: str, words: list[Replaceable], key: tuple[int, int]) -> list[str]:
        random = np.random.default_rng([self.seed, *key])
        shape = (self.section.copies, len(words))
        replaced = random.random(shape) < self.section.probability
        chosen = random.integers(self.choice, size=shape)
        copies = []
        for flags, choices in zip(replaced, chosen, strict=True):
            pieces, done = [], 0
            for word, flag, choice in zip(words, flags, choices, strict=True):
                if flag:
                    pieces += [text[done : word.start], word.candidates[choice]]
                    done = word.end
            copies.append("".join(pieces) + text[done:])
        return copies


def _batches(masked: list[tuple[int, int]], lengths: list[int]) -> Iterator[list[tuple[int, int]]]:
    """Yields (row, position) of like length, no more than fit into the memory for logits."""
    batch: list[tuple[int, int]] = []
    for place in sorted(masked, key=lambda place: (lengths[place[0]], place)):
        if batch and (len(batch) + 1) * lengths[place[0]] > _TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
