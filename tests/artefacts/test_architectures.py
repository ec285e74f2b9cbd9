"""Models whose parts share weights, are stored transposed, scale or embed patches: round trips."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel

import tutelage
from families import make_any_student, make_inputs, make_model, output_of, weight_map
from helpers import same_bits
from tutelage import Scheme
from tutelage.artefacts import pack_state_dict
from tutelage.errors import ArtefactError
from tutelage.nn import PackedConv2d, PackedEmbedding, PackedLinear
from tutelage.scheme import ActivationSpec, Rule, WeightSpec

ALL = (
    "gpt2",
    "llama-tied",
    "llama",
    "gemma3",
    "opt-projected",
    "bert-mlm",
    "albert-mlm",
    "t5",
    "bart-scaled",
)
PATCH = Rule(
    pattern=r".*patch_embeddings\.projection",
    weight=WeightSpec(kind="ternary"),
    input=ActivationSpec(),
)
Saved = tuple[Any, Path]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Saved]:
    """Students and the folders they were saved to, each made once."""
    made: dict[Any, Saved] = {}

    def get(name: str, preset: str = "ternary-a8", *rules: Rule) -> Saved:
        key = (name, preset, rules)
        if key not in made:
            scheme = Scheme.preset(preset).model_copy(update={"rules": rules})
            student = tutelage.prepare(make_model(name), scheme)
            folder = tmp_path_factory.mktemp("artefact") / name
            made[key] = student, tutelage.save(student, folder)
        return made[key]

    return get


@pytest.mark.parametrize("name", ALL)
def test_round_trip(saved: Any, name: str) -> None:
    student, folder = saved(name)
    loaded = tutelage.load(folder)
    assert same_bits(output_of(loaded), output_of(student))
    stored = load_file(folder / "model.safetensors")
    for module, spec in weight_map(student).items():
        packed = loaded.get_submodule(module)
        assert isinstance(packed, PackedLinear | PackedEmbedding)
        if spec.shared_with is not None:
            assert packed.owner is loaded.get_submodule(spec.shared_with)
        owns = spec.shared_with is None
        assert (f"{module}.weight" in stored) == (f"{module}.weight_scale" in stored) == owns
    _, info = type(student).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize("preset", ["reference", "binary-a4", "w2-a8"])
@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5"])
def test_round_trip_of_other_presets(saved: Any, name: str, preset: str) -> None:
    student, folder = saved(name, preset)
    assert same_bits(output_of(tutelage.load(folder)), output_of(student))


@pytest.mark.parametrize("name", ["vit", "dinov2"])
@pytest.mark.parametrize("rules", [(), (PATCH,)], ids=["patches-kept", "patches-quantized"])
def test_round_trip_of_images(saved: Any, name: str, rules: tuple[Rule, ...]) -> None:
    student, folder = saved(name, "ternary-a8", *rules)
    loaded = tutelage.load(folder)
    assert same_bits(output_of(loaded), output_of(student))
    kinds = {type(m) for m in loaded.modules() if isinstance(m, PackedConv2d | nn.Conv2d)}
    assert kinds == {PackedConv2d if rules else nn.Conv2d}


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5", "bert-mlm", "vit"])
def test_files_hold_what_the_summary_says_under_the_names_of_the_model(
    saved: Any, name: str
) -> None:
    student, folder = saved(name)
    stored = load_file(folder / "model.safetensors")
    size = sum(t.numel() * t.element_size() for t in stored.values())
    assert size == tutelage.summary(student).packed_bytes
    assert {key.removesuffix("_scale") for key in stored} <= set(student.state_dict())


@pytest.mark.parametrize("name", ["llama-tied", "bert-mlm", "t5"])
def test_saved_again_it_is_the_same(saved: Any, name: str, tmp_path: Path) -> None:
    _, folder = saved(name)
    loaded = tutelage.load(folder)
    loaded.save_pretrained(tmp_path)
    one, other = (load_file(where / "model.safetensors") for where in (folder, tmp_path))
    assert one.keys() == other.keys()
    assert all(same_bits(one[key], other[key]) for key in one)
    assert same_bits(output_of(tutelage.load(tmp_path)), output_of(loaded))


@pytest.mark.parametrize("name", ["llama-tied", "t5", "gemma3"])
def test_tying_a_loaded_model_again_changes_nothing(saved: Any, name: str) -> None:
    student, folder = saved(name)
    loaded = tutelage.load(folder)
    loaded.tie_weights()
    assert same_bits(output_of(loaded), output_of(student))


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5"])
def test_the_base_model_of_a_language_model_loads_without_its_head(saved: Any, name: str) -> None:
    student, folder = saved(name)
    base = AutoModel.from_pretrained(folder).eval()
    assert not hasattr(base, "lm_head")
    inputs = make_inputs(name)
    with torch.no_grad():
        got = base(**inputs).last_hidden_state
        of_student = getattr(student, student.base_model_prefix, None)
        if of_student is None:  # T5 has no base model of its own
            out = student(**inputs, output_hidden_states=True)
            want = out.decoder_hidden_states[-1]
        else:
            want = of_student(**inputs).last_hidden_state
    assert same_bits(got, want)


@pytest.mark.parametrize("name", ["llama-tied", "bert-mlm", "t5"])
def test_tied_in_full_precision(saved: Any, name: str) -> None:
    rule = Rule(pattern=r".*(lm_head|cls\.predictions\.decoder)")
    student, folder = saved(name, "ternary-a8", rule)
    loaded = tutelage.load(folder)
    assert type(loaded.get_output_embeddings()) is nn.Linear
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert same_bits(output_of(loaded), output_of(student))
    keys = load_file(folder / "model.safetensors")
    assert not any(k.startswith("lm_head") or k.endswith("decoder.weight") for k in keys)


def test_an_untied_head_that_a_rule_quantizes(saved: Any) -> None:
    rule = Rule(pattern="lm_head", weight=WeightSpec(kind="binary"))
    student, folder = saved("llama", "ternary-a8", rule)
    loaded = tutelage.load(folder)
    assert isinstance(loaded.lm_head, PackedLinear)
    assert loaded.lm_head.owner is loaded.lm_head
    assert same_bits(output_of(loaded), output_of(student))


def test_weights_declared_tied_that_differ_are_both_stored(tmp_path: Path) -> None:
    model = make_model("llama-tied")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 2)
    student = tutelage.prepare(model, Scheme.preset("ternary-a8"))
    assert type(student.lm_head) is nn.Linear
    tutelage.save(student, tmp_path / "out")
    loaded = tutelage.load(tmp_path / "out")
    assert same_bits(output_of(loaded), output_of(student))


def test_a_shared_weight_is_packed_once() -> None:
    student = make_any_student("bart-scaled")
    state = pack_state_dict(student, weight_map(student))
    assert sum("embed_tokens" in k or "shared" in k or "lm_head" in k for k in state) == 2
    assert state["model.shared.weight"].dtype == torch.uint8


def test_a_head_whose_table_is_missing_is_refused(saved: Any) -> None:
    from transformers import T5EncoderModel

    _, folder = saved("t5")
    encoder = T5EncoderModel.from_pretrained(folder)
    assert encoder.encoder.embed_tokens.owner is encoder.shared
    _, folder = saved("llama-tied")
    from transformers import GPT2LMHeadModel

    with pytest.raises((ArtefactError, TypeError, AttributeError)):
        GPT2LMHeadModel.from_pretrained(folder)


FOREIGN = """
import json, sys, transformers
told = {}
for name, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    try:
        getattr(transformers, name).from_pretrained(folder)
    except Exception as error:
        told[folder] = type(error).__name__
    else:
        told[folder] = "LOADED"
assert "tutelage" not in sys.modules
print(json.dumps(told))
"""

LOADED = """
import json, sys, torch
sys.path.insert(0, sys.argv[1])
import tutelage
from families import output_of
torch.set_num_threads(1)
for folder in sys.argv[2:]:
    print(json.dumps(output_of(tutelage.load(folder)).double().tolist()))
"""


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_tutelage_every_artefact_is_an_error(saved: Any) -> None:
    made = [saved(name) for name in ("gpt2", "llama-tied", "t5", "bert-mlm", "bart-scaled")]
    made.append(saved("vit", "ternary-a8", PATCH))
    done = python(FOREIGN, *(x for s, f in made for x in (type(s).__name__, f)))
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == len(made)
    assert "LOADED" not in told.values()


def test_another_process_computes_the_same_bits(saved: Any) -> None:
    made = [saved(name) for name in ("gpt2", "llama-tied", "t5", "bert-mlm")]
    done = python(LOADED, Path(__file__).parents[1], *(folder for _, folder in made))
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()[-len(made) :]
    for line, (student, _) in zip(lines, made, strict=True):
        assert json.loads(line) == output_of(student).double().tolist()
