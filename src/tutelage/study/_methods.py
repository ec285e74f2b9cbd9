"""Methods by name: what each changes in a recipe."""

from __future__ import annotations

from typing import Any

__all__ = ["METHODS"]

_PUBLISHED = {
    "logits": 1.0,
    "hidden_states": 1.0,
    "attention_output": 1.0,
    "attention_scores": 1.0,
}


_ABRUPT = {"ramp": 0.0, "rate_by_magnitude": False, "rate_cap": 0.0, "average": 0.0}
"""As published: quantized from the first step, one learning rate for all, the last weights."""


def _plain(losses: Any) -> dict[str, Any]:
    return {"schedule": {"kind": "none"}, "student": {"losses": losses, **_ABRUPT}}


def _intervention(local: str, **schedule: Any) -> dict[str, Any]:
    return {"schedule": schedule, "student": {"losses": "default", "local": local, **_ABRUPT}}


_SCHEDULES: dict[str, dict[str, Any]] = {
    "ti-o": {"kind": "constant", "stage": "attention_output"},
    "ti-c": {"kind": "constant", "stage": "context"},
    "ti-m": {"kind": "constant", "stage": "attention_map"},
    "ti-g": {"kind": "gradual"},
    "ti-inverted": {"kind": "inverted"},
    "ti-stochastic": {"kind": "stochastic"},
}

METHODS: dict[str, dict[str, Any]] = {
    "default": {},
    "ptq": {"train": False},
    "ce": _plain({"labels": 1.0}),
    "logits-kd": _plain({"logits": 1.0}),
    "full-kd": _plain("default"),
    "ternarybert": _plain(_PUBLISHED),
    "ramp": {
        "schedule": {"kind": "none"},
        "student": {**_ABRUPT, "losses": "default", "ramp": 0.5, "rate_by_magnitude": True},
    },
    **{name: _intervention("paper", **schedule) for name, schedule in _SCHEDULES.items()},
    **{f"{name}-code": _intervention("code", **schedule) for name, schedule in _SCHEDULES.items()},
}
"""Parts of a recipe that a method sets, by the name a study gives it; add yours here.

``default`` is the library's recipe for the scheme. ``ptq`` quantizes and does not train. ``ce``
learns from labels alone, ``logits-kd`` from the teacher's logits, ``full-kd`` with the library's
losses and ``ternarybert`` with the same four terms at weight 1 (Zhang et al., arXiv 2009.12812),
all without intervention. ``ramp`` is ``full-kd`` that goes from full precision to quantized over
the first half of the training, with rates in proportion to the magnitude of the weights. ``ti-o``,
``ti-c``, ``ti-m`` and ``ti-g`` are the stages and their gradual order (Kim et al.,
arXiv 2302.11812), ``ti-inverted`` and ``ti-stochastic`` their other orders; ``-code`` has the local
distillation of the released code in place of the paper's, see ``tutelage.distill.losses.Local``.
"""
