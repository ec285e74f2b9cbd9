from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import tutelage
from helpers import make_tokenizer, save_tiny, write_rows
from tutelage.errors import DataError, RecipeError
from tutelage.train.data import read_examples
from tutelage.train.evaluation import evaluate_folder
from tutelage.train.metrics import agreement, kl_divergence
from tutelage.train.recipe import DataSection, Recipe, load_recipe, recipe_from_dict
from tutelage.train.run import run_recipe
from tutelage.train.tasks import TextTask

HEAD = ("a", "b", "c")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("m") / "classifier", head=HEAD)


@pytest.fixture
def make(tmp_path: Path, classifier: Path) -> Callable[..., Recipe]:
    for name, seed in (("train", 0), ("dev", 1)):
        lines = write_rows(tmp_path / f"{name}.tsv", seed=seed).read_text().splitlines()
        texts = "\n".join(line.split("\t")[0] for line in lines)
        (tmp_path / f"{name}.tsv").write_text(texts + "\n")

    def recipe(*overrides: str, model: Path = classifier) -> Recipe:
        values = {
            "model": {"name_or_path": str(model)},
            "data": {
                "train": str(tmp_path / "train.tsv"),
                "eval": str(tmp_path / "dev.tsv"),
                "max_length": 16,
                "label": None,
            },
            "student": {"max_steps": 3, "batch_size": 8},
            "output": str(tmp_path / "out"),
        }
        return recipe_from_dict(values, overrides)

    return recipe


def test_the_figures_are_agreement_and_kl(
    make: Callable[..., Recipe], classifier: Path, tmp_path: Path
) -> None:
    result = run_recipe(make())
    assert (result.metric, result.student.metrics, result.teacher.metrics) == ("agreement", {}, {})
    texts = (tmp_path / "dev.tsv").read_text().splitlines()[1:]
    models = (
        tutelage.load(result.folder),
        AutoModelForSequenceClassification.from_pretrained(classifier),
    )
    logits = []
    for model in models:
        with torch.no_grad():
            rows = [
                model.eval()(**make_tokenizer()([text], return_tensors="pt")).logits[0].numpy()
                for text in texts
            ]
        logits.append(np.stack(rows))
    assert result.agreement == agreement(*logits)
    assert result.kl == pytest.approx(kl_divergence(logits[1], logits[0]), rel=1e-3)
    card = (Path(result.folder) / "README.md").read_text()
    assert "agreement with the teacher" in card
    assert "agreement of the teacher" not in card
    with pytest.raises(DataError, match="holds no teacher to compare with"):
        evaluate_folder(result.folder, load_recipe(Path(result.folder) / "recipe.yaml").data)


def test_labels_in_the_file_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\nw1\t\nw2\ta\n")
    with pytest.raises(DataError, match=r"row 1 of .* has no label"):
        read_examples(str(path), DataSection(train=str(path), eval="e"))
    wanted = DataSection(train=str(path), eval=None, eval_split=1, label=None)
    train, held_out = TextTask.read(wanted)
    assert (train.labels, held_out.labels) == (None, None)
    assert sorted(train.texts + held_out.texts) == ["w1", "w2"]


def test_a_teacher_with_a_head_is_needed(make: Callable[..., Recipe], tmp_path: Path) -> None:
    bare = save_tiny(tmp_path / "bare")
    with pytest.raises(DataError, match=r"no teacher can be fine-tuned.* model\.teacher"):
        run_recipe(make(model=bare))
    one = save_tiny(tmp_path / "one", head=("x",))
    with pytest.raises(DataError, match="has the one output"):
        run_recipe(make(model=one))


def test_a_model_without_head_learns_from_a_teacher(
    make: Callable[..., Recipe], classifier: Path, tmp_path: Path
) -> None:
    bare = save_tiny(tmp_path / "bare")
    result = run_recipe(make(f"model.teacher={classifier}", model=bare))
    assert (result.metric, result.teacher_fine_tuned) == ("agreement", False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.metric=accuracy"], "'metric' needs labels and 'label' is null; leave it out"),
        (["data.labels=[a, b]"], "'labels' does not fit data without labels"),
        (["data.task=regression"], "does not fit a regression"),
        (["student.eval_steps=1"], "student.eval_steps asks for metrics while training"),
        (["student.keep=best"], "student.keep asks for metrics while training"),
    ],
)
def test_refuses_what_needs_labels(
    make: Callable[..., Recipe], overrides: list[str], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        run_recipe(make(*overrides))
    assert message in str(caught.value)
