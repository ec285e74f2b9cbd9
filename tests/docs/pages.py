"""What the pages hold: fenced blocks, links and headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
)

_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n+)?```(?P<kind>[^\n]*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?![a-z]+:)(?P<path>[^)#\s]*)(?:#(?P<anchor>[^)\s]*))?\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        page: File it stands in.
        line: Line of its fence, from 1.
        kind: What stands behind the fence.
        text: What stands inside.
        reason: Why it is not run, if it says so.
    """

    page: Path
    line: int
    kind: str
    text: str
    reason: str | None


def label(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *kinds: str) -> list[Block]:
    """Returns the blocks of some kinds, all of them without kinds."""
    text = page.read_text(encoding="utf-8")
    found = [
        Block(
            page,
            text.count("\n", 0, match.start("kind")) + 1,
            match["kind"].strip(),
            match["text"],
            match["reason"],
        )
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if not kinds or block.kind in kinds]


def commands(page: Path) -> list[str]:
    """Returns the lines of the shell blocks, those that go on joined."""
    joined = [block.text.replace("\\\n", " ") for block in blocks(page, "", "sh", "bash")]
    return [line.strip() for text in joined for line in text.splitlines() if line.strip()]


def prose(page: Path) -> str:
    """Returns the page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def links(page: Path) -> list[tuple[str, str]]:
    """Returns (path, anchor) of every link within the repository."""
    return [(match["path"], match["anchor"] or "") for match in _LINK.finditer(prose(page))]


def anchors(page: Path) -> set[str]:
    """Returns the anchors of the headings, as GitHub and MkDocs make them."""
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)|[`*]", r"\1", heading)
        slug = re.sub(r"[^\w\s-]", "", plain).strip().lower()
        found |= {re.sub(r"[-\s]+", "-", slug), re.sub(r"\s", "-", slug)}
    return found
