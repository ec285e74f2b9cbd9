"""The recipes of GLUE: what they say, that they read their data, and that they run."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import tutelage
from helpers import make_batch, redraw, save_tiny
from tutelage._tables import result_table
from tutelage.distill import losses
from tutelage.errors import DataError, RecipeError
from tutelage.train import BertAdam
from tutelage.train._plan import make_losses, make_schedule
from tutelage.train._scheme_defaults import with_scheme_defaults
from tutelage.train._sections import SECTIONS
from tutelage.train.recipe import Recipe, load_recipe
from tutelage.train.run import RunResult, read_result, run_recipe
from tutelage.train.tasks import TASKS

FOLDER = Path(__file__).parent.parent.parent / "recipes" / "glue"

# As on the Hub: columns of text, names of the classes in their order, and training examples.
GLUE: dict[str, tuple[tuple[str, ...], tuple[str, ...] | None, int]] = {
    "cola": (("sentence",), ("unacceptable", "acceptable"), 8551),
    "sst2": (("sentence",), ("negative", "positive"), 67349),
    "mrpc": (("sentence1", "sentence2"), ("not_equivalent", "equivalent"), 3668),
    "stsb": (("sentence1", "sentence2"), None, 5749),
    "qqp": (("question1", "question2"), ("not_duplicate", "duplicate"), 363846),
    "mnli": (("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), 392702),
    "qnli": (("question", "sentence"), ("entailment", "not_entailment"), 104743),
    "rte": (("sentence1", "sentence2"), ("entailment", "not_entailment"), 2490),
}
PUBLISHED_LOSSES = ["logits", "hidden_states", "attention_output", "attention_scores"]
METRICS = {
    "cola": "matthews",
    "sst2": "accuracy",
    "mrpc": "f1",
    "stsb": "spearman",
    "qqp": "f1",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
}


def table(task: str, rows: int = 12, seed: int = 0) -> dict[str, list[Any]]:
    """Makes rows of the columns of a task: label numbers, or likeness from 0 to 5."""
    draw, (texts, names, _) = random.Random(seed), GLUE[task]
    columns: dict[str, list[Any]] = {
        text: [" ".join(f"w{draw.randrange(40)}" for _ in range(4)) for _ in range(rows)]
        for text in texts
    }
    columns["label"] = [row % len(names) if names else 5 * row / (rows - 1) for row in range(rows)]
    columns["idx"] = list(range(rows))
    return columns


def write(path: Path, task: str, seed: int) -> Path:
    columns, names = table(task, seed=seed), GLUE[task][1]
    if names is not None:
        columns["label"] = [names[number] for number in columns["label"]]
    rows = [columns, *zip(*columns.values(), strict=True)]
    path.write_text("\n".join("\t".join(map(str, row)) for row in rows) + "\n")
    return path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for the Hub: the configurations and splits of GLUE."""

    def load(path: str, config: str, split: str) -> Any:
        assert path == "nyu-mll/glue"
        task, _, genre = config.partition("_")
        splits = ("train",) if config == "mnli" else ("train", "validation")
        assert split in (("validation",) if genre else splits)
        texts, names, _ = GLUE[task]
        kind = datasets.Value("float32") if names is None else datasets.ClassLabel(names=[*names])
        features = {text: datasets.Value("string") for text in texts} | {"label": kind}
        features["idx"] = datasets.Value("int32")
        return datasets.Dataset.from_dict(table(task), datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("m") / "encoder")


def recipe_of(task: str, *overrides: str) -> Recipe:
    return load_recipe(FOLDER / f"{task}.yaml", overrides)


def test_there_is_one_recipe_a_task() -> None:
    assert {file.stem for file in FOLDER.glob("*.yaml")} == set(GLUE)


@pytest.mark.parametrize("task", GLUE)
def test_the_setting_is_the_published_one(task: str) -> None:
    recipe = recipe_of(task)
    student, batch = recipe.student, recipe.student.batch_size
    epoch = math.ceil(GLUE[task][2] / batch)
    assert student.max_steps == 3 * epoch
    assert recipe.schedule_steps * batch == 1920, "examples seen under intervention"
    assert recipe.data.max_length == (64 if task in ("cola", "sst2") else 128)
    assert (student.scheme, student.optimizer, student.dropout) == ("reference", "bert_adam", True)
    assert (student.learning_rate, student.warmup_ratio, student.weight_decay) == (2e-5, 0.1, 0.01)
    terms = make_losses(student)
    assert [weighted.term.name for weighted in terms.terms] == PUBLISHED_LOSSES
    assert (terms.local, {weighted.weight for weighted in terms.terms}) == ("code", {1.0})
    schedule = make_schedule(recipe)
    sixth = recipe.schedule_steps // 6
    stages = [schedule(step) for step in range(recipe.schedule_steps + 1)]
    published = ("attention_output", "context", *["attention_map"] * 4)
    assert stages == [stage for stage in published for _ in range(sixth)] + ["none"]


def test_the_comment_gives_the_defaults_of_this_library() -> None:
    text = (FOLDER / "cola.yaml").read_text()
    lines = [line.removeprefix("#") for line in text.splitlines() if "student." in line]
    overrides = " ".join(lines).partition("own:")[2].split()
    assert len(overrides) == 7
    ours = recipe_of("cola", *overrides).student
    plain = SECTIONS["student"](**with_scheme_defaults({})["student"])
    differing = {k for k, v in plain if v != getattr(ours, k)}
    assert differing == {"max_steps", "batch_size", "eval_steps"}


