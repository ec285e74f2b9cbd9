"""Elements of inline SVG. Colours are classes of the page's style sheet."""

from __future__ import annotations

import math

from markupsafe import Markup, escape

__all__ = ["COLOURS", "DASHES", "element", "join", "marker", "number", "path", "text"]

COLOURS = 8
"""Classes ``c0`` to ``c7`` of the style sheet."""

DASHES = ("", "7 3", "2 2.5", "9 3 2 3", "5 2 1.5 2 1.5 2", "12 4", "1 4")
"""Seven, so that with eight colours no two of 56 series look alike."""


def number(value: float) -> str:
    """Returns a place with as many digits as can be seen.

    Args:
        value: The place.
    """
    return f"{value:.2f}".rstrip("0").rstrip(".")


def element(name: str, content: str | Markup = "", **attributes: object) -> Markup:
    """Returns an element; text and attributes are escaped.

    Args:
        name: Of the element.
        content: Its text, or elements.
        **attributes: A trailing underscore is left out, others become hyphens; ``None`` is none.
    """
    shown = Markup("")
    for key, value in attributes.items():
        if value is not None:
            plain = number(value) if isinstance(value, float) else value
            shown += Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), plain)
    return Markup("<{}{}>{}</{}>").format(Markup(name), shown, escape(content), Markup(name))


def join(parts: list[Markup]) -> Markup:
    """Returns elements one after the other.

    Args:
        parts: The elements.
    """
    return Markup("\n").join(parts)


def text(x: float, y: float, content: str, anchor: str = "middle", class_: str = "") -> Markup:
    """Returns a label.

    Args:
        x: Its place.
        y: Of its base line.
        content: What it says.
        anchor: ``"start"``, ``"middle"`` or ``"end"``.
        class_: Of the style sheet.
    """
    return element("text", content, x=x, y=y, text_anchor=anchor, class_=class_ or None)


def path(points: list[tuple[float, float]]) -> str:
    """Returns the ``d`` of a line through points.

    Args:
        points: Places.
    """
    return "".join(f"{'L' if i else 'M'}{number(x)} {number(y)}" for i, (x, y) in enumerate(points))


def marker(series: int, x: float, y: float, size: float = 2.8, title: str = "") -> Markup:
    """Returns a mark whose shape goes with the series, so that colour is not needed.

    Args:
        series: Number of the series.
        x: Its place.
        y: Likewise.
        size: Its radius.
        title: Shown when pointed at.
    """
    inner = element("title", title) if title else Markup("")
    colour = f"mark c{series % COLOURS}"
    shape = series % 4
    if shape == 0:
        return element("circle", inner, cx=x, cy=y, r=float(size), class_=colour)
    corners = (4, 3, 4)[shape - 1]
    turn = {1: math.pi / 4, 2: -math.pi / 2, 3: 0.0}[shape]
    radius = size * 1.3
    points = [
        (
            x + radius * math.cos(turn + 2 * math.pi * corner / corners),
            y + radius * math.sin(turn + 2 * math.pi * corner / corners),
        )
        for corner in range(corners)
    ]
    return element("path", inner, d=path(points) + "Z", class_=colour)
