"""What the site does beyond MkDocs: the page of recipe keys, links, figures, no foreign files.

``python docs/hooks.py`` writes ``docs/recipe.md`` anew from the sections of a recipe.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

DOCS = Path(__file__).parent

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]*\)")
_FIGURE = re.compile(r"^!\[([^\]]*)\]\((images/[\w-]+\.svg)\)$", re.MULTILINE)
_FOREIGN = re.compile(
    r"""<(?:script|img|iframe)\b[^>]*\ssrc=["']?(?:https?:)?//|<link\b[^>]*\srel=["']?"""
    r"""(?:stylesheet|preconnect|preload)[^>]*\shref=["']?(?:https?:)?//|url\(["']?(?:https?:)?//"""
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Keeps the words of links that leave docs/, and puts SVG figures into the page.

    An SVG in the page follows the colours of the site; as an image it follows the system's.
    """
    markdown = _OUTSIDE.sub(r"\1", markdown)
    return _FIGURE.sub(lambda found: _inlined(found[1], found[2]), markdown)


def _inlined(alt: str, file: str) -> str:
    svg = (DOCS / file).read_text(encoding="utf-8")
    svg = "\n".join(line for line in svg.splitlines() if line.strip())
    return f'<figure class="drawing" role="img" aria-label="{alt}">\n{svg}\n</figure>'


def on_page_content(html: str, **_: Any) -> str:
    """Writes the double colon before an example in a docstring as a colon."""
    return html.replace("::</p>", ":</p>")


def on_post_build(config: Any, **_: Any) -> None:
    """Refuses a site that would load anything from elsewhere."""
    for file in Path(config["site_dir"]).rglob("*"):
        if file.suffix in (".html", ".css"):
            found = _FOREIGN.search(file.read_text(encoding="utf-8"))
            if found is not None:
                raise RuntimeError(f"{file} loads from elsewhere: {found[0]}; remove it.")


def recipe_page() -> str:
    """Returns the page of all keys of a recipe, as Markdown."""
    from tutelage.distill import losses
    from tutelage.scheme import Scheme
    from tutelage.train._sections import SECTIONS
    from tutelage.train.metrics import METRICS
    from tutelage.train.recipe import Recipe

    lines = [
        "# Recipe keys",
        "",
        "A recipe is one YAML file for `tutelage train RECIPE.yaml`. On the command line",
        "`section.key=value` overrides any key, the value written as in YAML; an unknown key or a",
        "value that does not fit is refused with the key that was meant. Paths are relative to the",
        "current folder. The resolved recipe, all defaults filled in, is stored as `recipe.yaml`",
        "beside the result.",
        "",
        "This page is made from the sections' own descriptions by `python docs/hooks.py`.",
        "",
        "## The recipe itself",
        "",
        *_table(Recipe, ""),
    ]
    for name, section in SECTIONS.items():
        doc = " ".join((section.__doc__ or "").split()).replace("``", "`")
        lines += ["", f"## {name}", "", doc, "", *_table(section, f"{name}.")]
    lines += [
        "",
        "## Names",
        "",
        f"* `student.scheme`: {_listed(Scheme.presets())}.",
        f"* `data.metric`: {_listed(METRICS)}.",
        f"* Terms of `student.losses`: {_listed(losses._TERMS)}.",
    ]
    return "\n".join(lines) + "\n"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _table(section: type[BaseModel], prefix: str) -> list[str]:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        default = "required" if field.default is PydanticUndefined else _value(field.default)
        if field.default_factory is not None:
            made = field.default_factory()  # type: ignore[call-arg]
            default = "its defaults" if isinstance(made, BaseModel) else _value(made)
        kind = _kind(field.annotation)
        cells = [f"`{prefix}{name}`", kind, default, _escaped(field.description or "")]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _kind(annotation: Any) -> str:
    """Returns how a value of a type is written."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        parts = [_kind(part) for part in get_args(annotation) if part is not type(None)]
        return " or ".join(dict.fromkeys(parts)).replace("whole number or number", "number")
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        return _kind(annotation.__origin__)
    if origin in (list, dict):
        inner = [_kind(part) for part in get_args(annotation)]
        return f"list of {inner[0]}" if origin is list else f"names to {inner[1]}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    names = {bool: "`true`, `false`", int: "whole number", float: "number", str: "text"}
    return names[annotation]


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value not in ("", {}, []) else ""


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    (DOCS / "recipe.md").write_text(recipe_page(), encoding="utf-8")
