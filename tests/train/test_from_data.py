from __future__ import annotations

import gzip
import json
import shlex
from pathlib import Path

import pytest

from tutelage.errors import DataError, RecipeError
from tutelage.train.from_data import FoundRecipe, is_data_file, recipe_for_data

ROWS = [("w1 w2 w30", "a"), ("w3 w31 w4", "b")] * 6


def csv(path: Path, header: str, rows: list[tuple[str, ...]]) -> Path:
    lines = [header, *(",".join(row) for row in rows)]
    path.write_text("\n".join(line for line in lines if line) + "\n", encoding="utf-8")
    return path


def columns(found: FoundRecipe) -> tuple[object, object]:
    return found.recipe.data.text, found.recipe.data.label


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(DataError) as error:
        recipe_for_data(path, "m", overrides)
    message = str(error.value)
    assert "\n" not in message
    return message


def command_of(message: str) -> list[str]:
    return shlex.split(message.split("`")[1])


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        pytest.param("text,label", ("text", "label"), id="plain"),
        pytest.param("Label,Text", ("Text", "Label"), id="capitals"),
        pytest.param("review,sentiment", ("review", "sentiment"), id="other names"),
        pytest.param("ticket,label", ("ticket", "label"), id="one known of two"),
        pytest.param("body,team", ("body", "team"), id="the other known of two"),
        pytest.param("id,text,comment,class", ("text", "class"), id="text wins"),
        pytest.param("intent,text,id,label", ("text", "label"), id="label wins"),
    ],
)
def test_columns_are_found_by_name(tmp_path: Path, header: str, expected: tuple[str, str]) -> None:
    cells = {"text": "w1 w2", "label": "a"}
    width = header.count(",") + 1
    rows = [tuple(cells.get(name, f"c{i % 2}") for name in header.split(",")) for i in range(9)]
    assert all(len(row) == width for row in rows)
    assert columns(recipe_for_data(csv(tmp_path / "my.csv", header, rows), "m")) == expected


def test_the_rest_is_by_default(tmp_path: Path) -> None:
    file = csv(tmp_path / "my data.v2.csv", "text,label", ROWS)
    found = recipe_for_data(file, "some/model")
    recipe = found.recipe
    assert recipe.model.name_or_path == "some/model"
    assert recipe.data.train == str(file)
    assert (recipe.data.eval, recipe.data.eval_split) == (None, 0.1)
    assert recipe.output == "runs/my data.v2"
    assert recipe.student.max_steps == 300
    assert "--model NAME" in found.line
    for part in ("'text'", "'label'", "2 classes", "0.1 of the rows", "some/model", recipe.output):
        assert part in found.line


def test_overrides_win(tmp_path: Path) -> None:
    file = csv(tmp_path / "my.csv", "text,comment,label,group", [("x", *row, "g") for row in ROWS])
    given = ["data.text=comment", "model.name_or_path=other", "output=elsewhere", "seed=4"]
    found = recipe_for_data(file, "m", [*given, "data.eval=dev.csv", "student.max_steps=7"])
    recipe = found.recipe
    assert columns(found) == ("comment", "label")
    assert (recipe.model.name_or_path, recipe.output, recipe.seed) == ("other", "elsewhere", 4)
    assert (recipe.data.eval, recipe.data.eval_split) == ("dev.csv", None)
    assert recipe.student.max_steps == 7
    assert "evaluation on dev.csv" in found.line
    assert "--model" not in found.line
    assert "3 rows" in recipe_for_data(file, "m", ["data.eval_split=3"]).line
    unlabelled = recipe_for_data(file, "m", ["data.label=null"])
    assert unlabelled.recipe.data.label is None
    assert "without labels" in unlabelled.line


def test_every_format_is_read(tmp_path: Path) -> None:
    records = [{"label": label, "text": text} for text, label in ROWS]
    lines = "\n".join(map(json.dumps, records))
    (tmp_path / "d.jsonl").write_text(lines)
    (tmp_path / "d.json").write_text(f"\n {json.dumps(records)}")
    (tmp_path / "d.tsv.gz").write_bytes(gzip.compress(b"text\tlabel\nx\ta\ny\tb\n"))
    for name in ("d.jsonl", "d.json", "d.tsv.gz"):
        assert is_data_file(tmp_path / name)
        found = recipe_for_data(tmp_path / name, "m")
        assert columns(found) == ("text", "label")
        assert found.recipe.output == "runs/d"


