"""Sets of loss terms: ``default()``, ``relative()``, ``reference()``, or your own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from ..errors import RecipeError, nearest
from ..intervention import intervention
from ..sites import SiteMap
from ._logit_terms import LabelCrossEntropy, Logits
from ._signal_terms import AttentionMapKL, AttentionScores, SignalMSE
from ._terms import LossTerm
from ._token_scaled import TokenScaledLogits

__all__ = [
    "Local",
    "Losses",
    "WeightedTerm",
    "default",
    "reference",
    "register",
    "relative",
    "term",
]

Local = Literal["paper", "code"]
"""Local distillation of a replaced signal.

``"paper"``: as Figure 3 of the paper draws it, the student's own signal is compared with the
teacher's, so that every bypassed projection trains. ``"code"``: the released code, where only the
listed terms act and W_V and W_O rest while the attention output is replaced.
"""

_TERMS: dict[str, Callable[[], LossTerm]] = {
    "logits": Logits,
    "hidden_states": lambda: SignalMSE("hidden_states", "block_output", embeddings=True),
    "attention_output": lambda: SignalMSE("attention_output", "ffn_input"),
    "attention_scores": AttentionScores,
    "attention_map": AttentionMapKL,
    "attention_output_local": lambda: SignalMSE("attention_output_local", "attention_output"),
    "context_local": lambda: SignalMSE("context_local", "context"),
    "relative_hidden_states": lambda: SignalMSE(
        "relative_hidden_states", "block_output", embeddings=True, relative="channel"
    ),
    "relative_attention_output": lambda: SignalMSE(
        "relative_attention_output", "ffn_input", relative="channel"
    ),
    "relative_context": lambda: SignalMSE("relative_context", "context", relative="layer"),
    "relative_projection": lambda: SignalMSE(
        "relative_projection", "attention_output", relative="layer"
    ),
    "labels": LabelCrossEntropy,
    "token_scaled_logits": TokenScaledLogits,
}


def register(name: str, make: Callable[[], LossTerm]) -> None:
    """Adds a loss term under a name.

    Args:
        name: Its name, also its key in ``step.terms``.
        make: Makes the term with its default settings.

    Raises:
        ValueError: The name is taken.
    """
    if name in _TERMS:
        raise ValueError(f"the loss term {name!r} exists already; choose another name.")
    _TERMS[name] = make


def term(name: str) -> LossTerm:
    """Makes a loss term by its name.

    Args:
        name: One of the registered names.

    Raises:
        RecipeError: There is no such term.
    """
    if name not in _TERMS:
        known = ", ".join(repr(key) for key in _TERMS)
        raise RecipeError(
            f"there is no loss term {name!r}; use one of {known}.{nearest(name, _TERMS)}"
        )
    return _TERMS[name]()


@dataclass(frozen=True)
class WeightedTerm:
    """A loss term and its weight in the sum.

    Attributes:
        term: The term.
        weight: Its weight.
    """

    term: LossTerm
    weight: float = 1.0


@dataclass(frozen=True)
class Losses:
    """The terms of a step.

    Attributes:
        terms: Active at every step.
        local: What happens to a replaced signal, see ``Local``.
        automatic: Whether ``fitted`` may choose other terms for a model.
    """

    terms: tuple[WeightedTerm, ...]
    local: Local = "paper"
    automatic: bool = False

    def __post_init__(self) -> None:
        """Checks names and settings."""
        names = [weighted.term.name for weighted in self.terms]
        if not names:
            raise RecipeError("a set of losses needs at least one term, such as 'logits'.")
        for name in names:
            if names.count(name) > 1:
                raise RecipeError(f"the loss term {name!r} is listed twice; list it once.")
        if self.local not in ("paper", "code"):
            raise RecipeError(f"local is {self.local!r}; use 'paper' or 'code'.")

    @classmethod
    def of(cls, weights: Mapping[str, float], *, local: Local = "paper") -> Losses:
        """Makes a set from names and weights.

        Args:
            weights: Weight of every term, by name.
            local: See ``Local``.

        Examples:
            >>> chosen = Losses.of({"logits": 1.0, "attention_scores": 10.0})
            >>> [(weighted.term.name, weighted.weight) for weighted in chosen.terms]
            [('logits', 1.0), ('attention_scores', 10.0)]
        """
        return cls(tuple(WeightedTerm(term(n), w) for n, w in weights.items()), local)

    def with_local(self, local: Local) -> Losses:
        """Returns the same terms with another local distillation."""
        return replace(self, local=local)

    def fitted(self, sites: SiteMap) -> Losses:
        """Returns the terms for a model; the same unless they are ``automatic``.

        A decoder, alone or beside an encoder, is compared by its logits, and by the local term
        while a stage is on: interior terms hurt decoders (Kim et al., arXiv 2308.06744). Where
        attention is written by hand its map stands in for its scores.

        Args:
            sites: The model's sites.
        """
        if not self.automatic:
            return self
        if any(block.causal or block.kind == "cross" for block in sites.blocks):
            return Losses.of({"logits": 1.0}, local=self.local)
        weights = {weighted.term.name: weighted.weight for weighted in self.terms}
        if not _has_scores(sites):
            del weights["attention_scores"]
            if all(block.has("attention_map") for block in sites.blocks):
                weights["attention_map"] = 1.0
        if not all(block.has("context") for block in sites.blocks):
            weights.pop("relative_context", None)
        return Losses.of(weights, local=self.local)

    def at(self, stage: str, sites: SiteMap | None = None) -> tuple[WeightedTerm, ...]:
        """Returns the terms of a stage, completed where projections would get no gradient.

        Args:
            stage: Name of a stage.
            sites: The model's sites; ``None`` for an encoder whose signals are all in reach.

        Raises:
            RecipeError: ``local="code"`` leaves the whole attention without gradient.
        """
        active = intervention(stage)
        if active is None:
            return self.terms
        names = {weighted.term.name for weighted in self.terms}
        scores = "attention_scores" if sites is None or _has_scores(sites) else "attention_map"
        local = scores if active.local == "attention_scores" else active.local
        if self.local == "code":
            if not names & {"attention_scores", "attention_map", local}:
                raise RecipeError(
                    f"in stage {stage!r} no loss term reaches the query and key projections; add "
                    f"{scores!r}, or use local='paper'."
                )
            return self.terms
        # Scores train Q and K alone where the map is replaced, as it always is in
        # cross-attention; the other local signals lie downstream of all projections.
        cross = sites is not None and any(block.kind == "cross" for block in sites.blocks)
        missing = [local] if local not in names else []
        if cross and scores not in missing and scores not in names:
            missing.append(scores)
        if "attention_map" in names:
            missing = [name for name in missing if name != "attention_scores"]
        return (*self.terms, *(WeightedTerm(term(name)) for name in missing))


def _has_scores(sites: SiteMap) -> bool:
    return all(block.has("attention_scores") for block in sites.blocks)


def _automatic(weights: Mapping[str, float], local: Local) -> Losses:
    return replace(Losses.of(weights, local=local), automatic=True)


def default(*, local: Local = "paper") -> Losses:
    """Logits, hidden states, attention output and attention scores over real tokens.

    The weights are 1, 3, 3 and 10: in a few hundred steps a student comes nearer to its teacher's
    predictions through the inner signals than through the logits (docs/results.md).

    They are fitted to the model by ``Distiller``, see ``Losses.fitted``: a decoder is compared by
    its logits.

    Args:
        local: See ``Local``.
    """
    weights = {
        "logits": 1.0,
        "hidden_states": 3.0,
        "attention_output": 3.0,
        "attention_scores": 10.0,
    }
    return _automatic(weights, local)


def relative(*, local: Local = "paper") -> Losses:
    """The default terms and the signals inside attention, each relative to the teacher's variance.

    Logits 1, attention scores 10, and 3 for hidden states and attention output relative to the
    variance of every channel, and for the context and its projection relative to that of the layer.
    Of binary students it makes better ones in a few hundred steps (docs/results.md). Fitted to the
    model as ``default()`` is.

    Args:
        local: See ``Local``.
    """
    weights = {
        "logits": 1.0,
        "attention_scores": 10.0,
        "relative_hidden_states": 3.0,
        "relative_attention_output": 3.0,
        "relative_context": 3.0,
        "relative_projection": 3.0,
    }
    return _automatic(weights, local)


def reference(*, local: Local = "code") -> Losses:
    """The same four terms exactly as published: over all positions, padding included.

    Args:
        local: See ``Local``.
    """
    hidden = SignalMSE("hidden_states", "block_output", masked=False, embeddings=True)
    output = SignalMSE("attention_output", "ffn_input", masked=False)
    terms: tuple[LossTerm, ...] = (
        Logits(entropy=True),
        hidden,
        output,
        AttentionScores(masked=False),
    )
    return Losses(tuple(WeightedTerm(t) for t in terms), local)
