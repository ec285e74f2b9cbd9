"""Processes of other people: without tutelage nothing loads, in either import order all does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tutelage
from helpers import FAMILIES, PRESETS, logits_of, make_batch, make_student, make_tokenizer


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("folders")
    made = {}
    for family in FAMILIES:
        for preset in PRESETS if family == "bert" else PRESETS[:1]:
            made[f"{family}-{preset}"] = root / f"{family}-{preset}"
            student = make_student(family, preset)
            tutelage.save(student, made[f"{family}-{preset}"], processor=make_tokenizer())
    return made


@pytest.fixture(scope="module")
def in_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "out"
    make_student().save_pretrained(folder, max_shard_size="3KB")
    assert (folder / "model.safetensors.index.json").is_file()
    return folder


@pytest.fixture(scope="module")
def again(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("again") / "out"
    packed: Any = tutelage.load(folders["bert-ternary-a8"])
    packed.save_pretrained(folder)
    return folder


FOREIGN = """
import json, sys
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers import AutoModelForMaskedLM, BertForSequenceClassification, pipeline

careless = {"ignore_mismatched_sizes": True}
told = {}
for folder in sys.argv[1:]:
    classifier = AutoModelForSequenceClassification.from_pretrained
    for name, load in {
        "classifier": classifier,
        "base": AutoModel.from_pretrained,
        "masked": lambda path: AutoModelForMaskedLM.from_pretrained(path, **careless),
        "direct": lambda path: BertForSequenceClassification.from_pretrained(path, **careless),
        "pipeline": lambda path: pipeline("text-classification", path),
        "careless": lambda path: classifier(path, **careless),
        "careless base": lambda path: AutoModel.from_pretrained(path, **careless),
        "careless pipeline": lambda path: pipeline(
            "text-classification", path, model_kwargs=careless
        ),
        "careless map": lambda path: classifier(path, device_map="cpu", **careless),
        "careless auto": lambda path: classifier(path, device_map="auto", **careless),
        "careless safe": lambda path: classifier(path, use_safetensors=True, **careless),
        "careless bin": lambda path: classifier(path, use_safetensors=False, **careless),
        "careless half": lambda path: classifier(path, dtype="bfloat16", **careless),
    }.items():
        try:
            load(folder)
        except Exception as error:
            told[f"{folder} {name}"] = type(error).__name__
        else:
            told[f"{folder} {name}"] = "LOADED"
assert "tutelage" not in sys.modules
print(json.dumps(told))
AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
"""


def test_without_tutelage_every_artefact_is_an_error(
    folders: dict[str, Path], in_shards: Path, again: Path
) -> None:
    done = python(FOREIGN, *folders.values(), in_shards, again)
    assert done.returncode != 0
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == 13 * (len(folders) + 2)
    assert "LOADED" not in told.values()
    assert "import tutelage" in done.stderr.splitlines()[-1]


def test_without_the_guard_the_shapes_still_differ(again: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(again, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    del config["fusion_config"]
    (folder / "config.json").write_text(json.dumps(config))
    done = python(
        "import sys; from transformers import AutoModel; AutoModel.from_pretrained(sys.argv[1])",
        folder,
    )
    assert done.returncode != 0
    assert "mismatched_sizes" in done.stderr.splitlines()[-1]


def test_shards_and_second_saves_load_the_same_bits(in_shards: Path, again: Path) -> None:
    want = logits_of(make_student(), make_batch())
    for folder in (in_shards, again):
        assert torch.equal(logits_of(tutelage.load(folder), make_batch()), want)


LOADED = """
import json, sys
{imports}
sys.path.insert(0, sys.argv[1])
from transformers import AutoModelForSequenceClassification
{after}
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[2]).eval()
from helpers import logits_of, make_batch
print(json.dumps(logits_of(model, make_batch()).double().tolist()))
"""


@pytest.mark.parametrize(
    ("imports", "after"),
    [
        pytest.param("import tutelage", "", id="tutelage-first"),
        pytest.param(
            "import transformers; from transformers import PreTrainedModel",
            "assert 'tutelage' not in sys.modules; import tutelage",
            id="transformers-first",
        ),
    ],
)
def test_either_import_order_loads_the_same_bits(
    folders: dict[str, Path], imports: str, after: str
) -> None:
    student = make_student("bert", "ternary-a8")
    done = python(
        LOADED.format(imports=imports, after=after),
        Path(__file__).parents[1],
        folders["bert-ternary-a8"],
    )
    assert done.returncode == 0, done.stderr[-2000:]
    want = logits_of(student, make_batch()).double().tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == want


def test_the_first_use_of_a_process_may_be_load() -> None:
    done = python("import tutelage; print(tutelage.load.__name__)")
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.split() == ["load"]
