from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from tutelage.errors import ArtefactError, RecipeError
from tutelage.train import recipe as module
from tutelage.train.recipe import DataSection, Recipe, load_recipe, recipe_from_dict, save_recipe

MINIMAL: dict[str, Any] = {
    "model": {"name_or_path": "some/model"},
    "data": {"train": "train.tsv", "eval": "dev.tsv"},
    "output": "runs/one",
}


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def sections() -> list[type[BaseModel]]:
    public = (getattr(module, name) for name in module.__all__)
    return [value for value in public if isinstance(value, type)]


def test_defaults() -> None:
    recipe = recipe_from_dict(MINIMAL)
    assert recipe.student.scheme == "ternary-a8"
    assert recipe.teacher.learning_rate == 1e-4
    assert recipe.schedule.kind == "gradual"
    assert (recipe.student.learning_rate, recipe.student.rate_cap) == (4e-4, 0.01)
    assert (recipe.student.ramp, recipe.student.rate_by_magnitude) == (0.0, True)
    assert recipe.threads is None
    other = recipe_from_dict(MINIMAL, ["student.scheme=reference"]).student
    assert (other.learning_rate, other.rate_cap, other.rate_by_magnitude) == (None, 0.0, False)


def test_defaults_of_two_bits() -> None:
    own = ["student.scheme=w2-a8"]
    recipe = recipe_from_dict(MINIMAL, own)
    assert (recipe.schedule.kind, recipe.schedule_steps) == ("none", 0)
    student = recipe.student
    assert (student.learning_rate, student.rate_cap) == (3e-4, 0.01)
    assert (student.ramp, student.rate_by_magnitude, student.losses) == (0.0, True, "default")
    assert recipe_from_dict(recipe.model_dump()) == recipe
    assert recipe_from_dict(MINIMAL, [*own, "schedule.steps=7"]).schedule.kind == "gradual"


@pytest.mark.parametrize("scheme", ["binary-a8", "binary-a4"])
def test_defaults_of_binary_weights(scheme: str) -> None:
    own = [f"student.scheme={scheme}"]
    recipe = recipe_from_dict(MINIMAL, own)
    assert (recipe.schedule.kind, recipe.schedule_steps) == ("none", 0)
    assert (recipe.student.ramp, recipe.student.rate_by_magnitude) == (0.5, True)
    assert (recipe.student.learning_rate, recipe.student.rate_cap) == (1e-3, 0.025)
    assert recipe.student.losses == "relative"
    assert recipe_from_dict(recipe.model_dump()) == recipe
    said = ["schedule.steps=7", "student.ramp=0", "student.rate_by_magnitude=false"]
    recipe = recipe_from_dict(MINIMAL, [*own, *said, "student.learning_rate=0.01"])
    assert (recipe.schedule.kind, recipe.schedule_steps) == ("gradual", 7)
    assert (recipe.student.ramp, recipe.student.rate_by_magnitude) == (0.0, False)
    assert (recipe.student.learning_rate, recipe.student.rate_cap) == (0.01, 0.0)
    assert recipe_from_dict(MINIMAL, [*own, "student.learning_rate=null"]).student.ramp == 0.5
    free = recipe_from_dict(MINIMAL, [*own, "student.rate_cap=0"]).student
    assert (free.rate_cap, free.rate_by_magnitude) == (0.0, True)


@pytest.mark.parametrize(
    ("said", "average"),
    [
        (["student.scheme=binary-a8"], 0.2),
        (["student.scheme=binary-a4", "student.max_steps=200"], 0.2),
        (["student.scheme=binary-a8", "student.max_steps=199"], 0.0),
        (["student.scheme=binary-a8", "student.average=0"], 0.0),
        (["student.scheme=ternary-a8"], 0.0),
        (["student.scheme=w2-a8"], 0.0),
    ],
)
def test_binary_weights_are_averaged_where_there_is_time(said: list[str], average: float) -> None:
    assert recipe_from_dict(MINIMAL, said).student.average == average


@pytest.mark.parametrize("section", sections(), ids=lambda section: section.__name__)
def test_every_key_is_described_and_no_other_is_taken(section: type[BaseModel]) -> None:
    assert all(field.description for field in section.model_fields.values())
    assert section.model_config["extra"] == "forbid"
    assert section.__doc__


