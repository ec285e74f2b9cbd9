"""Line charts as inline SVG: axes, shaded stages, and names at the ends of the lines."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from markupsafe import Markup

from ._format import significant
from ._scale import Scale, fit
from ._svg import COLOURS, DASHES, element, join, marker, path, text

__all__ = ["Band", "Line", "axes", "frame", "line_chart"]

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM, _STRIP = 900.0, 62.0, 196.0, 12.0, 44.0, 22.0
_LINE = 16.0
_LETTER = 6.4
"""Width of a letter of a label, about."""


@dataclass(frozen=True)
class Line:
    """A line of a chart.

    Attributes:
        name: Shown at its end.
        points: (x, y) in order of x; a y of ``None`` is a gap.
        spreads: Half the length of the error bar of every point; none if empty.
        marks: Whether points are marked.
        series: Number that decides colour, dash and mark.
    """

    name: str
    points: tuple[tuple[float, float | None], ...]
    spreads: tuple[float, ...] = ()
    marks: bool = True
    series: int = 0


@dataclass(frozen=True)
class Band:
    """A shaded stretch of the x axis.

    Attributes:
        start: Where it begins.
        end: Where it ends.
        name: Shown above it where it fits.
        short: Shown where the name does not fit.
        tone: Number of its shade; 0 for none.
    """

    start: float
    end: float
    name: str
    short: str
    tone: int


def line_chart(
    lines: list[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    bands: tuple[Band, ...] = (),
    x_range: tuple[float, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    zero: bool = False,
    height: float = 320.0,
) -> Markup:
    """Draws lines.

    Args:
        lines: What is drawn; at least one with a point.
        title: What the chart shows, for those who do not see it.
        x_label: Of the x axis.
        y_label: Of the y axis.
        bands: Shaded stretches.
        x_range: Ends of the x axis; by default those of the points.
        log_x: Whether the x axis is logarithmic.
        log_y: Likewise.
        zero: Whether the y axis begins at 0.
        height: Of the drawing; it is 900 wide.
    """
    known = [(x, y) for line in lines for x, y in line.points if _drawn(y, log_y)]
    low, high = x_range or (None, None)
    right, top = _WIDTH - _RIGHT, _TOP + (_STRIP if bands else 0.0)
    across = fit([x for x, _ in known], _LEFT, right, log=log_x)
    if low is not None and high is not None:
        across = Scale(low, high, _LEFT, right, log_x)
    ends = [y + s for line in lines for (_, y), s in _spread(line) if y is not None]
    ends += [y - s for line in lines for (_, y), s in _spread(line) if y is not None]
    up = fit(
        [*(y for _, y in known if y is not None), *ends],
        height - _BOTTOM,
        top,
        log=log_y,
        zero=zero,
    )
    parts = [_bands(bands, across, top, height - _BOTTOM), axes(across, up, x_label, y_label)]
    parts += [_line(line, across, up) for line in lines]
    parts.append(_names(lines, up, right, log_y))
    return frame(parts, title, _WIDTH, height)


def frame(parts: list[Markup], title: str, width: float, height: float) -> Markup:
    """Returns a whole drawing.

    Args:
        parts: What is in it.
        title: What it shows, for those who do not see it.
        width: Of the drawing.
        height: Likewise.
    """
    return element(
        "svg",
        join(parts),
        class_="chart",
        role="img",
        aria_label=title,
        viewBox=f"0 0 {width:g} {height:g}",
    )


def axes(across: Scale, up: Scale, x_label: str, y_label: str) -> Markup:
    """Draws both axes with ticks, labels and a grid.

    Args:
        across: The x axis.
        up: The y axis; its start is below its end.
        x_label: Of the x axis.
        y_label: Of the y axis.
    """
    parts = []
    for tick in up.ticks():
        y = up(tick)
        parts.append(_rule(across.start, y, across.end, y, "grid"))
        parts.append(text(across.start - 7, y + 4, _tick(tick), "end"))
    for tick in across.ticks(7):
        x = across(tick)
        parts.append(_rule(x, up.start, x, up.start + 4, "axis"))
        parts.append(text(x, up.start + 17, _tick(tick)))
    parts.append(_rule(across.start, up.start, across.end, up.start, "axis"))
    middle = (across.start + across.end) / 2
    parts.append(text(middle, up.start + 35, x_label, class_="label"))
    x, y = 14.0, (up.start + up.end) / 2
    turned = f"rotate(-90 {x:g} {y:g})"
    parts.append(
        element("text", y_label, x=x, y=y, transform=turned, text_anchor="middle", class_="label")
    )
    return join(parts)


def _tick(value: float) -> str:
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1e6 or size < 1e-4:
        mantissa, _, exponent = f"{value:.0e}".partition("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:,g}"


def _rule(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def _bands(bands: tuple[Band, ...], across: Scale, top: float, bottom: float) -> Markup:
    parts = []
    for band in bands:
        left, right = across(band.start), across(band.end)
        width = right - left
        height = bottom - top
        title = element("title", f"{band.name}: steps {band.start:g} to {band.end:g}")
        parts.append(
            element(
                "rect",
                title,
                x=left,
                y=top,
                width=width,
                height=height,
                class_=f"band t{band.tone}",
            )
        )
        parts.append(
            element(
                "rect",
                x=left,
                y=top - _STRIP,
                width=width,
                height=_STRIP - 3.0,
                class_=f"strip t{band.tone}",
            )
        )
        label = next((n for n in (band.name, band.short) if len(n) * _LETTER < width - 4), "")
        if label:
            parts.append(text((left + right) / 2, top - _STRIP + 13.5, label, class_="stage"))
        if band.start > across.low:
            parts.append(_rule(left, top - _STRIP, left, bottom, "edge"))
    return join(parts)


def _spread(line: Line) -> list[tuple[tuple[float, float | None], float]]:
    return list(zip(line.points, line.spreads, strict=True)) if line.spreads else []


def _drawn(y: float | None, log: bool) -> bool:
    return y is not None and math.isfinite(y) and (y > 0 or not log)


def _line(line: Line, across: Scale, up: Scale) -> Markup:
    parts: list[Markup] = []
    dash = DASHES[line.series % len(DASHES)] or None
    runs: list[list[tuple[float, float]]] = []
    for drawn, group in itertools.groupby(line.points, lambda p: _drawn(p[1], up.log)):
        if drawn:
            runs.append([(across(x), up(y)) for x, y in group if y is not None])
    colour = f"line c{line.series % COLOURS}"
    parts += [
        element("path", d=path(run), class_=colour, stroke_dasharray=dash)
        for run in runs
        if len(run) > 1
    ]
    for (x, y), spread in _spread(line):
        if y is not None and _drawn(y, up.log):
            low = max(y - spread, up.low)
            parts.append(_rule(across(x), up(low), across(x), up(y + spread), colour))
    single = [run[0] for run in runs if len(run) == 1]
    if line.marks or single:
        for x, y in line.points:
            if y is None or not _drawn(y, up.log):
                continue
            place = (across(x), up(y))
            if line.marks or place in single:
                said = f"{line.name}: {significant(y, 4)} at {x:g}"
                parts.append(marker(line.series, *place, title=said))
    return element("g", join(parts))


def _names(lines: list[Line], up: Scale, right: float, log: bool) -> Markup:
    """Writes the names beside the ends of the lines, one under the other."""
    ends: list[tuple[float, Line]] = []
    for line in lines:
        values = [y for _, y in line.points if _drawn(y, log)]
        if values and values[-1] is not None:
            ends.append((up(values[-1]), line))
    ends.sort(key=lambda end: end[0])
    places = spread_out([y for y, _ in ends], up.end + 6, up.start)
    parts = []
    for place, (_, line) in zip(places, ends, strict=True):
        colour = f"line c{line.series % COLOURS}"
        dash = DASHES[line.series % len(DASHES)] or None
        parts.append(
            element(
                "line",
                x1=right + 8,
                y1=place,
                x2=right + 34,
                y2=place,
                class_=colour,
                stroke_dasharray=dash,
            )
        )
        if line.marks:
            parts.append(marker(line.series, right + 21, place))
        parts.append(text(right + 39, place + 4, _cut(line.name), "start", "name"))
    return join(parts)


def _cut(name: str, most: int = 25) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def spread_out(places: list[float], low: float, high: float, gap: float = _LINE) -> list[float]:
    """Returns places at least a gap apart, as near as can be to those given.

    Args:
        places: In ascending order.
        low: Where the first may be.
        high: Where the last may be, as far as there is room.
        gap: Between two.
    """
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap if found else low))
    limit = high
    for index in reversed(range(len(found))):
        if found[index] <= limit:
            break
        found[index] = limit
        limit -= gap
    shift = max(0.0, low - found[0]) if found else 0.0
    return [place + shift for place in found]
