"""A stored teacher teaches what the live one does, or refuses."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

import tutelage
from helpers import FAMILIES, RefuseSync, make_batch, tiny
from tutelage.distill import SAMPLE_IDS
from tutelage.distill._cache_codec import bytes_of, decode, encode
from tutelage.distill._cache_layout import fingerprints, real_tokens
from tutelage.errors import (
    ArtefactError,
    DataError,
    IncompatibleTeacherError,
    OutputExistsError,
    RecipeError,
)
from tutelage.intervention import stages

STEPS = 6


def vit() -> nn.Module:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        image_size=16,
        patch_size=8,
        num_labels=3,
    )
    return ViTForImageClassification(config)


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=53,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def text_batches(count: int = STEPS, rows: int = 3) -> list[dict[str, Tensor]]:
    made = []
    for index in range(count):
        batch = make_batch(rows, 6 + index % 2, seed=index)
        batch["input_ids"] = batch["input_ids"].clamp(max=52)
        del batch["labels"]
        batch[SAMPLE_IDS] = torch.arange(rows) + rows * index
        made.append(batch)
    return made


def image_batches() -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(3, 3, 16, 16, generator=made),
            SAMPLE_IDS: torch.arange(3) + 3 * index,
        }
        for index in range(STEPS)
    ]


def student_of(teacher: nn.Module, scheme: str = "ternary-a8") -> nn.Module:
    made = tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset(scheme))
    return made.requires_grad_(True)


def train(
    teacher: Any, start: nn.Module, batches: list[dict[str, Tensor]], **kwargs: Any
) -> tuple[list[Tensor], dict[str, Tensor]]:
    student = copy.deepcopy(start).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    step = tutelage.TrainStep(tutelage.Distiller(student, teacher, **kwargs), optimizer)
    schedule = tutelage.Schedule.gradual(STEPS - 1)
    torch.manual_seed(1)
    lost = [step(batch, schedule(index))["loss"] for index, batch in enumerate(batches)]
    return lost, dict(student.named_parameters())


def same(first: Any, second: Any) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])


def build(folder: Path, teacher: nn.Module, batches: Any, **kwargs: Any) -> Any:
    losses = kwargs.pop("losses", None)
    scheme = kwargs.pop("scheme", "ternary-a8")
    live = tutelage.Distiller(student_of(teacher, scheme), teacher, losses)
    return tutelage.CachedTeacher.build(folder, live, batches, **kwargs)


@pytest.mark.parametrize("family", [*FAMILIES, "vit", "llama", "tokens"])
def test_training_is_that_with_the_live_teacher(family: str, tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=40,
        num_labels=3,
    )
    made = {"vit": vit, "llama": llama, "tokens": lambda: BertForTokenClassification(config)}
    torch.manual_seed(0)
    teacher = made[family]() if family in made else tiny(family)
    batches = image_batches() if family == "vit" else text_batches()
    start = student_of(teacher)
    schedule = tutelage.Schedule.gradual(STEPS - 1)
    cached = build(tmp_path / "all", teacher, batches, stages=schedule.stages)
    by_step = build(tmp_path / "steps", teacher, batches, stages=schedule)
    live = train(teacher, start, batches)
    same(live, train(by_step, start, batches))
    if family == "llama":
        # Of a decoder, plain distillation wants logits alone: its live teacher attends in one
        # fused operation, and the stored one, of which maps were wanted too, did not.
        near = train(cached, start, batches)[0]
        torch.testing.assert_close(torch.stack(near), torch.stack(live[0]), rtol=1e-2, atol=0.0)
    else:
        same(live, train(cached, start, batches))
    assert by_step.bytes < cached.bytes
    assert len(cached) == 3 * STEPS


def test_padding_that_counts_is_kept(tmp_path: Path) -> None:
    teacher, losses = tiny("bert"), tutelage.losses.reference()
    batches = [b for b in text_batches() if b["input_ids"].shape[1] == 6]
    start = student_of(teacher, "reference")
    with pytest.raises(RecipeError, match=r"padding='keep'"):
        build(tmp_path / "c", teacher, batches, losses=losses, scheme="reference")
    assert not (tmp_path / "c").exists()
    cached = build(
        tmp_path / "c",
        teacher,
        batches,
        losses=losses,
        scheme="reference",
        padding="keep",
        stages=stages(),
    )
    same(
        train(teacher, start, batches, losses=losses), train(cached, start, batches, losses=losses)
    )
    dropped = build(tmp_path / "d", teacher, batches)
    with pytest.raises(RecipeError, match="'hidden_states' runs over padded"):
        tutelage.Distiller(student_of(teacher), dropped, losses)
    with pytest.raises(RecipeError, match="a scale of"):
        tutelage.Distiller(start, dropped)


def test_only_what_is_asked_for_is_stored(tmp_path: Path) -> None:
    teacher, batches = tiny("bert"), text_batches()
    losses = tutelage.losses.Losses.of({"logits": 1.0})
    cached = build(tmp_path / "c", teacher, batches, losses=losses)
    assert cached.bytes < 16 * 3 * STEPS * 3 + 1500
    with pytest.raises(DataError, match="is not stored"):
        train(cached, student_of(teacher), batches)
    backed = tutelage.CachedTeacher(tmp_path / "c", fallback=tutelage.LiveTeacher(teacher))
    start = student_of(teacher)
    same(train(teacher, start, batches), train(backed, start, batches))


@pytest.mark.parametrize("side", ["right", "left"])
def test_other_batches_and_lengths(side: str, tmp_path: Path) -> None:
    teacher = tiny("bert")
    batches = text_batches(2)
    if side == "left":
        batches = [{k: v if k == SAMPLE_IDS else v.flip(1) for k, v in b.items()} for b in batches]
    cached = build(tmp_path / "c", teacher, batches)
    pad = (0, 2) if side == "right" else (2, 0)
    first, second = batches
    one = (pad[0] // 2, pad[1] // 2)
    joined = {
        name: torch.cat([torch.nn.functional.pad(first[name], one), second[name]])
        for name in ("input_ids", "attention_mask")
    }
    wide = {key: torch.nn.functional.pad(value, pad)[[4, 0, 2]] for key, value in joined.items()}
    ids = torch.tensor([4, 0, 2])
    want = ("attention_scores", "block_output", "embeddings")
    logits, signals = cached.get(wide, ids, want)
    expected_logits, expected = tutelage.LiveTeacher(teacher).get(wide, None, want)
    mask = wide["attention_mask"].bool()
    if side == "right":  # on the left, padding shifts BERT's absolute positions
        torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)
    else:
        narrow = {name: first[name] for name in ("input_ids", "attention_mask")}
        again, kept = cached.get(narrow, first[SAMPLE_IDS], want)
        live_logits, live = tutelage.LiveTeacher(teacher).get(narrow, None, want)
        assert torch.equal(again, live_logits)
        real = narrow["attention_mask"].bool()
        for own, other in zip(kept["block_output"], live["block_output"], strict=True):
            assert torch.equal(own[real], other[real])
    for site in ("block_output", "embeddings"):
        for own, other in zip(signals[site], expected[site], strict=True):
            if side == "right":
                torch.testing.assert_close(own[mask], other[mask], rtol=1e-4, atol=1e-5)
            assert not own[~mask].any()
    for own in signals["attention_scores"]:
        assert own.shape == (3, teacher.config.num_attention_heads, mask.shape[1], mask.shape[1])


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_error_of_a_codec(codec: Any) -> None:
    made = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 33, generator=made) * torch.logspace(-6, 3, 15).reshape(3, 5, 1)
    x[0, 0] = 0.0
    x[1, 1, :3] = torch.tensor([1e-42, 0.0, -1e-42])
    codes, scale = encode(codec, x)
    out = torch.empty_like(x)
    decode(codes, scale, tuple(x.shape), out)
    error, y = (out.double() - x.double()).abs(), x.double().abs()
    bound = {
        "float32": torch.zeros_like(y),
        "float16": torch.maximum(y * 2**-11, torch.tensor(2.0**-25)),
        "int8": y.amax(-1, keepdim=True) / 254 * (1 + 1e-5) + 1e-38,
    }[codec]
    assert bool((error <= bound).all())
    stored = codes.numel() * codes.element_size() + (0 if scale is None else 4 * scale.numel())
    assert stored == bytes_of(codec, x.numel(), 15)


def test_numbers_that_cannot_be_written() -> None:
    with pytest.raises(DataError, match="float16; use codec='int8'"):
        encode("float16", torch.tensor([1e6]))
    with pytest.raises(DataError, match="not all finite"):
        encode("int8", torch.tensor([float("nan")]))


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_a_lossy_codec_is_near_and_smaller(codec: str, tmp_path: Path) -> None:
    teacher, batches = tiny("bert"), text_batches()
    exact = build(tmp_path / "a", teacher, batches, stages=stages())
    lossy = build(tmp_path / "b", teacher, batches, stages=stages(), codec=codec)
    start = student_of(teacher)
    near = zip(train(exact, start, batches)[0], train(lossy, start, batches)[0], strict=True)
    assert lossy.bytes < exact.bytes
    for one, other in near:
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.0)


def test_too_large_is_refused_before_it_is_written(tmp_path: Path) -> None:
    teacher, batches = tiny("bert"), text_batches()
    with pytest.raises(DataError, match=r"about .* MiB, more than"):
        build(tmp_path / "c", teacher, batches, max_bytes=40_000)
    with pytest.raises(DataError, match=r"at least .* MiB, more than"):
        build(tmp_path / "c", teacher, iter(batches), max_bytes=40_000)
    assert list(tmp_path.iterdir()) == []
    whole = build(tmp_path / "c", teacher, batches)
    assert whole.bytes > 40_000
    with pytest.raises(OutputExistsError):
        build(tmp_path / "c", teacher, batches)


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    teacher, batches = tiny("bert"), text_batches()
    cached = build(tmp_path / "c", teacher, batches)
    distiller = tutelage.Distiller(student_of(teacher), cached)
    batch = dict(batches[0])
    del batch[SAMPLE_IDS]
    with pytest.raises(DataError, match="needs the ids"):
        distiller.step(batch)
    with pytest.raises(DataError, match="no sample ids"):
        build(tmp_path / "d", teacher, [batch])
    changed = dict(batches[0], input_ids=batches[0]["input_ids"].clone())
    changed["input_ids"][1, 0] += 1
    with pytest.raises(DataError, match="sample 1 has other inputs"):
        distiller.step(changed)
    with pytest.raises(DataError, match="sample 99"):
        distiller.step(dict(batches[0], **{SAMPLE_IDS: torch.tensor([0, 99, 2])}))
    with pytest.raises(DataError, match="two samples"):
        build(tmp_path / "d", teacher, [batches[0], changed])
    with pytest.raises(DataError, match="no batches"):
        build(tmp_path / "d", teacher, [])
    with pytest.raises(RecipeError, match="no codec 'int4'"):
        build(tmp_path / "d", teacher, batches, codec="int4")
    with pytest.raises(IncompatibleTeacherError, match="made from a live one"):
        tutelage.CachedTeacher.build(tmp_path / "d", distiller, batches)
    other = tiny("bert")
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    with pytest.raises(IncompatibleTeacherError, match="weights differ"):
        tutelage.CachedTeacher(tmp_path / "c", teacher=other)
    tutelage.CachedTeacher(tmp_path / "c", teacher=teacher)


def test_a_fingerprint_sees_order_and_not_padding() -> None:
    ids = torch.tensor([[5, 6, 7, 0], [5, 7, 6, 0], [0, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 1]]).bool()
    first, second, third = fingerprints({"input_ids": ids}, mask).tolist()
    assert first == third != second
    with pytest.raises(DataError, match="between its tokens"):
        real_tokens(torch.tensor([[1, 0, 1]]).bool())


def test_damage_is_one_typed_error(tmp_path: Path) -> None:
    teacher, batches = tiny("bert"), text_batches()
    build(tmp_path / "c", teacher, batches)
    folder, (shard,) = tmp_path / "c", sorted((tmp_path / "c").glob("*.safetensors"))
    manifest, whole = folder / "teacher.json", shard.read_bytes()
    text = manifest.read_text()
    for place in range(0, len(whole), len(whole) // 7):
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ArtefactError, match="truncated or changed"):
            tutelage.CachedTeacher(folder)
        shard.write_bytes(whole[:place])
        with pytest.raises(ArtefactError, match="truncated or changed"):
            tutelage.CachedTeacher(folder)
    shard.unlink()
    with pytest.raises(ArtefactError, match="is missing"):
        tutelage.CachedTeacher(folder)
    shard.write_bytes(whole)
    for spoilt in ("", "{}", "[]", text[:-9], text.replace("float32", "float16")):
        manifest.write_text(spoilt)
        with pytest.raises(ArtefactError, match="truncated or changed"):
            tutelage.CachedTeacher(folder)
    newer = json.loads(text)
    newer["teacher"] = newer["teacher"].replace('"version": 1', '"version": 9')
    import hashlib

    newer["sha256"] = hashlib.sha256(newer["teacher"].encode()).hexdigest()
    manifest.write_text(json.dumps(newer))
    with pytest.raises(ArtefactError, match="version 9"):
        tutelage.CachedTeacher(folder)
    manifest.unlink()
    with pytest.raises(ArtefactError, match="holds no stored teacher"):
        tutelage.CachedTeacher(folder)


def test_a_killed_writer_leaves_no_half_cache(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import sys
        import time
        from pathlib import Path
        sys.path[:0] = [sys.argv[2], sys.argv[3]]
        import test_cached_teacher as t
        def slow():
            yield t.text_batches()[0]
            print("begun", flush=True)
            time.sleep(60)
        t.build(Path(sys.argv[1]), t.tiny("bert"), slow())
        """
    )
    here = Path(__file__).parent
    target = tmp_path / "c"
    running = subprocess.Popen(
        [sys.executable, "-c", code, str(target), str(here), str(here.parent)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(here.parent.parent / "src")},
    )
    assert running.stdout is not None
    assert running.stdout.readline().strip() == b"begun"
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stdout.close()
    assert not target.exists()
    build(target, tiny("bert"), text_batches(2))
    assert len(tutelage.CachedTeacher(target)) == 6


