"""What is quantized, and how: one object drives training, packing, kernels and exports."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from .errors import SchemeError, nearest
from .quantizers import (
    BaseQuantizer,
    BinaryQuantizer,
    FourLevelQuantizer,
    Granularity,
    TernaryQuantizer,
    UniformQuantizer,
    UnsignedQuantizer,
)

__all__ = [
    "WEIGHT_QUANTIZERS",
    "ActivationSpec",
    "AttentionSpec",
    "ModuleSpec",
    "Rule",
    "Scheme",
    "WeightSpec",
]

WEIGHT_QUANTIZERS: dict[str, type[BaseQuantizer]] = {
    "ternary": TernaryQuantizer,
    "binary": BinaryQuantizer,
    "four-level": FourLevelQuantizer,
}
"""Weight quantizers by the name a scheme gives them; add yours here."""

_Product = Literal["linear", "conv1d", "conv2d"]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ").rstrip(".")
            hint = nearest(where, type(self).model_fields) if "extra" in first["type"] else ""
            place = f"{type(self).__name__}: {where}: " if where else f"{type(self).__name__}: "
            stop = "" if message.endswith("?") else "."
            raise SchemeError(f"{place}{message}{stop}{hint}") from None


class WeightSpec(_Spec):
    """How a weight is quantized.

    Attributes:
        kind: ``"ternary"``, ``"binary"`` or ``"four-level"``.
        granularity: One scale per ``"row"`` (output channel) or per ``"tensor"``.
        clip: Latent weights are clamped to [-clip, clip], gradients are zero beyond; or ``None``.
        learned_scale: Train a factor of every scale with the weights. For products only: of a
            table of embeddings a batch sees few rows.
    """

    kind: str
    granularity: Granularity = "row"
    clip: Annotated[float, Field(gt=0)] | None = None
    learned_scale: bool = False

    @model_validator(mode="after")
    def _known(self) -> WeightSpec:
        if self.kind not in WEIGHT_QUANTIZERS:
            known = ", ".join(repr(kind) for kind in WEIGHT_QUANTIZERS)
            hint = nearest(self.kind, WEIGHT_QUANTIZERS)
            raise ValueError(f"no weight quantizer is called {self.kind!r}; use {known}{hint}")
        return self

    def build(self) -> BaseQuantizer:
        """Makes the quantizer."""
        return WEIGHT_QUANTIZERS[self.kind](self.granularity, clip=self.clip)

    @property
    def bits(self) -> int:
        """Bits of one packed code."""
        return WEIGHT_QUANTIZERS[self.kind].grid.bits


class ActivationSpec(_Spec):
    """How an activation is quantized; the scale is computed at run time.

    Attributes:
        bits: Word length, 2 to 8.
        granularity: One scale per ``"row"`` (token) or per ``"tensor"``.
        clip: Values are clamped to [-clip, clip] first, gradients are zero beyond; or ``None``.
        signed: Symmetric around zero; ``False`` for values that are never negative.
        reciprocal: Multiply by the reciprocal of the scale, as the published code does.
    """

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    granularity: Granularity = "row"
    clip: Annotated[float, Field(gt=0)] | None = None
    signed: bool = True
    reciprocal: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> ActivationSpec:
        if not self.signed and (self.clip is not None or self.reciprocal):
            raise ValueError("clip and reciprocal need signed=True")
        return self

    def build(self) -> BaseQuantizer:
        """Makes the quantizer."""
        if not self.signed:
            return UnsignedQuantizer(self.bits, self.granularity)
        return UniformQuantizer(
            self.bits, self.granularity, clip=self.clip, reciprocal=self.reciprocal
        )


class AttentionSpec(_Spec):
    """How the operands of Q K^T and P V are quantized.

    Attributes:
        query: Queries.
        key: Keys.
        value: Values.
        attention_map: The softmax output.
    """

    query: ActivationSpec
    key: ActivationSpec
    value: ActivationSpec
    attention_map: ActivationSpec


class ModuleSpec(_Spec):
    """How one module of a model is quantized; the resolved map holds one per module.

    Attributes:
        kind: ``"linear"``, ``"conv1d"`` (GPT-2's transposed Linear), ``"conv2d"`` (a patch
            embedding), ``"embedding"`` or ``"attention"``.
        weight: Of all but attention; a row is an output feature or a table entry.
        input: Of a Linear or convolution; ``None`` for weight-only quantization.
        attention: Of an attention module.
        arithmetic: ``"integer"`` products scaled once at the end, which is exact, or ``"float"``
            products of scaled values, as in the published code.
        shared_with: The module whose weight, codes and scales this one uses; ``None`` for its own.
    """

    kind: Literal["linear", "conv1d", "conv2d", "embedding", "attention"]
    weight: WeightSpec | None = None
    input: ActivationSpec | None = None
    attention: AttentionSpec | None = None
    arithmetic: Literal["integer", "float"] = "integer"
    shared_with: str | None = None

    @model_validator(mode="after")
    def _scale_of_a_product(self) -> ModuleSpec:
        if self.kind == "embedding" and self.weight is not None and self.weight.learned_scale:
            raise ValueError("learned_scale is for products, not for a table of embeddings")
        return self


class Rule(_Spec):
    """An exception from the scheme for modules whose whole qualified name matches.

    The first rule that matches decides. Both specs ``None`` keeps the module in full precision.
    Where modules share one weight, as tied embeddings do, a rule about one is about all. Untied
    output heads and the convolution that embeds patches are quantized only where a rule says so.

    Attributes:
        pattern: Regular expression that must match the whole name.
        weight: How the weight is quantized instead.
        input: How the input is quantized instead.
    """

    pattern: str
    weight: WeightSpec | None = None
    input: ActivationSpec | None = None

    @model_validator(mode="after")
    def _compiles(self) -> Rule:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"{self.pattern!r} is no regular expression ({error})") from None
        if self.weight is None and self.input is not None:
            raise ValueError("input without weight; give both, or neither for full precision")
        return self

    def matches(self, name: str) -> bool:
        """Whether the rule is about the module called ``name``."""
        return re.fullmatch(self.pattern, name) is not None


class Scheme(_Spec):
    """Which parts of a Transformer are quantized, and how.

    Every Linear (and ``Conv1D``) inside the base model, the word embeddings and the products
    inside attention are quantized; position and type embeddings, norms, biases, the softmax, the
    residual stream and the task head never are. An output head that is tied to the word
    embeddings uses their codes and scales.

    Attributes:
        name: Shown in summaries and model cards.
        weight: Linear weights.
        input: Linear inputs; ``None`` for weight-only quantization.
        embedding: Word embeddings; ``None`` keeps them in full precision.
        attention: Products inside attention; ``None`` keeps them in full precision.
        arithmetic: How products of Linears are computed, see ``ModuleSpec``.
        rules: Exceptions by module name.

    Examples:
        >>> scheme = Scheme.preset("binary-a8")
        >>> scheme.weight.kind
        'binary'
    """

    name: str = "custom"
    weight: WeightSpec
    input: ActivationSpec | None = None
    embedding: WeightSpec | None = None
    attention: AttentionSpec | None = None
    arithmetic: Literal["integer", "float"] = "integer"
    rules: tuple[Rule, ...] = ()

    @staticmethod
    def preset(name: str) -> Scheme:
        """Returns a ready-made scheme.

        Args:
            name: ``"ternary-a8"``, ``"ternary-a4"``, ``"binary-a8"``, ``"binary-a4"``,
                ``"w2-a8"``, or ``"reference"``: the published TernaryBERT and Teacher
                Intervention code with its per-tensor scales and its clipping at 2.5.

        Raises:
            SchemeError: There is no preset of that name.
        """
        from ._presets import PRESETS

        if name not in PRESETS:
            known = ", ".join(map(repr, PRESETS))
            hint = nearest(name, PRESETS)
            raise SchemeError(f"there is no scheme {name!r}; use one of {known}.{hint}")
        return PRESETS[name]

    @staticmethod
    def presets() -> tuple[str, ...]:
        """Returns the names of all presets."""
        from ._presets import PRESETS

        return tuple(PRESETS)

    def without_attention(self) -> Scheme:
        """Returns the same scheme with the products inside attention in full precision."""
        return self.model_copy(update={"attention": None})

    def with_learned_scales(self) -> Scheme:
        """Returns the same scheme with a trained factor of every scale of a product's weight.

        The rules keep what they say. See ``WeightSpec.learned_scale``.
        """
        weight = self.weight.model_copy(update={"learned_scale": True})
        return self.model_copy(update={"weight": weight})

    def rule_for(self, name: str) -> Rule | None:
        """Returns the rule that decides about the module called ``name``, if there is one."""
        return next((rule for rule in self.rules if rule.matches(name)), None)

    def linear(self, name: str, kind: _Product = "linear") -> ModuleSpec | None:
        """Returns how the Linear called ``name`` is quantized, ``None`` for not at all."""
        if self.rule_for(name) is not None:
            return self.by_rule(name, kind)
        return self._product(kind, self.weight, self.input)

    def word_embedding(self, name: str) -> ModuleSpec | None:
        """Returns how the embedding called ``name`` is quantized, ``None`` for not at all."""
        rule = self.rule_for(name)
        weight = self.embedding if rule is None else rule.weight
        return None if weight is None else ModuleSpec(kind="embedding", weight=weight)

    def by_rule(self, name: str, kind: _Product) -> ModuleSpec | None:
        """Returns how a module that only a rule can quantize is, ``None`` for not at all."""
        rule = self.rule_for(name)
        if rule is None or rule.weight is None:
            return None
        return self._product(kind, rule.weight, rule.input)

    def _product(
        self, kind: _Product, weight: WeightSpec, input: ActivationSpec | None
    ) -> ModuleSpec:
        return ModuleSpec(kind=kind, weight=weight, input=input, arithmetic=self.arithmetic)