def test_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe_from_dict(MINIMAL).seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("overrides", "steps"),
    [
        pytest.param([], 60, id="default"),
        pytest.param(["student.max_steps=90"], 30, id="a-third"),
        pytest.param(["schedule.steps=7"], 7, id="given"),
        pytest.param(["schedule.kind=none", "schedule.steps=7"], 0, id="none"),
    ],
)
def test_schedule_steps(overrides: list[str], steps: int) -> None:
    assert recipe_from_dict(MINIMAL, overrides).schedule_steps == steps


def test_overrides_win_and_are_yaml(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: {name_or_path: m}\ndata:\n  train: a.tsv\n  eval: b.tsv\nstudent:\noutput: out\n",
    )
    recipe = load_recipe(
        path,
        [
            "student.learning_rate=1e-4",
            "data.text=1",
            "data.header=false",
            "data.eval=",
            "data.eval_split=0.2",
            "data.labels=[0, 1]",
            "model.teacher=a=b",
        ],
    )
    assert recipe.student.learning_rate == 1e-4
    assert recipe.data.text == 1
    assert recipe.data.header is False
    assert recipe.data.eval is None
    assert recipe.data.eval_split == 0.2
    assert recipe.data.labels == ["0", "1"]
    assert recipe.model.teacher == "a=b"


