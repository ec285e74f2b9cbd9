"""Scatter plots and intervals as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from ._lines import axes, frame
from ._scale import Scale, fit
from ._svg import COLOURS, element, marker, text

__all__ = ["interval_chart", "scatter"]

_MOST = 2000


def scatter(
    x: Sequence[float], y: Sequence[float], *, title: str, x_label: str, y_label: str
) -> Markup:
    """Draws points over a diagonal on which both are equal; of many, evenly chosen ones.

    Args:
        x: A figure of every point.
        y: Likewise.
        title: What the chart shows, for those who do not see it.
        x_label: Of the x axis.
        y_label: Of the y axis.
    """
    size, left, top, bottom = 460.0, 62.0, 12.0, 44.0
    both = [*x, *y]
    across = fit(both, left, size - 12)
    up = Scale(across.low, across.high, size - bottom, top)
    parts = [axes(across, up, x_label, y_label)]
    parts.append(
        element("line", x1=across.start, y1=up.start, x2=across.end, y2=up.end, class_="edge")
    )
    step = max(1, -(-len(x) // _MOST))
    points = list(zip(x, y, strict=True))[::step]
    parts += [element("circle", cx=across(a), cy=up(b), r=2.4, class_="dot c0") for a, b in points]
    return frame(parts, title, size, size)


def interval_chart(
    rows: Sequence[tuple[str, float, float, float]], *, title: str, x_label: str
) -> Markup:
    """Draws an interval a row beside a line at 0.

    Args:
        rows: Name, estimate, lower and upper end.
        title: What the chart shows, for those who do not see it.
        x_label: Of the x axis.
    """
    width, left, line = 900.0, 300.0, 26.0
    height = 16 + line * len(rows) + 44
    ends = [value for row in rows for value in row[1:]]
    across = fit([0.0, *ends], left, width - 20)
    bottom = height - 44
    parts = []
    for tick in across.ticks(7):
        place = across(tick)
        parts.append(element("line", x1=place, y1=8.0, x2=place, y2=bottom, class_="grid"))
        parts.append(text(place, bottom + 17, f"{tick:g}"))
    zero = across(0.0)
    parts.append(element("line", x1=zero, y1=8.0, x2=zero, y2=bottom, class_="axis"))
    parts.append(text((left + width) / 2, bottom + 35, x_label, class_="label"))
    for index, (name, value, low, high) in enumerate(rows):
        y = 16 + line * (index + 0.5) - 4
        series = 1 if low > 0 else 2 if high < 0 else 6
        said = f"{name}: {value:.3g}, from {low:.3g} to {high:.3g}"
        parts.append(text(left - 12, y + 4, name if len(name) < 44 else name[:43] + "…", "end"))
        parts.append(
            element(
                "line",
                element("title", said),
                x1=across(low),
                y1=y,
                x2=across(high),
                y2=y,
                class_=f"line c{series % COLOURS}",
            )
        )
        parts.append(marker(series, across(value), y, 3.6, said))
    return frame(parts, title, width, height)
