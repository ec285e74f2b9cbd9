"""Axes, lines and points as SVG, and the colours they are drawn in."""

from __future__ import annotations

import itertools
import re
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_pages import Read

from tutelage.report._lines import Band, Line, line_chart, spread_out
from tutelage.report._points import interval_chart, scatter
from tutelage.report._scale import fit
from tutelage.report._svg import COLOURS, DASHES

finite = st.floats(-1e6, 1e6).filter(lambda v: v == 0 or abs(v) > 1e-12)
positive = st.floats(1e-8, 1e8)


@given(st.lists(finite, min_size=1), st.booleans())
def test_ticks_are_round_and_within(values: list[float], zero: bool) -> None:
    scale = fit(values, 10.0, 500.0, zero=zero)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(set(ticks))
    assert all(9.9 <= scale(tick) <= 500.1 for tick in ticks)
    assert all(10.0 - 1e-6 <= scale(value) <= 500.0 + 1e-6 for value in values)
    assert not zero or scale.low <= 0 <= scale.high


@given(st.lists(positive, min_size=1))
def test_ticks_of_a_logarithmic_axis(values: list[float]) -> None:
    scale = fit(values, 0.0, 300.0, log=True)
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 9
    assert all(-1e-6 <= scale(tick) <= 300 + 1e-6 for tick in ticks)
    assert all(-1e-6 <= scale(value) <= 300 + 1e-6 for value in values)


def test_an_axis_of_nothing_has_ticks() -> None:
    assert fit([], 0.0, 1.0).ticks()
    assert fit([float("nan"), 0.0, -1.0], 0.0, 1.0, log=True).ticks()


@given(st.lists(st.floats(0, 300), max_size=12))
def test_names_do_not_overlap(places: list[float]) -> None:
    found = spread_out(sorted(places), 10.0, 290.0, 16.0)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    assert all(gap >= 16 - 1e-9 for gap in gaps)
    assert all(place >= 10 - 1e-9 for place in found)
    if len(places) < 17:
        assert all(place <= 290 + 1e-9 for place in found)


def lines_of(svg: str) -> list[str]:
    return re.findall(r'<path d="([^"]*)" class="line', svg)


def test_gaps_are_not_bridged_and_lone_points_are_marked() -> None:
    points = ((0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 4.0), (4.0, 0.0), (5.0, 3.0), (6.0, 5.0))
    svg = line_chart(
        [Line("a", points, marks=False)], title="t", x_label="x", y_label="y", log_y=True
    )
    assert [path.count("L") for path in lines_of(svg)] == [1, 1]
    assert svg.count("<circle") == 1  # at 3, between a gap and a zero, which a logarithm has not
    assert "a: 4.000 at 3" in svg
    linear = line_chart([Line("a", points)], title="t", x_label="x", y_label="y")
    assert [path.count("L") for path in lines_of(linear)] == [1, 3]


def test_text_is_escaped_everywhere() -> None:
    bad = '<b a="1">&'
    svg = line_chart(
        [Line(bad, ((0.0, 1.0), (1.0, 2.0)))],
        title=bad,
        x_label=bad,
        y_label=bad,
        bands=(Band(0.0, 1.0, bad, "<", 1),),
    )
    drawn = [
        svg,
        scatter([1.0], [2.0], title=bad, x_label=bad, y_label=bad),
        interval_chart([(bad, 1.0, 0.5, 2.0)], title=bad, x_label=bad),
    ]
    for found in drawn:
        page = Read(found)
        assert "b" not in {tag for tag, _ in page.tags}
        assert page.all("svg")[0]["aria-label"] == bad
        assert bad in page.texts[""]


def test_a_stage_is_named_where_there_is_room() -> None:
    bands = (Band(0, 50, "attention map", "M", 3), Band(50, 52, "context", "C", 2))
    line = Line("a", ((0.0, 1.0), (100.0, 2.0)))
    svg = line_chart([line], title="t", x_label="x", y_label="y", bands=bands, x_range=(0, 100))
    shown = re.findall(r'class="stage">([^<]*)', svg)
    assert shown == ["attention map", "C"]


def test_of_many_points_some_are_drawn() -> None:
    many = [float(i) for i in range(9000)]
    svg = scatter(many, many, title="t", x_label="x", y_label="y")
    assert 1500 < svg.count("<circle") <= 2000


def test_fifty_series_differ_in_colour_or_dash() -> None:
    looks = {(i % COLOURS, DASHES[i % len(DASHES)]) for i in range(COLOURS * len(DASHES))}
    assert len(looks) == COLOURS * len(DASHES)


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


STYLE = files("tutelage.report").joinpath("templates/report.css").read_text(encoding="utf-8")
THEMES = [
    dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6});", block))
    for block in re.findall(r":root \{([^}]*)\}", STYLE)
]


@pytest.mark.parametrize("theme", THEMES, ids=["light", "dark", "print"])
def test_colours_can_be_told_from_their_ground(theme: dict[str, str]) -> None:
    for ground in ("card", "page"):
        assert contrast(theme["ink"], theme[ground]) >= 7
        for name in ("soft", "accent"):
            assert contrast(theme[name], theme[ground]) >= 4.5, name
    assert contrast(theme["serious"], theme["serious-page"]) >= 4.5
    for name in ("accent", "soft", "ink"):
        assert contrast(theme[name], theme["mild-page"]) >= 4.5, name
    for index in range(COLOURS):
        assert contrast(theme[f"c{index}"], theme["card"]) >= 3, index


def test_paper_is_light() -> None:
    assert len(THEMES) == 3
    assert THEMES[2]["page"] == THEMES[2]["card"] == "#ffffff"
    same = THEMES[0].keys() - {"page", "line"}
    assert {key: THEMES[2][key] for key in same} == {key: THEMES[0][key] for key in same}