@pytest.mark.parametrize("task", GLUE)
@pytest.mark.usefixtures("hub")
def test_a_recipe_reads_the_data_of_the_hub(task: str) -> None:
    section = recipe_of(task).data
    kind = TASKS[section.task]
    train, eval = kind.read(section)
    found = kind.build(train, section, eval)
    names = GLUE[task][1]
    assert found.label_names == (names or ()), "F1 is that of class 1"
    assert found.metric == section.metric
    encoded = table(task)
    assert train.texts == encoded[GLUE[task][0][0]]
    assert (train.pairs is not None) == (len(GLUE[task][0]) == 2)
    for source in section.eval_also.values():
        assert kind.read_one(source, section).texts == train.texts


@pytest.mark.parametrize("task", GLUE)
def test_a_recipe_runs(task: str, tmp_path: Path, encoder: Path) -> None:
    files = [write(tmp_path / f"{n}.tsv", task, n) for n in range(3)]
    also = [f"data.eval_also.mismatched={files[2]}"] if task == "mnli" else []
    recipe = recipe_of(
        task,
        f"model.name_or_path={encoder}",
        f"data.train={files[0]}",
        f"data.eval={files[1]}",
        *also,
        "teacher.max_steps=1",
        "schedule.steps=1",
        "student.max_steps=2",
        "student.eval_steps=1",
        f"output={tmp_path / 'out'}",
    )
    result = run_recipe(recipe)
    assert METRICS[task] in result.student.metrics
    assert result.metric == recipe.data.metric
    assert result.eval_examples == 12
    assert set(result.also) == set(recipe.data.eval_also)
    assert read_result(tmp_path / "out") == result
    if task == "mnli":
        check_further(result, tmp_path)


def check_further(result: RunResult, folder: Path) -> None:
    """The further figures are what an evaluation of those examples gives."""
    from tutelage.train.evaluation import evaluate_folder

    section = load_recipe(folder / "out" / "recipe.yaml").data
    matched, mismatched = (
        evaluate_folder(folder / "out", section, str(folder / f"{n}.tsv")) for n in (1, 2)
    )
    found = result.also["mismatched"]
    assert result.student.metrics == matched.metrics
    assert (found.student, found.examples) == (mismatched.metrics, 12)
    assert set(found.teacher) == set(found.student)
    assert found.kl is not None
    assert found.kl != result.kl
    assert "accuracy (mismatched)" in (folder / "out" / "README.md").read_text()
    shown = [str(cell) for cell in result_table(result).columns[0].cells]
    assert shown.count("accuracy") == shown.count("accuracy (mismatched)") == 1
    assert json.loads((folder / "out" / "result.json").read_text())["also"]["mismatched"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        pytest.param("0.tsv", RecipeError, "is '.*0.tsv', the training data", id="train"),
        pytest.param("3.tsv", DataError, "there is no file or folder", id="missing"),
        pytest.param("4.tsv", DataError, "the label 'maybe'", id="label"),
    ],
)
def test_refuses_further_data_that_do_not_fit(
    tmp_path: Path, encoder: Path, name: str, error: type[Exception], message: str
) -> None:
    for number in (0, 1, 4):
        write(tmp_path / f"{number}.tsv", "mnli", number)
    text = (tmp_path / "4.tsv").read_text()
    (tmp_path / "4.tsv").write_text(text.replace("neutral", "maybe"))
    recipe = recipe_of(
        "mnli",
        f"model.name_or_path={encoder}",
        f"data.train={tmp_path / '0.tsv'}",
        f"data.eval={tmp_path / '1.tsv'}",
        f"data.eval_also.mismatched={tmp_path / name}",
        f"output={tmp_path / 'out'}",
    )
    with pytest.raises(error, match=message):
        run_recipe(recipe)
    assert not (tmp_path / "out").exists()


SHAPES = {
    "bert-large": {"num_hidden_layers": 24, "hidden_size": 32, "num_attention_heads": 16},
    "tinybert-4l": {"num_hidden_layers": 4, "hidden_size": 24, "num_attention_heads": 12},
    "tinybert-6l-skipbert-6l": {
        "num_hidden_layers": 6,
        "hidden_size": 24,
        "num_attention_heads": 12,
    },
}
"""The published shapes, narrow: as many layers and heads."""
FEED_FORWARD = {"bert-large": 4.0, "tinybert-4l": 1200 / 312, "tinybert-6l-skipbert-6l": 4.0}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_published_shape_takes_a_step_in_every_stage(shape: str) -> None:
    width = SHAPES[shape]["hidden_size"]
    config = BertConfig(
        vocab_size=48,
        max_position_embeddings=40,
        pad_token_id=1,
        num_labels=3,
        intermediate_size=round(FEED_FORWARD[shape] * width),
        **SHAPES[shape],
    )
    teacher = BertForSequenceClassification(config)
    redraw(teacher)
    scheme = tutelage.Scheme.preset("reference")
    student = tutelage.prepare(copy.deepcopy(teacher), scheme).requires_grad_(True)
    distiller = tutelage.Distiller(student, teacher, losses.reference().with_local("code"))
    step = tutelage.TrainStep(distiller, BertAdam(student.parameters(), lr=1e-3))
    layers = range(SHAPES[shape]["num_hidden_layers"])
    weights = [
        student.get_submodule(f"bert.encoder.layer.{layer}.{name}").weight
        for layer in layers
        for name in ("attention.self.query", "intermediate.dense")
    ]
    for stage in ("attention_output", "context", "attention_map", "none"):
        before = [weight.detach().clone() for weight in weights]
        terms = step(make_batch(2, 6), stage)
        assert all(bool(term.isfinite()) for term in terms.values())
        assert not any(map(torch.equal, before, weights)), stage
