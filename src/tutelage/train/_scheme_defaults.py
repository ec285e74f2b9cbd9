"""Defaults of a recipe that depend on its scheme."""

from __future__ import annotations

from typing import Any

__all__ = ["with_scheme_defaults"]

_BINARY: dict[str, dict[str, Any]] = {
    "schedule": {"kind": "none"},
    "student": {
        "losses": "relative",
        "ramp": 0.5,
        "rate_by_magnitude": True,
        "rate_cap": 0.025,
        "learning_rate": 1e-3,
    },
}
"""Where weights are binary: what ended nearest to the teacher (docs/results.md)."""

_TERNARY: dict[str, dict[str, Any]] = {
    "schedule": {},
    "student": {"rate_by_magnitude": True, "rate_cap": 0.01, "learning_rate": 4e-4},
}
"""Where they are ternary: what stands a learning rate that is three times off."""

_DEFAULTS = {"binary-": _BINARY, "ternary-": _TERNARY}

_USUAL_SCHEME = "ternary-a8"


def with_scheme_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a recipe with what its scheme fills in; what is said stays.

    Args:
        values: Sections of a recipe, as read.
    """
    student = {} if values.get("student") is None else values["student"]
    scheme = student.get("scheme", _USUAL_SCHEME) if isinstance(student, dict) else None
    kinds = [kind for kind in _DEFAULTS if isinstance(scheme, str) and scheme.startswith(kind)]
    if not kinds:
        return values
    filled, defaults = dict(values), _DEFAULTS[kinds[0]]
    # A schedule of which anything is said is the user's own.
    if not filled.get("schedule") and defaults["schedule"]:
        filled["schedule"] = defaults["schedule"]
    said = {key: value for key, value in student.items() if value is not None}
    own = dict(defaults["student"])
    if said.get("rate_by_magnitude") is False:
        del own["rate_cap"]  # a part of what the rates are not in proportion to
    filled["student"] = {**student, **own, **said}
    return filled
