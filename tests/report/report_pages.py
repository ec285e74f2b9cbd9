"""A strict reader of reports, and tiny runs to report about."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from helpers import tiny_run
from tutelage.train.recipe import recipe_from_dict
from tutelage.train.run import run_recipe

VOID = {"meta", "link", "img", "br", "hr", "input"}
HEAD = ("a", "b", "c")


class Read(HTMLParser):
    """Reads a page and refuses tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self.section = ""
        self.feed(str(html))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({key for key, _ in attrs}) == len(attrs), f"an attribute twice in <{tag}>"
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self.section = dict(attrs).get("id") or "headline"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            text = self.texts.get(self.section, "") + " " + data.replace("\u00a0", " ")
            self.texts[self.section] = " ".join(text.split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def read(html: str) -> Read:
    """Reads a page and checks what every page must be."""
    page = Read(html)
    names = [name for name, _ in page.tags]
    for once in ("html", "head", "body", "style", "main", "h1"):
        assert names.count(once) == 1, once
    assert not {"script", "link", "iframe", "object", "base"} & set(names)
    text = re.sub(r"data:image/png;base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"(?:https?:)?//", text), "an address of another place"
    assert not re.search(r"url\(|@import|@font-face", text)
    for _, attrs in page.tags:
        for key, value in attrs.items():
            assert not key.startswith("on"), key
            if key in ("src", "href", "srcset", "action", "data", "poster"):
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,"))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(set(ids)) == len(ids)
    for attrs in page.all("a"):
        assert str(attrs["href"])[1:] in ids
    assert all(attrs.get("alt") for attrs in page.all("img"))
    assert all(attrs.get("role") == "img" and attrs["aria-label"] for attrs in page.all("svg"))
    assert names.count("h2") == len(page.all("section")) - 1
    assert "None" not in " ".join(page.texts.values()).split()
    return page


def make_run(folder: Path, *overrides: str, head: tuple[str, ...] | None = None) -> Path:
    """Makes a run of a few steps in ``folder / "out"``."""
    values = tiny_run(
        folder,
        eval_rows=70,
        teacher_steps=6,
        head=head,
        student={"max_steps": 9, "batch_size": 8, "eval_steps": 4},
        schedule={"steps": 6},
    )
    run_recipe(recipe_from_dict(values, overrides))
    return folder / "out"
