"""From a page to one HTML file that needs nothing else."""

from __future__ import annotations

from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ._page import Page

__all__ = ["GENERATOR", "render"]

GENERATOR = '<meta name="generator" content="tutelage report">'
"""By this tag in its head a file is known for a report."""


def render(page: Page, footer: str) -> str:
    """Returns the HTML of a page; all text in it is escaped.

    Args:
        page: The page.
        footer: Its last line.
    """
    environment = Environment(
        loader=PackageLoader("tutelage.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )
    style = files("tutelage.report").joinpath("templates/report.css").read_text(encoding="utf-8")
    template = environment.get_template("page.html")
    return template.render(
        page=page, style=Markup(style), generator=Markup(GENERATOR), footer=footer
    )
