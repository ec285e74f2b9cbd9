"""Commands parse, recipes validate, links resolve, made pages are fresh, figures are computed."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from pages import PAGES, ROOT, anchors, blocks, commands, label, links
from transformers import BertConfig, BertForSequenceClassification

import tutelage
from tutelage import cli
from tutelage._size import planned_size
from tutelage.study import Study, load_study
from tutelage.train._sections import SECTIONS
from tutelage.train.recipe import Recipe, load_recipe

DOCS = ROOT / "docs"


def recipe_keys() -> set[str]:
    keys = set(Recipe.model_fields)
    for name, section in SECTIONS.items():
        keys |= {f"{name}.{key}" for key in section.model_fields}
    return keys


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_commands_parse(page: Path) -> None:
    group: Any = typer.main.get_command(cli.app)
    known = {"train": recipe_keys(), "compare": set(Study.model_fields)}
    for line in commands(page):
        if not line.startswith("tutelage "):
            continue
        name, *given = shlex.split(line, comments=True)[1:]
        command = group.commands.get(name)
        assert command is not None, f"{line}: no command {name!r}"
        values = command.make_context(name, list(given)).params
        for override in values.get("overrides") or ():
            key, equals, _ = override.partition("=")
            assert override == "..." or equals, f"{line}: {override!r}"
            assert override == "..." or key in known[name], f"{line}: no key {key!r}"
        for part in given:
            if part.startswith(("recipes/", "studies/")):
                assert (ROOT / part).is_file(), f"{line}: no file {part}"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_targets_and_scripts_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in commands(page):
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), line
        if words[:1] == ["python"]:
            assert (ROOT / words[1]).is_file(), line


def test_there_are_commands() -> None:
    assert sum(line.startswith("tutelage ") for page in PAGES for line in commands(page)) > 20


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=label)
def test_recipes_and_studies_are_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "yaml"):
        file = tmp_path / "block.yaml"
        file.write_text(block.text, encoding="utf-8")
        if "tasks" in yaml.safe_load(block.text):
            load_study(file)
        else:
            load_recipe(file)


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_links_resolve(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{label(page)}: no {path}"
        if anchor:
            assert anchor in anchors(target), f"{label(page)}: no {path}#{anchor}"


def test_every_image_exists() -> None:
    for page in PAGES:
        for path in re.findall(r"!\[[^\]]*\]\((?!https?:)([^)]+)\)", page.read_text("utf-8")):
            assert (page.parent / path).is_file(), f"{label(page)}: no {path}"


def test_the_navigation_holds_every_page() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def files(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry if isinstance(entry, list) else entry.values()
        return [file for value in values for file in files(value)]

    named = files(settings["nav"])
    assert len(set(named)) == len(named)
    assert set(named) == {page.name for page in DOCS.glob("*.md")}


@pytest.fixture(scope="module")
def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_recipe_keys_is_fresh(hooks: Any) -> None:
    text = (DOCS / "recipe.md").read_text(encoding="utf-8")
    assert text == hooks.recipe_page(), "run python docs/hooks.py"
    shown = set(re.findall(r"^\| `([\w.]+)` ", text, re.MULTILINE))
    assert shown == recipe_keys()


def test_links_that_leave_the_site_become_words(hooks: Any) -> None:
    text = "[`a.py`](../benchmarks/a.py), [b](b.md) and [c](https://c.org)"
    assert hooks.on_page_markdown(text) == "`a.py`, [b](b.md) and [c](https://c.org)"


def test_the_figure_is_put_into_the_page(hooks: Any) -> None:
    page = hooks.on_page_markdown((DOCS / "how-ti-works.md").read_text(encoding="utf-8"))
    assert page.count("<svg") == 1
    assert "\n\n" not in page[page.index("<figure") : page.index("</figure>")]


@pytest.mark.parametrize(
    ("name", "content", "refused"),
    [
        pytest.param("a.html", '<script src="https://cdn.org/x.js">', True, id="script"),
        pytest.param("a.html", "<link rel=stylesheet href=//f.org/x.css>", True, id="style"),
        pytest.param("a.css", "@font-face{src:url(https://f.org/x)}", True, id="font"),
        pytest.param("a.html", '<a href="https://arxiv.org"><script src="x.js">', False, id="own"),
    ],
)
def test_a_site_that_loads_from_elsewhere_is_refused(
    hooks: Any, tmp_path: Path, name: str, content: str, refused: bool
) -> None:
    (tmp_path / name).write_text(content)
    if refused:
        with pytest.raises(RuntimeError, match="loads from elsewhere"):
            hooks.on_post_build({"site_dir": str(tmp_path)})
    else:
        hooks.on_post_build({"site_dir": str(tmp_path)})


def test_the_reference_has_every_public_name() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
    for name in listed:
        value: Any = tutelage
        for part in name.split(".")[1:]:
            value = getattr(value, part, None) or importlib.import_module(
                name[: name.index(part) + len(part)]
            )
        assert value.__doc__, name
    source = (ROOT / "src" / "tutelage" / "__init__.py").read_text(encoding="utf-8")
    public = set(re.findall(r" as (\w+)$", source, re.MULTILINE))
    modules = {"errors", "intervention", "quantizers", "losses"}
    shown = {name.removeprefix("tutelage.") for name in listed}
    assert public - modules - {"TutelageError"} <= shown


@pytest.mark.parametrize(
    ("scheme", "encoding"),
    [("w2-a8", "bits"), ("ternary-a8", "bits"), ("ternary-a4", "base3"), ("binary-a4", "bits")],
)
def test_the_sizes_of_choosing_bits_are_computed(scheme: str, encoding: str) -> None:
    page = (DOCS / "choosing-bits.md").read_text(encoding="utf-8")
    cells = []
    for shape in (
        {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
        },
        {},
    ):
        with torch.device("meta"):
            model = BertForSequenceClassification(BertConfig(**shape))
        found = planned_size("-", model, tutelage.Scheme.preset(scheme), encoding, "float32")
        ratio = found.float_bytes / found.weight_bytes
        cells.append(f"{found.weight_bytes / 2**20:.2f} ({ratio:.1f}x)")
    assert f"| {' | '.join(cells)} |" in page
