"""What a page is made of; templates turn it into HTML, builders fill it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup

__all__ = [
    "Bar",
    "Block",
    "Card",
    "Cell",
    "Chart",
    "Finding",
    "Page",
    "Part",
    "Picture",
    "Pre",
    "Section",
    "Table",
    "Text",
]


@dataclass(frozen=True)
class Text:
    """A paragraph.

    Attributes:
        text: What it says.
        missing: Whether it says that something is not shown, and why.
    """

    text: str
    missing: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Cell:
    """A cell of a table that is more than its text.

    Attributes:
        text: What it says.
        heat: How dark it is, from 0 to 1; ``None`` for none.
        swatch: Number of the colour shown before the text; ``None`` for none.
        strong: Whether it stands out.
    """

    text: str
    heat: float | None = None
    swatch: int | None = None
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table; the first cell of every row names the row.

    Attributes:
        caption: What it shows.
        columns: Heads of the columns.
        rows: One cell a column.
        left: Columns whose text is aligned to the left, besides the first.
        closed: Whether it is folded away under its caption.
        matrix: Whether rows and columns are of one kind, as in a confusion matrix.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Cell, ...], ...]
    left: tuple[int, ...] = ()
    closed: bool = False
    matrix: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Chart:
    """A drawing of lines or points.

    Attributes:
        svg: The drawing, safe as it is.
        caption: What it shows.
        data: The same figures as a table, folded away.
    """

    svg: Markup
    caption: str
    data: Table | None = None
    kind: ClassVar[str] = "chart"


@dataclass(frozen=True)
class Picture:
    """A raster image.

    Attributes:
        uri: A data URI.
        title: Its title, also for those who do not see it.
        caption: What it shows.
    """

    uri: str
    title: str
    caption: str
    kind: ClassVar[str] = "picture"


@dataclass(frozen=True)
class Part:
    """A part of a bar.

    Attributes:
        label: What it is.
        share: Of the bar's full width, from 0 to 1.
        swatch: Number of its colour.
    """

    label: str
    share: float
    swatch: int


@dataclass(frozen=True)
class Bar:
    """A bar in parts.

    Attributes:
        label: What it is of.
        parts: From left to right.
        note: What stands behind it.
    """

    label: str
    parts: tuple[Part, ...]
    note: str
    kind: ClassVar[str] = "bar"


@dataclass(frozen=True)
class Pre:
    """Text with its line breaks, folded away.

    Attributes:
        summary: What it is.
        text: The text.
    """

    summary: str
    text: str
    kind: ClassVar[str] = "pre"


Block = Text | Table | Chart | Picture | Bar | Pre


@dataclass(frozen=True)
class Section:
    """A section of a page.

    Attributes:
        id: Its place in the address of the page.
        title: Its heading.
        blocks: What it holds.
    """

    id: str
    title: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Card:
    """A headline figure.

    Attributes:
        label: What it is.
        value: The figure.
        note: What to compare it with.
    """

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Finding:
    """A warning of a rule.

    Attributes:
        rule: Name of the rule.
        text: What is the matter, in a sentence.
        remedy: What to do, in a sentence.
        serious: Whether the result should not be used as it is.
    """

    rule: str
    text: str
    remedy: str
    serious: bool = False

    def line(self) -> str:
        """Returns warning and remedy in a line."""
        return f"{self.text} {self.remedy}"


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: Its heading.
        subtitle: What it is about.
        verdict: The result in a sentence.
        cards: Headline figures.
        findings: Warnings, the serious ones first.
        sections: The rest.
        footer: Versions and when it was written.
    """

    title: str
    subtitle: str
    verdict: str
    cards: tuple[Card, ...]
    findings: tuple[Finding, ...]
    sections: tuple[Section, ...]
    footer: str = field(default="")