def test_values_given_are_not_changed() -> None:
    before = yaml.safe_dump(MINIMAL)
    recipe_from_dict(MINIMAL, ["data.train=other.tsv"])
    assert yaml.safe_dump(MINIMAL) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param(
            "student.max_stepz=3",
            "the recipe: unknown key 'student.max_stepz'. Did you mean 'max_steps'? "
            "Valid keys of 'student': scheme, quantize_attention, losses,",
            id="unknown-key",
        ),
        pytest.param("studnet.max_steps=3", "Did you mean 'student'?", id="unknown-section"),
        pytest.param("batch_size=3", "'teacher.batch_size' or 'student.batch_size'?", id="home"),
        pytest.param("1=3", "unknown key '1'. Valid keys: model, data,", id="key-is-a-number"),
        pytest.param(
            "student.max_steps=many",
            "'student.max_steps' is 'many', but should be a whole number.",
            id="text-for-number",
        ),
        pytest.param("student.max_steps=true", "is True, but should be a whole", id="flag"),
        pytest.param("student.max_steps='3'", "is '3', but should be a whole", id="quoted"),
        pytest.param("student.max_steps=0", "greater than or equal to 1", id="zero-steps"),
        pytest.param("student.learning_rate=.nan", "should be a finite number", id="nan"),
        pytest.param("student.learning_rate=0", "greater than 0", id="zero-rate"),
        pytest.param("student.max_steps.x=2", "'student.max_steps' is {'x': 2}", id="too-deep"),
        pytest.param("student=3", "in 'student', expected keys and values, found 3", id="section"),
        pytest.param("output=3", "'output' is 3, but should be a string.", id="number-for-text"),
        pytest.param(
            "schedule.kind=gradul",
            "or 'none'. Did you mean 'gradual'?",
            id="not-one-of",
        ),
        pytest.param("schedule.kind=constant", "needs 'stage', one of none, att", id="no-stage"),
        pytest.param("schedule.stage=context", "'stage' is for kind 'constant'", id="stage"),
        pytest.param("schedule.stage=contxt", "Did you mean 'context'?", id="unknown-stage"),
        pytest.param("schedule.steps=301", "(301) exceeds 'student.max_steps' (300)", id="long"),
        pytest.param("data.text=[a]", "is ['a'], but should be a string or a whole", id="column"),
        pytest.param("data.labels=[a, yes]", "'data.labels[1]' is True", id="label-flag"),
        pytest.param("data.labels=[a, a]", "at least two labels, all different", id="labels"),
        pytest.param("data.eval_split=1.5", "a share between 0 and 1, or a whole", id="share"),
        pytest.param("data.eval_split=0", "a share between 0 and 1, or a whole", id="zero-split"),
        pytest.param("data.eval_split=true", "should be a number.", id="split-flag"),
        pytest.param("data.eval=", "give evaluation data as 'eval', or 'eval_split'", id="eval"),
        pytest.param("data.encoding=utf9", "an encoding that Python knows", id="encoding"),
        pytest.param("data.metric=matthew", "Did you mean 'matthews'?", id="metric"),
        pytest.param("data.metric=pearson", "does not fit the task 'classification'", id="fit"),
        pytest.param("data.task=pair", "needs 'text_pair'", id="pair"),
        pytest.param("data.text_pair=b", "use a pair task", id="no-pair"),
        pytest.param("data.augment=3", "in 'data.augment', expected keys and", id="sub-section"),
        pytest.param(
            "data.augment.copies=2", "'data.augment.model' is missing (a masked", id="sub-missing"
        ),
        pytest.param(
            "data.augment={model: m, copy: 2}",
            "unknown key 'data.augment.copy'. Did you mean 'copies'? Valid keys of 'data.augment'",
            id="sub-unknown",
        ),
        pytest.param(
            "data.augment={model: m, copies: 0}", "'data.augment.copies' is 0, but", id="sub-value"
        ),
        pytest.param("data.eval_also.x=3", "'data.eval_also' is 3, but should be a", id="also"),
        pytest.param("teacher.max_steps=0", "or -1 for 'epochs'", id="teacher-steps"),
        pytest.param("foo", "the override 'foo' is not key=value; write", id="no-equals"),
        pytest.param("=3", "the override '=3' is not key=value", id="no-key"),
        pytest.param("a..b=3", "is not key=value", id="empty-part"),
        pytest.param("output=[", "the override 'output=[' is not valid YAML", id="not-yaml"),
    ],
)
def test_refuses_an_override_in_one_line(override: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict(MINIMAL, [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_do_not_fit_a_regression() -> None:
    with pytest.raises(RecipeError, match="'labels' does not fit a regression"):
        recipe_from_dict(MINIMAL, ["data.task=regression", "data.labels=[a, b]"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", "the key 'model.name_or_path' is missing (a Hugging", id="empty"),
        pytest.param("- a", "holds a list where sections are expected", id="list"),
        pytest.param("model:\n  a: [\nb: 1", "line 3 of", id="syntax"),
        pytest.param("a: 1\na: 2", "line 2 of", id="twice"),
        pytest.param("a: \x01", "is not valid YAML", id="control-character"),
        pytest.param("a: !!python/name:os.system x", "line 1 of", id="no-python-objects"),
        pytest.param("data: {trian: x}", "unknown key 'data.trian'. Did you mean", id="misspelt"),
        pytest.param("1: 2", "unknown key '1'.", id="number-as-key"),
    ],
)
def test_refuses_a_file_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_says_how_many_more() -> None:
    with pytest.raises(RecipeError, match=r"\(and 2 more\)$"):
        recipe_from_dict(MINIMAL, ["seed=a", "threads=b", "output=3"])


@pytest.mark.parametrize("kind", ["missing", "folder", "bytes"])
def test_refuses_an_unreadable_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "folder" else tmp_path / "recipe.yaml"
    if kind == "bytes":
        path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(RecipeError, match="check the path" if kind == "missing" else "be read"):
        load_recipe(path)


def test_merge_keys_are_not_doubles() -> None:
    text = "a: &a {x: 1}\nb:\n  <<: *a\n  x: 2\n"
    assert module._parse(text, "t") == {"a": {"x": 1}, "b": {"x": 2}}


@given(
    st.builds(
        lambda rate, text, split, seed: recipe_from_dict(
            MINIMAL | {"seed": seed, "student": {"learning_rate": rate}},
        ).model_copy(update={"data": DataSection(train="t", text=text, eval_split=split)}),
        st.floats(1e-9, 1e3),
        st.text(min_size=1) | st.integers(0, 9),
        st.floats(0.01, 0.99) | st.integers(1, 1000),
        st.integers(0, 2**31),
    )
)
def test_a_saved_recipe_is_read_back_equal(
    tmp_path_factory: pytest.TempPathFactory, recipe: Recipe
) -> None:
    path = tmp_path_factory.mktemp("r") / "new" / "recipe.yaml"
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe
    assert os.listdir(path.parent) == ["recipe.yaml"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "recipe.yaml"
    save_recipe(recipe_from_dict(MINIMAL), path)
    before = path.read_bytes()

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ArtefactError, match="No space left on device"):
        save_recipe(recipe_from_dict(MINIMAL, ["seed=5"]), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["recipe.yaml"]
