"""The ready-made schemes."""

from __future__ import annotations

from .scheme import ActivationSpec, AttentionSpec, Scheme, WeightSpec

__all__ = ["PRESETS"]


def _per_token(name: str, kind: str, bits: int) -> Scheme:
    token = ActivationSpec(bits=bits)
    attention = AttentionSpec(
        query=token,
        key=token,
        value=token,
        attention_map=ActivationSpec(bits=bits, signed=False),
    )
    weight = WeightSpec(kind=kind)
    return Scheme(name=name, weight=weight, input=token, embedding=weight, attention=attention)


def _reference() -> Scheme:
    clip = 2.5
    tensor = ActivationSpec(granularity="tensor", clip=clip, reciprocal=True)
    return Scheme(
        name="reference",
        weight=WeightSpec(kind="ternary", granularity="tensor", clip=clip),
        input=tensor,
        embedding=WeightSpec(kind="ternary", granularity="row", clip=clip),
        attention=AttentionSpec(query=tensor, key=tensor, value=tensor, attention_map=tensor),
        arithmetic="float",
    )


PRESETS: dict[str, Scheme] = {
    "ternary-a8": _per_token("ternary-a8", "ternary", 8),
    "ternary-a4": _per_token("ternary-a4", "ternary", 4),
    "binary-a8": _per_token("binary-a8", "binary", 8),
    "binary-a4": _per_token("binary-a4", "binary", 4),
    "w2-a8": _per_token("w2-a8", "four-level", 8),
    "reference": _reference(),
}