def test_numbers_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    teacher, batches = tiny("bert"), text_batches(2)
    cached = build(tmp_path / "c", teacher, batches)
    (tensors,) = cached._shards._tensors
    file = os.path.realpath(next((tmp_path / "c").glob("*.safetensors")))
    if not Path("/proc/self/maps").exists():
        pytest.skip("needs /proc")
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if file in line]
    start, end = (int(part, 16) for part in mapped[0].split()[0].split("-"))
    assert start <= tensors["block_output.codes"].data_ptr() < end


def test_a_step_waits_for_nothing_but_the_disk(tmp_path: Path) -> None:
    teacher, batches = tiny("bert"), text_batches(1)
    cached = build(tmp_path / "c", teacher, batches)
    distiller = tutelage.Distiller(student_of(teacher), cached)
    logits, signals = cached.get(*distiller.model_inputs(batches[0]), distiller.wanted("none"))
    cached.get = lambda *_: (logits, signals)
    with RefuseSync():
        distiller.step(batches[0])


def test_a_model_that_is_cut_otherwise(tmp_path: Path) -> None:
    teacher = tiny("bert")
    batches = text_batches(2)
    with pytest.raises(DataError, match="other shapes in other batches"):
        build(tmp_path / "c", teacher, batches, padding="keep")
    long = build(tmp_path / "c", teacher, batches[1:])
    cut = {k: v if k == SAMPLE_IDS else v[:, :4] for k, v in batches[1].items()}
    with pytest.raises(DataError, match="the batch has 4"):
        tutelage.Distiller(student_of(teacher), long).step(cut)


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        batch = make_batch(1, 6, seed=index, padded=False)
        return {name: value[0] for name, value in batch.items()}


