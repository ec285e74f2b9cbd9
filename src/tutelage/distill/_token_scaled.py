"""Token-scaled distillation of the logits of a language model."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..sites import Site
from ._context import BatchItems, LossValue, StepContext

__all__ = ["TokenScaledLogits"]


class TokenScaledLogits:
    """KL divergence per token, weighted by how unsure the teacher is of the token that follows.

    Token-scaled logit distillation (Kim et al., "Token-Scaled Logit Distillation for Ternary
    Weight Generative Language Models", arXiv 2308.06744): with ``c_t`` the teacher's cross-entropy
    of token t + 1,

    ``L = mean_sequences sum_t softmax_t(c_t / temperature) KL(p_T,t || p_S,t)``.

    Both run over the real tokens that are followed by a real one; a sequence of one token has no
    loss.
    """

    name = "token_scaled_logits"
    requires: tuple[Site, ...] = ()
    needs_labels = False

    def __init__(self, *, temperature: float = 10.0) -> None:
        """Chooses how even the weights are.

        Args:
            temperature: Divides the teacher's cross-entropies before the softmax over tokens.
        """
        self.temperature = temperature

    def count(self, items: BatchItems) -> Tensor | int:
        """Returns the number of sequences."""
        return items.rows

    def __call__(self, context: StepContext) -> LossValue:
        """Returns the sum over sequences and their number.

        Raises:
            UnsupportedModelError: The model does not predict the next token at every token.
        """
        student, teacher = context.student_logits, context.teacher_logits
        ids = context.token_ids
        if ids is None or student.dim() != 3 or student.shape[:2] != ids.shape:
            raise UnsupportedModelError(
                "the loss term 'token_scaled_logits' needs a prediction of the next token at every "
                "token, as a language model makes it; use 'logits'."
            )
        log_student = torch.log_softmax(student[:, :-1].float(), dim=-1)
        log_teacher = torch.log_softmax(teacher[:, :-1].float(), dim=-1)
        divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
        surprise = -log_teacher.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)
        mask = context.items.prediction_mask
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        pairs = real[:, :-1] & real[:, 1:]
        # A finite number in place of -inf: a row without pairs must not become NaN.
        scores = (surprise / self.temperature).masked_fill(~pairs, -1e4)
        weights = torch.softmax(scores, dim=-1) * pairs
        return LossValue((weights * divergence).sum(), self.count(context.items))