def test_what_is_data(tmp_path: Path) -> None:
    assert is_data_file("missing.CSV")
    assert is_data_file("missing.json")
    for name in ("recipe.yaml", "recipe.yml", "folder", "notes.txt"):
        assert not is_data_file(name)
    recipe = tmp_path / "recipe.json"
    recipe.write_text('\ufeff\n {"model": {}}', encoding="utf-8")
    assert not is_data_file(recipe)


@pytest.mark.parametrize(
    ("header", "rows", "suggested"),
    [
        pytest.param(
            "id,subject,body x,team",
            [(str(i), "hi", "w1 w2 w3 w4", "ab"[i % 2]) for i in range(6)],
            ["data.text=body x", "data.label=team"],
            id="neither",
        ),
        pytest.param(
            "text,kind,id",
            [("w1", "ab"[i % 2], str(i)) for i in range(6)],
            ["data.label=kind"],
            id="label",
        ),
        pytest.param(
            "review,comment,label",
            [("w1", "w2 w3", "ab"[i % 2]) for i in range(6)],
            ["data.text=comment"],
            id="two texts",
        ),
        pytest.param(
            "null,true",
            [("w1 w2", "ab"[i % 2]) for i in range(6)],
            ['data.text="null"', 'data.label="true"'],
            id="names that YAML reads otherwise",
        ),
    ],
)
def test_what_is_not_clear_is_refused_with_a_command_that_works(
    tmp_path: Path, header: str, rows: list[tuple[str, ...]], suggested: list[str]
) -> None:
    file = csv(tmp_path / "my file.csv", header, rows)
    message = refusal(file, "seed=3")
    assert header.replace(",", ", ") in message
    assert "data.header=false" in message
    command = command_of(message)
    assert command == ["tutelage", "train", str(file), "seed=3", *suggested]
    found = recipe_for_data(file, "m", command[3:])
    named = [str(part.partition("=")[2].strip('"')) for part in suggested]
    assert set(named) <= set(map(str, columns(found)))


def test_a_table_without_header(tmp_path: Path) -> None:
    file = csv(tmp_path / "my.csv", "", [(label, text) for text, label in ROWS])
    message = refusal(file, "data.header=false")
    assert "by position" in message
    command = command_of(message)
    assert columns(recipe_for_data(file, "m", command[3:])) == (1, 0)


def test_labels_of_their_own_are_no_classes(tmp_path: Path) -> None:
    rows = [(f"w{i}", f"{i}.5") for i in range(60)]
    file = csv(tmp_path / "my.csv", "text,label", rows)
    message = refusal(file)
    assert "60 different values in 60 rows" in message
    command = command_of(message)
    found = recipe_for_data(file, "m", command[3:])
    assert found.recipe.data.task == "regression"
    assert "classes" not in found.line


def test_another_task_keeps_its_own_columns(tmp_path: Path) -> None:
    file = csv(tmp_path / "my.csv", "a,b,c", [("w1", "w2", "x")] * 4)
    given = ["data.task=pair", "data.text=a", "data.text_pair=b", "data.label=c"]
    assert recipe_for_data(file, "m", given).recipe.data.text_pair == "b"
    with pytest.raises(RecipeError, match="needs 'text_pair'"):
        recipe_for_data(file, "m", ["data.task=pair"])


def test_other_refusals(tmp_path: Path) -> None:
    file = csv(tmp_path / "my.csv", "text,label", ROWS)
    with pytest.raises(RecipeError, match=r"named twice.*data\.train"):
        recipe_for_data(file, "m", ["data.train=other.csv"])
    with pytest.raises(RecipeError, match="'data' is 'x'"):
        recipe_for_data(file, "m", ["data=x"])
    with pytest.raises(RecipeError, match="Did you mean 'max_steps'"):
        recipe_for_data(file, "m", ["student.maxsteps=3"])
    with pytest.raises(DataError, match="there is no file"):
        recipe_for_data(tmp_path / "none.csv", "m")