def test_the_trainer_trains_from_a_stored_teacher(tmp_path: Path) -> None:
    from transformers import default_data_collator

    teacher = tiny("bert")
    assert isinstance(teacher, BertForSequenceClassification)
    data = tutelage.with_sample_ids(Rows())
    assert data[3][SAMPLE_IDS] == 3
    with pytest.raises(DataError, match="has an id"):
        tutelage.with_sample_ids(data)[0]
    with pytest.raises(DataError, match="no length"):
        tutelage.with_sample_ids(iter([]))
    schedule = tutelage.Schedule.gradual(3)
    loader = torch.utils.data.DataLoader(data, 4, collate_fn=default_data_collator)
    cached = build(tmp_path / "c", teacher, loader, stages=schedule.stages)
    start = student_of(teacher)
    results = []
    for name, source in (("live", teacher), ("cached", cached)):
        trainer = tutelage.QATTrainer(
            copy.deepcopy(start).requires_grad_(True),
            source,
            tutelage.QATArguments(
                output_dir=str(tmp_path / name),
                max_steps=6,
                per_device_train_batch_size=4,
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                save_strategy="no",
            ),
            schedule=schedule,
            train_dataset=data,
            data_collator=default_data_collator,
        )
        trainer.train()
        results.append(dict(trainer.model.named_parameters()))
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, rtol=1e-3, atol=1e-5)
