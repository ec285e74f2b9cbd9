"""Extractive question answering: windows of contexts, exact match and F1."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...errors import DataError
from .._sections import DataSection
from .._squad import QuestionExamples, read_questions
from ..metrics import compute_metrics
from ._dataset import EncodedDataset, predict_rows
from ._labels import no_teacher
from ._prediction import Answer
from ._task import AGREEMENT, Array, Head
from ._text import TokenInputs, padded_right

__all__ = ["QuestionTask", "WindowDataset"]


class WindowDataset(EncodedDataset):
    """Questions with a window of their context each; ``labels`` are (first, last) token.

    Attributes:
        examples: The questions.
        question: The number of every window's question.
        offsets: First and last character in the context of every window's tokens; (0, 0) for
            tokens that are not of the context.
    """

    def __init__(
        self,
        columns: dict[str, list[list[int]]],
        labels: list[list[int]] | None,
        examples: QuestionExamples,
        question: list[int],
        offsets: list[Array],
    ):
        """Keeps the windows.

        Args:
            columns: What the tokenizer gave, one row per window.
            labels: First and last token of the answer; ``None`` for data without answers.
            examples: The questions.
            question: The number of every window's question.
            offsets: (tokens, 2) per window.
        """
        super().__init__(columns, labels)
        self.examples, self.question, self.offsets = examples, question, offsets


@dataclass(frozen=True)
class QuestionTask(TokenInputs):
    """The span of a context that answers a question.

    A context that is too long is cut in windows of ``data.max_length`` tokens, question included,
    of which two neighbours share ``data.stride``. A window is trained towards the first answer of
    its question, or towards its first token where it does not hold the whole answer. The answer to
    a question is the span of at most ``data.max_answer`` tokens of the context with the largest sum
    of start and end logits over all of its windows. Agreement and KL are over the start and the end
    of every window.

    Where questions may be unanswerable (SQuAD 2), those without an answer are trained towards the
    first token of every window. No answer is given where the least sum of the first token's start
    and end logits, over all windows, exceeds the sum of the best span: the rule of the SQuAD 2
    baselines with a threshold of 0.

    Attributes:
        metric: ``"answer_f1"`` or ``"exact_match"``.
        stride: Tokens that two windows share.
        max_answer: Tokens of the longest answer.
        unanswerable: Whether a context may hold no answer.
    """

    metric: str
    stride: int
    max_answer: int
    unanswerable: bool = False

    kind = "question_answering"
    label_names = ()
    reader = staticmethod(read_questions)
    head: ClassVar[Head] = Head(
        suffixes=("ForQuestionAnswering",),
        auto="AutoModelForQuestionAnswering",
        name="question answering head",
        model="question answering model",
        example="a text encoder such as BERT",
    )

    @property
    def model_settings(self) -> dict[str, Any]:
        """Two outputs for every token, whatever the folder's own number of labels."""
        return {"num_labels": 2}

    @classmethod
    def build(
        cls,
        train: QuestionExamples,
        section: DataSection,
        eval: QuestionExamples,
        model_config: Any = None,
    ) -> QuestionTask:
        """Makes the task of a recipe."""
        if section.label is None and not cls.head.on(model_config):
            raise no_teacher()
        metric = section.metric or ("answer_f1" if section.label is not None else AGREEMENT)
        return cls(metric, section.stride, section.max_answer, section.unanswerable)

    def encode(self, examples: QuestionExamples, processor: Any, max_length: int) -> WindowDataset:
        """Tokenizes questions and contexts into windows, without padding.

        Args:
            examples: The questions.
            processor: A fast Hugging Face tokenizer.
            max_length: Tokens of a window.

        Raises:
            DataError: A question leaves no room for its context.
        """
        limit = min(max_length, getattr(processor, "model_max_length", max_length))
        special = processor.num_special_tokens_to_add(pair=True)
        asked = processor(examples.questions, add_special_tokens=False)["input_ids"]
        longest = max(range(len(asked)), key=lambda row: len(asked[row]))
        if limit - special - len(asked[longest]) <= self.stride:
            raise DataError(
                f"question {longest + 1} of {examples.source!r} has {len(asked[longest])} tokens: "
                f"a window of {limit} has no room for more of the context than the {self.stride} "
                "that two windows share; raise data.max_length or lower data.stride."
            )
        encoded = processor(
            examples.questions,
            examples.contexts,
            truncation="only_second",
            max_length=limit,
            stride=self.stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        question = list(encoded.pop("overflow_to_sample_mapping"))
        offsets = []
        for row, pairs in enumerate(encoded.pop("offset_mapping")):
            of_context = np.array([part == 1 for part in encoded.sequence_ids(row)])
            offsets.append(np.asarray(pairs) * of_context[:, None])
        labels = None
        if examples.labels is not None:
            labels = [
                _answer_tokens(offsets[row], *accepted[0]) if accepted else [0, 0]
                for row, accepted in enumerate(examples.labels[number] for number in question)
            ]
        return WindowDataset(dict(encoded), labels, examples, question, offsets)

    def collator(self, processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Tensor]]:
        """Returns what pads a batch to its longest window."""

        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            batch = padded_right(items, processor)
            if "labels" in items[0]:
                batch["labels"] = torch.tensor([item["labels"] for item in items])
            return batch

        return collate

    @staticmethod
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Returns the mean of the cross-entropies of start and end.

        Args:
            outputs: What a question answering model returned.
            labels: First and last token of the answers, (batch, 2).
            num_items_in_batch: Not used.
        """
        logits = torch.stack((outputs["start_logits"], outputs["end_logits"]), dim=1)
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def values(self, outputs: Any) -> Float[Tensor, "batch 2 tokens"]:
        """Returns start and end logits among the tensors that ``Trainer`` gathers."""
        return torch.stack(tuple(outputs[:2]), dim=1)

    def reduce(
        self, values: Float[Tensor, "batch 2 tokens"], labels: Tensor | None
    ) -> Float[Tensor, "batch tokens 2"]:
        """Returns start and end logits of every token."""
        return values.transpose(1, 2)

    def compared(
        self, values: Float[Tensor, "2 tokens"], data: WindowDataset, row: int
    ) -> Float[Tensor, "2 tokens"]:
        """Returns start and end logits over the tokens of a window."""
        return values[:, : data.length(row)]

    def metrics(self, reduced: Sequence[Array], data: WindowDataset) -> dict[str, float]:
        """Computes exact match and F1 of the best span of every question."""
        assert data.examples.labels is not None
        answers = self.answers(reduced, data)
        given = [[text for text, _ in accepted] or [""] for accepted in data.examples.labels]
        return compute_metrics(self.kind, [answer.answer for answer in answers], given)

    def answers(self, reduced: Sequence[Array], data: WindowDataset) -> list[Answer]:
        """Returns the best span of every question over its windows, or that there is none.

        Args:
            reduced: What ``reduce`` gave, one array per window.
            data: The windows.
        """
        best: list[Answer | None] = [None] * len(data.examples)
        none = [math.inf] * len(data.examples)
        for row, logits in enumerate(reduced):
            number, offsets = data.question[row], data.offsets[row]
            none[number] = min(none[number], float(logits[0].astype(np.float64).sum()))
            tokens = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
            if not len(tokens):
                continue
            first, last, score = self._best_span(logits[tokens])
            known = best[number]
            if known is None or score > known.score:
                start, end = int(offsets[tokens[first], 0]), int(offsets[tokens[last], 1])
                text = data.examples.contexts[number][start:end]
                best[number] = Answer(text, start, end, score)
        return [
            Answer("", 0, 0, 0.0 if found is None else score)
            if found is None or (self.unanswerable and score > found.score)
            else found
            for found, score in zip(best, none, strict=True)
        ]

    def _best_span(self, logits: Float[Array, "tokens 2"]) -> tuple[int, int, float]:
        """Returns first and last token of the span with the largest sum of logits."""
        sums = logits[:, 0, None].astype(np.float64) + logits[None, :, 1]
        allowed = np.triu(np.ones(sums.shape, bool)) & ~np.triu(
            np.ones(sums.shape, bool), self.max_answer
        )
        first, last = np.unravel_index(np.where(allowed, sums, -np.inf).argmax(), sums.shape)
        return int(first), int(last), float(sums[first, last])

    @classmethod
    def predict(
        cls,
        model: nn.Module,
        processor: Any,
        inputs: Sequence[str],
        pairs: Sequence[str] | None = None,
        max_length: int | None = None,
        section: DataSection | None = None,
    ) -> list[Answer]:
        """Returns the answer to each of ``pairs`` (questions) in ``inputs`` (contexts)."""
        if pairs is None:
            raise DataError("a question answering model needs a question; give it with --pair.")
        wanted = max_length or processor.model_max_length
        given = section or DataSection.model_validate({"task": cls.kind, "train": "-", "eval": "-"})
        task = cls("answer_f1", given.stride, given.max_answer, given.unanswerable)
        given = given.model_copy(update={"max_length": wanted})
        limit = task.limit(given, [model], processor)
        if section is None:
            task = dataclasses.replace(task, stride=min(given.stride, limit // 4))
        examples = QuestionExamples(list(inputs), list(pairs), None, "the texts")
        encoded = task.encode(examples, processor, limit)

        def logits(output: Any) -> Tensor:
            return task.reduce(task.values((output.start_logits, output.end_logits)), None)

        rows = predict_rows(model, encoded, task.collator(processor), of=logits)
        return task.answers(rows, encoded)


def _answer_tokens(offsets: Array, text: str, start: int) -> list[int]:
    """Returns first and last token of an answer, (0, 0) where a window does not hold all of it."""
    tokens = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    end = start + len(text)
    if not len(tokens) or offsets[tokens[0], 0] > start or offsets[tokens[-1], 1] < end:
        return [0, 0]
    inside = [at for at in tokens if offsets[at, 1] > start and offsets[at, 0] < end]
    return [int(inside[0]), int(inside[-1])] if inside else [0, 0]
