"""Defaults of a recipe that depend on its scheme."""

from __future__ import annotations

from typing import Any

__all__ = ["USUAL_SCHEME", "USUAL_STEPS", "with_scheme_defaults"]

USUAL_SCHEME = "ternary-a8"
"""The scheme of a recipe that names none."""

USUAL_STEPS = 300
"""The training steps of a recipe that names none."""

_BINARY: dict[str, dict[str, Any]] = {
    "schedule": {"kind": "none"},
    "student": {
        "losses": "relative",
        "ramp": 0.5,
        "rate_by_magnitude": True,
        "rate_cap": 0.025,
        "learning_rate": 1e-3,
    },
    "long": {"average": 0.2},
}
"""Where weights are binary: what ended nearest to the teacher (docs/results.md)."""

_TERNARY: dict[str, dict[str, Any]] = {
    "schedule": {},
    "student": {"rate_by_magnitude": True, "rate_cap": 0.01, "learning_rate": 4e-4},
    "long": {},
}
"""Where they are ternary: what stands a learning rate that is three times off."""

_TWO_BITS: dict[str, dict[str, Any]] = {
    "schedule": {"kind": "none"},
    "student": {"rate_by_magnitude": True, "rate_cap": 0.01, "learning_rate": 3e-4},
    "long": {},
}
"""Where they have two bits: intervention costs more than it saves (docs/results.md)."""

_DEFAULTS = {"binary": _BINARY, "ternary": _TERNARY, "w2": _TWO_BITS}

_LONG = 200
"""Steps from which on ``long`` holds: of fewer, the last fifth is still on its way."""


def with_scheme_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a recipe with what its scheme fills in; what is said stays.

    Args:
        values: Sections of a recipe, as read.
    """
    student = {} if values.get("student") is None else values["student"]
    scheme = student.get("scheme", USUAL_SCHEME) if isinstance(student, dict) else None
    defaults = _DEFAULTS.get(scheme.partition("-")[0]) if isinstance(scheme, str) else None
    if defaults is None:
        return values
    filled = dict(values)
    # A schedule of which anything is said is the user's own.
    if not filled.get("schedule") and defaults["schedule"]:
        filled["schedule"] = defaults["schedule"]
    said = {key: value for key, value in student.items() if value is not None}
    own = dict(defaults["student"])
    if said.get("rate_by_magnitude") is False:
        del own["rate_cap"]  # a part of what the rates are not in proportion to
    steps = said.get("max_steps", USUAL_STEPS)
    if isinstance(steps, int) and steps >= _LONG:
        own |= defaults["long"]
    filled["student"] = {**student, **own, **said}
    return filled
