"""Causal language modelling: plain text to blocks of tokens, perplexity."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import DataError, UnsupportedModelError
from .._corpus import Corpus, read_corpora, read_corpus
from .._processors import position_limit
from .._sections import DataSection
from ..metrics import compute_metrics
from ._dataset import TaskDataset
from ._prediction import Continuation
from ._task import Array, Head, ignore, stacked
from ._text import TokenInputs

__all__ = ["BlockDataset", "CausalLM"]

_CONTINUED = 40
"""Tokens that ``predict`` adds to a text."""

_LARGEST_LOGITS = 2**25
"""Numbers in the logits of a batch in evaluation."""


class BlockDataset(TaskDataset):
    """A text cut in blocks of equal length that do not overlap; the last may be shorter."""

    def __init__(self, ids: Array, block: int):
        """Cuts the text.

        Args:
            ids: Token ids of the whole text, (tokens,).
            block: Tokens of a block, at least 2.
        """
        blocks = [ids[start : start + block] for start in range(0, len(ids), block)]
        self.blocks = [piece for piece in blocks if len(piece) > 1]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.from_numpy(self.blocks[index])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def length(self, index: int) -> int:
        """Returns the number of tokens of a block."""
        return len(self.blocks[index])


@dataclass(frozen=True)
class CausalLM(TokenInputs):
    """The next token after every token of plain text.

    The files are tokenized whole, without special tokens, joined by the tokenizer's end-of-text
    token where it has one, and cut in blocks of ``data.max_length`` tokens that do not overlap; a
    last block of a single token is left out.

    With the blocks ``b = 1..B`` of ``n_b`` tokens each, ``loss`` is the mean negative log
    likelihood in nats over all predicted tokens,
    ``loss = -sum_b sum_{i=2..n_b} log p(x_{b,i} | x_{b,1..i-1}) / sum_b (n_b - 1)``, summed in
    float64, and ``perplexity = exp(loss)``: the first token of a block is not predicted, and no
    token sees what stands before its block. Both depend on the block's length and the tokenizer.

    Attributes:
        metric: ``"perplexity"`` or ``"loss"``.
        vocabulary: Number of token embeddings of the model.
        block: Tokens of a block.
    """

    metric: str
    vocabulary: int
    block: int

    kind = "causal_lm"
    label_names = ()
    needs_padding: ClassVar[bool] = False
    head: ClassVar[Head] = Head(
        suffixes=("ForCausalLM", "LMHeadModel"),
        auto="AutoModelForCausalLM",
        name="language modelling head",
        model="causal language model",
        example="a decoder such as Llama",
    )

    @classmethod
    def read(cls, section: DataSection) -> tuple[Corpus, Corpus]:
        """Reads the text of a recipe, see ``read_corpora``."""
        return read_corpora(section)

    @classmethod
    def read_one(cls, source: str, section: DataSection) -> Corpus:
        """Reads text for evaluation, see ``read_corpus``."""
        return read_corpus(source, section)

    @classmethod
    def build(
        cls, train: Corpus, section: DataSection, eval: Corpus, model_config: Any = None
    ) -> CausalLM:
        """Makes the task of a recipe."""
        vocabulary = int(model_config.get_text_config().vocab_size)
        return cls(section.metric or "perplexity", vocabulary, section.max_length)

    @property
    def eval_batch_size(self) -> int:
        """Blocks of a batch in evaluation: as many as keep its logits small."""
        return max(1, min(64, _LARGEST_LOGITS // (self.block * self.vocabulary)))

    def special_tokens(self, section: DataSection, processor: Any) -> int:
        """Returns 0: blocks hold text only."""
        return 0

    def limit(
        self,
        section: DataSection,
        models: Sequence[nn.Module],
        processor: Any,
        report: Callable[[str], None] = ignore,
    ) -> int:
        """Returns the tokens of a block, and refuses models that see the token they predict."""
        limit = super().limit(section, models, processor, report)
        if limit < 2:
            raise DataError(
                f"data.max_length is {limit}, but a block needs two tokens, one to predict and one "
                "before it; raise it."
            )
        for model in models:
            if not _causal(model):
                raise UnsupportedModelError(
                    f"{type(model).__name__} is not causal: a token changes what is predicted "
                    "before it, so that its perplexity means nothing; give a decoder such as Llama."
                )
        return limit

    def encode(self, examples: Corpus, processor: Any, max_length: int) -> BlockDataset:
        """Tokenizes the whole text and cuts it in blocks.

        Args:
            examples: The text.
            processor: A Hugging Face tokenizer.
            max_length: Tokens of a block.

        Returns:
            A dataset of ``input_ids``, ``attention_mask`` and ``labels``, int64.

        Raises:
            DataError: There are fewer than two tokens, or tokens the model does not know.
        """
        end = [] if processor.eos_token_id is None else [processor.eos_token_id]
        found: list[list[int]] = []
        for text in examples.texts:
            ids = processor(text, add_special_tokens=False, verbose=False)["input_ids"]
            found += [end, ids] if found else [ids]
        ids = np.fromiter(itertools.chain.from_iterable(found), dtype=np.int64)
        if len(ids) < 2:
            raise DataError(
                f"{examples.source!r} has {len(ids)} tokens, too few to predict one; give more "
                "text."
            )
        if ids.max() >= self.vocabulary:
            raise DataError(
                f"the tokenizer gives the token {ids.max()}, but the model has {self.vocabulary} "
                "embeddings; give the model's own tokenizer."
            )
        return BlockDataset(ids, max_length)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """Returns what pads a batch to its longest block; padding has the label -100."""
        pad = processor.pad_token_id or 0
        return lambda items: {
            key: torch.nn.utils.rnn.pad_sequence([item[key] for item in items], True, value)
            for key, value in (("input_ids", pad), ("attention_mask", 0), ("labels", -100))
        }

    def reduce(
        self, values: Float[Tensor, "batch tokens classes"], labels: Tensor | None
    ) -> Float[Tensor, "batch 2"]:
        """Returns the summed negative log likelihood (nats) of every block, and its predictions."""
        assert labels is not None
        rows = []
        for logits, target in zip(values[:, :-1], labels[:, 1:], strict=True):
            loss = nn.functional.cross_entropy(logits.float(), target, reduction="none")
            rows.append(torch.stack([loss.double().sum(), (target != -100).sum().double()]))
        return torch.stack(rows)

    def compared(
        self, values: Float[Tensor, "tokens classes"], data: BlockDataset, row: int
    ) -> Float[Tensor, "rows classes"]:
        """Returns the logits at the tokens that have a next one."""
        return values[: data.length(row) - 1]

    def metrics(self, reduced: Sequence[Array], data: Any) -> dict[str, float]:
        """Computes loss and perplexity."""
        sums = stacked(reduced).astype(np.float64)
        return compute_metrics(self.kind, sums[:, 0], sums[:, 1])

    @classmethod
    def predict(
        cls,
        model: nn.Module,
        processor: Any,
        inputs: Sequence[str],
        pairs: Sequence[str] | None = None,
        max_length: int | None = None,
        section: DataSection | None = None,
    ) -> list[Continuation]:
        """Continues every text by up to 40 tokens, the likeliest one each time."""
        if pairs is not None:
            raise DataError("a language model takes no second text; leave out --pair.")
        return [_continued(model, processor, text) for text in inputs]


def _continued(model: Any, tokenizer: Any, text: str) -> Continuation:
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False).to(model.device)
    tokens, limit = inputs["input_ids"].shape[1], position_limit(model)
    room = _CONTINUED if limit is None else min(_CONTINUED, limit - tokens)
    if not tokens:
        raise DataError("a text is empty; give a few words to go on from.")
    if room < 1:
        raise DataError(
            f"a text has {tokens} tokens and the model takes {limit}, so that none can follow; "
            "shorten it."
        )
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    with torch.inference_mode():
        made = model.generate(
            **inputs, max_new_tokens=room, do_sample=False, num_beams=1, pad_token_id=pad
        )[0]
    before = tokenizer.decode(made[:tokens], skip_special_tokens=True)
    return Continuation(tokenizer.decode(made, skip_special_tokens=True)[len(before) :])


def _causal(model: nn.Module) -> bool:
    """Returns whether the last token leaves the predictions before it alone."""
    device = next(model.parameters()).device
    ids = torch.tensor([[0, 1, 2, 0], [0, 1, 2, 1]], device=device)
    training = model.training
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1]
    model.train(training)
    return bool(torch.allclose(logits[0], logits[1], atol=1e-4))
