"""Saving, loading, and that a loaded model gives the bits of the student."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import tutelage
from helpers import (
    FAMILIES,
    PRESETS,
    hooks_of,
    inputs_of,
    logits_of,
    make_batch,
    make_student,
    make_tokenizer,
    same_bits,
    tiny,
    tiny_llama_classifier,
)
from tutelage.artefacts import pack_state_dict, weight_bytes, write_artefact
from tutelage.artefacts._huggingface import FORMAT_VERSION
from tutelage.errors import ArtefactError, UnsupportedModelError
from tutelage.nn import PackedEmbedding, PackedLinear, QuantEmbedding, QuantLinear

FAMILY = pytest.mark.parametrize("family", FAMILIES)
PRESET = pytest.mark.parametrize("preset", PRESETS)
Saved = tuple[Any, Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Saved]:
    """Students and the folders they were saved to, each made once."""
    made: dict[tuple[str, str], Saved] = {}

    def get(family: str, preset: str) -> Saved:
        if (family, preset) not in made:
            student = make_student(family, preset)
            folder = tmp_path_factory.mktemp("artefact") / f"{family}-{preset}"
            assert tutelage.save(student, folder, processor=make_tokenizer()) == folder
            made[family, preset] = student, folder
        return made[family, preset]

    return get


def header_of(file: Path) -> tuple[int, dict[str, Any]]:
    with file.open("rb") as handle:
        (size,) = struct.unpack("<Q", handle.read(8))
        return 8 + size, json.loads(handle.read(size))


def calls_of(model: nn.Module, batch: dict[str, Tensor], kinds: Any) -> dict[str, Any]:
    """Inputs and outputs of every module of some kinds in one forward pass."""
    calls: dict[str, Any] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, out, name=name: calls.update({name: (args[0], out)})
        )
        for name, module in model.named_modules()
        if isinstance(module, kinds)
    ]
    logits_of(model, batch)
    for handle in handles:
        handle.remove()
    return calls


@FAMILY
@PRESET
class TestRoundTrip:
    def test_logits_bit_for_bit_by_either_loader(
        self, saved: Any, family: str, preset: str
    ) -> None:
        student, folder = saved(family, preset)
        loaded = tutelage.load(folder)
        auto = AutoModelForSequenceClassification.from_pretrained(folder)
        assert type(loaded) is type(auto) is type(student)
        assert not loaded.training
        for batch in (make_batch(), make_batch(1, 1, padded=False), make_batch(7, 13, seed=3)):
            want = logits_of(student, batch)
            assert same_bits(logits_of(loaded, batch), want)
            assert same_bits(logits_of(auto, batch), want)

    def test_every_module_bit_for_bit_on_equal_input(
        self, saved: Any, family: str, preset: str
    ) -> None:
        student, folder = saved(family, preset)
        loaded = tutelage.load(folder)
        calls = calls_of(student, make_batch(), (QuantLinear, QuantEmbedding))
        # two blocks of six, the embedding, and the pooler where there is one
        assert len(calls) == 13 + (family == "bert")
        for name, (x, y) in calls.items():
            packed = loaded.get_submodule(name)
            assert isinstance(packed, PackedLinear | PackedEmbedding)
            with torch.no_grad():
                assert torch.equal(packed(x), y), name

    def test_tensors_are_those_of_the_student_packed(
        self, saved: Any, family: str, preset: str
    ) -> None:
        student, folder = saved(family, preset)
        want = pack_state_dict(student, tutelage._prepare.prepared(student).modules)
        got = tutelage.load(folder).state_dict()
        assert got.keys() == want.keys()
        for name, tensor in want.items():
            assert same_bits(got[name], tensor), name
        assert {n.removesuffix("_scale") for n in got} == set(student.state_dict())

    def test_no_weight_is_left_to_chance(self, saved: Any, family: str, preset: str) -> None:
        _, folder = saved(family, preset)
        _, info = AutoModelForSequenceClassification.from_pretrained(
            folder, output_loading_info=True
        )
        assert not any(info.values())

    def test_bytes_on_disk_are_those_of_the_summary(
        self, saved: Any, family: str, preset: str
    ) -> None:
        student, folder = saved(family, preset)
        start, header = header_of(folder / "model.safetensors")
        assert weight_bytes(folder) == (folder / "model.safetensors").stat().st_size
        assert weight_bytes(folder) - start == tutelage.summary(student).packed_bytes
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        for row in tutelage.summary(student).rows[:-1]:
            entries = [tensors[f"{row.module}.{part}"] for part in ("weight", "weight_scale")]
            sizes = [entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries]
            assert sum(sizes) == row.packed_bytes
            assert entries[0]["dtype"] == "U8"
            assert len(entries[0]["shape"]) == 1

    def test_nothing_in_the_folder_is_pickled(self, saved: Any, family: str, preset: str) -> None:
        _, folder = saved(family, preset)
        names = {file.name for file in folder.rglob("*")}
        assert names == {
            "README.md",
            "config.json",
            "model.safetensors",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        for file in folder.glob("*.json"):
            json.loads(file.read_text(encoding="utf-8"))
        start, header = header_of(folder / "model.safetensors")
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name[0] != "_")
        assert start + end == weight_bytes(folder)  # a header and tensors, nothing else

    def test_config_names_scheme_and_modules(self, saved: Any, family: str, preset: str) -> None:
        student, folder = saved(family, preset)
        config = json.loads((folder / "config.json").read_text())
        stored = config["quantization_config"]
        assert stored["quant_method"] == "tutelage"
        assert stored["version"] == FORMAT_VERSION
        assert tutelage.Scheme(**stored["scheme"]) == tutelage.Scheme.preset(preset)
        modules = tutelage._prepare.prepared(student).modules
        assert stored["modules"].keys() == modules.keys()
        for name, spec in modules.items():
            assert tutelage.scheme.ModuleSpec(**stored["modules"][name]) == spec
        assert "attn_implementation" not in config


@pytest.mark.parametrize("family", ["bert", "distilbert"])
@PRESET
def test_base_model_of_a_classifier_has_its_hidden_states(
    saved: Any, family: str, preset: str
) -> None:
    student, folder = saved(family, preset)
    base = AutoModel.from_pretrained(folder).eval()
    batch = inputs_of(make_batch())
    with torch.no_grad():
        want = student.base_model(**batch, output_hidden_states=True)
        got = base(**batch, output_hidden_states=True)
    assert len(got.hidden_states) == 3
    for one, other in zip(got.hidden_states, want.hidden_states, strict=True):
        assert same_bits(one, other)


def test_base_model_with_a_part_that_was_never_saved_is_refused(saved: Any) -> None:
    # RobertaModel has a pooler, RobertaForSequenceClassification has none: it would be random.
    _, folder = saved("roberta", "ternary-a8")
    with pytest.raises(ArtefactError, match=r"no tensor 'pooler\.dense"):
        AutoModel.from_pretrained(folder)
    auto = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    assert type(auto).__name__ == "RobertaModel"


class TestInference:
    def test_pipeline(self, saved: Any) -> None:
        student, folder = saved("bert", "ternary-a8")
        classify = pipeline("text-classification", str(folder))
        text = "w1 w5 w9 unheard"
        got = classify(text, top_k=None)
        tokens = make_tokenizer()(text, return_tensors="pt")
        with torch.no_grad():
            want = student(**tokens).logits.softmax(-1)[0]
        assert {entry["label"] for entry in got} == set(student.config.id2label.values())
        for entry in got:
            index = student.config.label2id[entry["label"]]
            assert entry["score"] == pytest.approx(want[index].item(), abs=1e-6)

    def test_labels_survive(self, tmp_path: Path) -> None:
        student = make_student()
        student.config.id2label = {0: "sport", 1: "tech", 2: "business"}
        student.config.label2id = {"sport": 0, "tech": 1, "business": 2}
        tutelage.save(student, tmp_path / "out")
        loaded = tutelage.load(tmp_path / "out")
        assert loaded.config.id2label == {0: "sport", 1: "tech", 2: "business"}

    def test_tokenizer_beside_the_teacher_is_stored_by_itself(self, tmp_path: Path) -> None:
        teacher = tiny("bert", width=16, heads=2)
        teacher.save_pretrained(tmp_path / "teacher")
        make_tokenizer().save_pretrained(tmp_path / "teacher")
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "teacher")
        tutelage.prepare(model, tutelage.Scheme.preset("ternary-a8"))
        tutelage.save(model, tmp_path / "student")
        again = AutoTokenizer.from_pretrained(tmp_path / "student")
        assert again("w3 w4").input_ids == make_tokenizer()("w3 w4").input_ids

    def test_card_names_scheme_size_and_metrics(self, tmp_path: Path) -> None:
        student = make_student("bert", "binary-a4")
        tutelage.save(student, tmp_path / "out", metrics={"accuracy": 0.98765, "steps": 200})
        card = (tmp_path / "out" / "README.md").read_text()
        assert card.startswith("---\nlibrary_name: transformers\n")
        assert "`binary-a4`" in card
        assert f"{tutelage.summary(student).packed_bytes:,} bytes" in card
        assert "| accuracy | 0.9877 |" in card
        assert "| steps | 200 |" in card


class TestLoadedModel:
    @PRESET
    def test_saved_again_it_is_the_same(self, saved: Any, preset: str, tmp_path: Path) -> None:
        student, folder = saved("bert", preset)
        tutelage.load(folder).save_pretrained(tmp_path / "again")
        again = tutelage.load(tmp_path / "again")
        for name, tensor in tutelage.load(folder).state_dict().items():
            assert same_bits(again.state_dict()[name], tensor)
        assert same_bits(logits_of(again, make_batch()), logits_of(student, make_batch()))

    def test_is_neither_trained_nor_prepared(self, saved: Any) -> None:
        _, folder = saved("bert", "ternary-a8")
        loaded = tutelage.load(folder)
        assert not loaded.hf_quantizer.is_trainable
        with pytest.raises(UnsupportedModelError, match="loaded quantized"):
            tutelage.prepare(loaded, tutelage.Scheme.preset("ternary-a8"))

    @pytest.mark.parametrize("implementation", ["sdpa", "eager"])
    def test_quantized_attention_cannot_be_asked_away(
        self, saved: Any, implementation: str
    ) -> None:
        student, folder = saved("bert", "ternary-a8")
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, attn_implementation=implementation
        )
        assert same_bits(logits_of(model, make_batch()), logits_of(student, make_batch()))

    def test_half_precision_is_refused_or_works(self, saved: Any) -> None:
        _, folder = saved("bert", "ternary-a8")
        try:
            model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
        except ArtefactError:
            return
        assert logits_of(model, make_batch()).isfinite().all()

    def test_another_number_of_labels_is_an_error(self, saved: Any) -> None:
        _, folder = saved("bert", "ternary-a8")
        with pytest.raises((RuntimeError, ArtefactError)):
            AutoModelForSequenceClassification.from_pretrained(folder, num_labels=7)


class TestStudent:
    def test_is_unchanged_by_saving(self, tmp_path: Path) -> None:
        student = make_student()
        before = {name: value.clone() for name, value in student.state_dict().items()}
        want, hooks = logits_of(student, make_batch()), hooks_of(student)
        state = torch.get_rng_state()
        tutelage.save(student, tmp_path / "out")
        assert torch.equal(torch.get_rng_state(), state)
        assert student.state_dict().keys() == before.keys()
        assert all(same_bits(student.state_dict()[name], value) for name, value in before.items())
        assert same_bits(logits_of(student, make_batch()), want)
        assert hooks_of(student) == hooks

    def test_save_pretrained_writes_the_packed_form(self, tmp_path: Path) -> None:
        student = make_student()
        student.save_pretrained(tmp_path)
        loaded = tutelage.load(tmp_path)
        assert same_bits(logits_of(loaded, make_batch()), logits_of(student, make_batch()))

    def test_shards(self, tmp_path: Path) -> None:
        student = make_student()
        student.save_pretrained(tmp_path, max_shard_size="4KB")
        shards = sorted(tmp_path.glob("model-*.safetensors"))
        assert len(shards) > 1
        assert weight_bytes(tmp_path) == sum(file.stat().st_size for file in shards)
        loaded = tutelage.load(tmp_path)
        assert same_bits(logits_of(loaded, make_batch()), logits_of(student, make_batch()))
        shards[-1].unlink()
        with pytest.raises(ArtefactError, match="is missing from the files"):
            tutelage.load(tmp_path)

    def test_of_a_half_precision_teacher_is_stored_in_float32(self, tmp_path: Path) -> None:
        teacher = tiny("bert", width=16, heads=2).to(torch.bfloat16).eval()
        student = tutelage.prepare(teacher, tutelage.Scheme.preset("ternary-a8"))
        tutelage.save(student, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
        loaded = tutelage.load(tmp_path / "out")
        assert same_bits(logits_of(loaded, make_batch()), logits_of(student, make_batch()))

    def test_weights_shipped_are_those_of_the_moment(self, tmp_path: Path) -> None:
        student = make_student()
        tutelage.save(student, tmp_path / "before")
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        tutelage.save(student, tmp_path / "after")
        want = logits_of(student, make_batch())
        assert same_bits(logits_of(tutelage.load(tmp_path / "after"), make_batch()), want)
        assert not torch.equal(logits_of(tutelage.load(tmp_path / "before"), make_batch()), want)

    def test_parts_kept_by_a_rule_stay_in_full_precision(self, tmp_path: Path) -> None:
        from tutelage.scheme import Rule, WeightSpec

        ternary = tutelage.Scheme.preset("ternary-a8")
        rules = (
            Rule(pattern=r".*word_embeddings"),
            Rule(pattern=r".*layer\.0\..*dense", weight=WeightSpec(kind="binary")),
        )
        scheme = ternary.model_copy(update={"rules": rules, "attention": None})
        model = tiny("bert", width=15, heads=3).eval()
        student = tutelage.prepare(model, scheme)
        tutelage.save(student, tmp_path / "out")
        loaded = tutelage.load(tmp_path / "out")
        assert type(loaded.bert.embeddings.word_embeddings) is nn.Embedding
        assert loaded.bert.encoder.layer[0].output.dense.grid == tutelage.quantizers.BINARY
        assert loaded.bert.encoder.layer[0].output.dense.input_quantizer is None
        assert same_bits(logits_of(loaded, make_batch()), logits_of(student, make_batch()))

    def test_unprepared_models_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedModelError, match="is not prepared"):
            tutelage.save(tiny(), tmp_path / "out")
        with pytest.raises(UnsupportedModelError, match="is not prepared"):
            write_artefact(tiny(), tmp_path, processor=None, metrics={})
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("preset", ["ternary-a8", "w2-a8", "binary-a4"])
def test_causal_classifier_with_grouped_heads(preset: str, tmp_path: Path) -> None:
    model = tiny_llama_classifier()
    student = tutelage.prepare(model, tutelage.Scheme.preset(preset))
    tutelage.save(student, tmp_path / "out")
    loaded = tutelage.load(tmp_path / "out")
    assert same_bits(logits_of(loaded, make_batch()), logits_of(student, make_batch()))


def test_a_sharded_student_is_not_saved_in_part(tmp_path: Path) -> None:
    student = make_student()
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(student, mesh=mesh)
        with pytest.raises(UnsupportedModelError, match=r"spread over .* QATTrainer\.save_model"):
            tutelage.save(student, tmp_path / "out")
    finally:
        torch.distributed.destroy_process_group()
    assert not (tmp_path / "out").exists()
