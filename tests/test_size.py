"""Every byte of a saved student is explained, and sizes computed in advance are those on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

import tutelage
from families import make_model
from helpers import PRESETS, make_student, make_tokenizer, tiny
from tutelage._size import SizeReport, planned_size, size_of, stored_size
from tutelage._tables import size_table
from tutelage.artefacts import weight_bytes
from tutelage.errors import ArtefactError
from tutelage.scheme import Rule

WAYS = [(encoding, rest) for encoding in ("bits", "base3") for rest in ("float32", "bfloat16")]
WAY = pytest.mark.parametrize(("encoding", "rest"), WAYS)


def by_kind(report: SizeReport) -> dict[str, int]:
    return {part.kind: part.bytes for part in report.parts}


def rows_of(report: SizeReport) -> dict[str, tuple[int, int, int]]:
    return {part.kind: (part.tensors, part.values, part.bytes) for part in report.parts}


@WAY
def test_parts_of_a_saved_student(encoding: Any, rest: Any, tmp_path: Path) -> None:
    student = make_student("bert", width=20, heads=2, layers=1)
    folder = tmp_path / "out"
    tutelage.save(student, folder, encoding=encoding, rest=rest, processor=make_tokenizer())
    report = stored_size(str(folder))
    assert report.weight_bytes == (folder / "model.safetensors").stat().st_size
    assert (report.encoding, report.rest, report.scheme) == (encoding, rest, "ternary-a8")
    files = {f.name: f.stat().st_size for f in folder.iterdir() if f.name != "model.safetensors"}
    assert report.files == files
    assert report.float_bytes == 4 * sum(p.numel() for p in student.parameters())

    row, one = (5 if encoding == "bits" else 4), (4 if rest == "float32" else 2)
    inner = student.config.intermediate_size
    wide = -(-inner // (4 if encoding == "bits" else 5))
    found = rows_of(report)
    assert found["embedding codes"] == (1, 48 * 20, 48 * row)
    linears = (7, 20 * (5 * 20 + 2 * inner), (5 * 20 + inner) * row + 20 * wide)
    assert found["Linear codes"] == linears
    rows = 48 + 6 * 20 + inner
    assert found["scales"] == (8, rows, 4 * rows)
    biases = 6 * 20 + inner
    assert found["biases"] == (7, biases, one * biases)
    assert found["norms"] == (6, 6 * 20, one * 6 * 20)
    others = sum(
        student.get_parameter(f"bert.embeddings.{name}_embeddings.weight").numel()
        for name in ("position", "token_type")
    )
    assert found["other embeddings"] == (2, others, one * others)
    assert found["head"] == (2, 63, one * 63)
    header = int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert found["file header and digests"] == (0, 0, 8 + header)


@WAY
@pytest.mark.parametrize(
    "name", ["bert", "distilbert", "gpt2", "llama-tied", "t5", "albert-mlm", "vit", "bart-scaled"]
)
def test_a_planned_size_is_that_on_disk(
    name: str, encoding: Any, rest: Any, tmp_path: Path
) -> None:
    scheme = tutelage.Scheme.preset("ternary-a8")
    model = make_model(name)
    with torch.device("meta"):
        hollow = type(model)(model.config)
    planned = planned_size(name, hollow, scheme, encoding, rest)
    tutelage.save(tutelage.prepare(model, scheme), tmp_path / "out", encoding=encoding, rest=rest)
    stored = stored_size(str(tmp_path / "out"))
    assert stored.weight_bytes == planned.weight_bytes == weight_bytes(tmp_path / "out")
    assert stored.parts == planned.parts
    assert stored.float_bytes == planned.float_bytes


@pytest.mark.parametrize("preset", PRESETS)
def test_of_a_model_folder_under_a_scheme(preset: str, tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "full")
    report = size_of(str(tmp_path / "full"), tutelage.Scheme.preset(preset))
    assert not report.stored
    student = tutelage.prepare(tiny(), tutelage.Scheme.preset(preset))
    tutelage.save(student, tmp_path / "out")
    assert report.weight_bytes == weight_bytes(tmp_path / "out")


def test_shards_and_a_model_that_stays_as_it_is(tmp_path: Path) -> None:
    student = make_student()
    student.save_pretrained(tmp_path / "out", max_shard_size="4KB")
    report = size_of(str(tmp_path / "out"))
    assert report.weight_bytes == weight_bytes(tmp_path / "out")
    assert "model.safetensors.index.json" in report.files
    model = tiny()
    kinds = {name: type(module) for name, module in model.named_modules()}
    planned_size("x", model, tutelage.Scheme.preset("ternary-a8"))
    assert {name: type(module) for name, module in model.named_modules()} == kinds


def test_what_a_rule_leaves_in_full_precision_is_told() -> None:
    rules = (Rule(pattern=r".*word_embeddings"), Rule(pattern=r".*layer\.0\..*"))
    scheme = tutelage.Scheme.preset("ternary-a8").model_copy(update={"rules": rules})
    found = by_kind(planned_size("x", tiny(), scheme))
    assert "embedding codes" not in found
    words = tiny().bert.embeddings.word_embeddings.weight.numel()
    assert found["other embeddings"] > 4 * words
    assert found["other weights"] == 4 * (4 * 32 * 32 + 2 * 32 * tiny().config.intermediate_size)


@pytest.mark.parametrize(
    ("encoding", "rest", "limit"),
    [
        ("bits", "float32", 28.5),
        ("base3", "float32", 23.3),
        ("bits", "bfloat16", 27.5),
        ("base3", "bfloat16", 22.4),
    ],
)
def test_the_size_of_bert_base(encoding: Any, rest: Any, limit: float) -> None:
    """The smallest students that were promised, header and digests included."""
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    scheme = tutelage.Scheme.preset("ternary-a8")
    report = planned_size("BERT-base", model, scheme, encoding, rest)
    assert report.float_bytes / 2**20 == pytest.approx(417.65, abs=0.005)
    assert limit - 0.15 < report.weight_bytes / 2**20 <= limit


class TestRefusals:
    def test_a_student_has_the_storage_it_has(self, tmp_path: Path) -> None:
        tutelage.save(make_student(), tmp_path / "out")
        with pytest.raises(ArtefactError, match="is packed already"):
            size_of(str(tmp_path / "out"), encoding="base3")

    def test_an_edited_configuration(self, tmp_path: Path) -> None:
        file = tutelage.save(make_student(), tmp_path / "out") / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 10**9}))
        with pytest.raises(ArtefactError, match="is not the one that"):
            size_of(str(tmp_path / "out"))

    def test_truncated_weights(self, tmp_path: Path) -> None:
        file = tutelage.save(make_student(), tmp_path / "out") / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(ArtefactError, match="truncated or corrupt"):
            size_of(str(tmp_path / "out"))


def test_the_table_names_every_kind_and_the_total() -> None:
    from rich.console import Console

    report = planned_size("tiny", tiny(), tutelage.Scheme.preset("ternary-a8"), "base3")
    console = Console(width=100)
    with console.capture() as capture:
        console.print(size_table(report))
    shown = capture.get()
    for part in report.parts:
        assert part.kind in shown
        assert f"{part.bytes:,}" in shown
    assert f"{report.weight_bytes:,}" in shown
    assert "tiny under ternary-a8" in shown
