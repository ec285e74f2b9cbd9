"""Defaults of a recipe that depend on its scheme."""

from __future__ import annotations

from typing import Any

__all__ = ["with_scheme_defaults"]

_BINARY: dict[str, dict[str, Any]] = {
    "schedule": {"kind": "none"},
    "student": {"ramp": 0.5, "rate_by_magnitude": True, "learning_rate": 1e-3},
}
"""Where weights are binary: what ended nearest to the teacher (docs/results.md)."""


def with_scheme_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of a recipe with what its scheme fills in; what is said stays.

    Args:
        values: Sections of a recipe, as read.
    """
    student = values.get("student")
    scheme = student.get("scheme") if isinstance(student, dict) else None
    if not isinstance(scheme, str) or not scheme.startswith("binary-"):
        return values
    filled = dict(values)
    # A schedule of which anything is said is the user's own.
    if not filled.get("schedule"):
        filled["schedule"] = _BINARY["schedule"]
    said = {key: value for key, value in filled["student"].items() if value is not None}
    filled["student"] = {**filled["student"], **_BINARY["student"], **said}
    return filled
