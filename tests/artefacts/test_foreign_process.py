"""Processes of other people: without tutelage nothing loads, in either import order all does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


FOREIGN = """
import json, sys
from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

told = {}
for folder in sys.argv[1:]:
    for name, load in {
        "classifier": AutoModelForSequenceClassification.from_pretrained,
        "base": AutoModel.from_pretrained,
        "pipeline": lambda path: pipeline("text-classification", path),
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


def test_without_tutelage_every_artefact_is_an_error(folders: dict[str, Path]) -> None:
    done = python(FOREIGN, *folders.values())
    assert done.returncode != 0
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == 3 * len(folders)
    assert "LOADED" not in told.values()
    assert "size" in done.stderr.lower()  # the last words are about a mismatch of shapes


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
