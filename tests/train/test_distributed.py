"""Two processes train as one process with the samples of both."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tutelage
from helpers import differing, inputs_of, logits_of, make_batch, pair
from tutelage.errors import UnsupportedModelError
from tutelage.train import _sharded

_HERE = Path(__file__).resolve()

# All cases run in one go, before the first test.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (root / "port").write_text(str(free.getsockname()[1]))
    found = subprocess.run(
        [sys.executable, str(_HERE.with_name("distributed_processes.py")), str(root)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(_HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
            ),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        },
        capture_output=True,
        text=True,
        timeout=560,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return root


def _load(run: Path, case: str, processes: int, rank: int = 0) -> Any:
    return torch.load(run / f"{case}-{processes}-{rank}.pt", weights_only=False)


@pytest.mark.parametrize("case", ["gradients", "sharded_gradients"], ids=["ddp", "fsdp"])
def test_gradients_of_every_stage_equal_those_of_one_process(run: Path, case: str) -> None:
    alone = _load(run, "gradients", 1)
    ranks = [_load(run, case, 2, rank) for rank in range(2)]
    assert len(ranks[0]) == 2 * len(alone) == 2 * 3 * 4
    for key, (expected, terms) in alone.items():
        whole = torch.stack([g.norm() for g in expected.values() if g is not None]).norm()
        for share in ("one", "two"):
            both = [rank[f"{key}/{share}"] for rank in ranks]
            for name, gradient in expected.items():
                for found, _ in both:
                    # What rests in one process rests in two: a zero would let weights decay.
                    assert (found[name] is None) == (gradient is None), (key, share, name)
                    if gradient is not None:
                        error = (found[name] - gradient).norm()
                        assert error <= 1e-5 * whole, (key, share, name)
            for name, value in terms.items():
                mean = (both[0][1][name] + both[1][1][name]) / 2
                torch.testing.assert_close(mean, value, rtol=1e-5, atol=1e-8)


def test_a_stage_leaves_parameters_without_gradient(run: Path) -> None:
    # Else the test above could not tell whether DDP copes with that.
    alone = _load(run, "gradients", 1)
    resting = {
        case: [n for n, g in found.items() if g is None] for case, (found, _) in alone.items()
    }
    assert any("value" in name for name in resting["code/attention_output"])
    assert resting["paper/none"] == []


@pytest.mark.parametrize("case", ["training", "accumulated"])
def test_two_processes_train_as_one(run: Path, case: str) -> None:
    alone, ranks = _load(run, "training", 1), [_load(run, case, 2, rank) for rank in range(2)]
    assert ranks[0]["wrapper"] == "DistributedDataParallel"
    assert differing(ranks[0]["weights"], ranks[1]["weights"]) == []
    for name, value in alone["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], value, atol=1e-5, rtol=1e-4)
    for found in ranks:
        assert found["eval"] == pytest.approx(alone["eval"], rel=1e-4)
        for one, other in zip(alone["log"], found["log"], strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() - {"epoch"}:
                assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-9), key


def test_two_processes_end_at_the_same_mean(run: Path) -> None:
    alone, pair_of = _load(run, "averaged", 1)["weights"], _load(run, "averaged", 2)["weights"]
    for name, value in alone.items():
        torch.testing.assert_close(pair_of[name], value, atol=1e-5, rtol=1e-4)


def test_two_processes_train_in_bf16(run: Path) -> None:
    alone, ranks = _load(run, "training", 1), [_load(run, "bf16", 2, rank) for rank in range(2)]
    assert differing(ranks[0]["weights"], ranks[1]["weights"]) == []
    assert all(weight.dtype != torch.bfloat16 for weight in ranks[0]["weights"].values())
    expected, found = ([entry["loss"] for entry in r["log"]] for r in (alone, ranks[0]))
    assert found != expected
    assert found == pytest.approx(expected, rel=0.05)


def test_resuming_two_processes_equals_training_through(run: Path) -> None:
    for rank in range(2):
        found = _load(run, "resumed", 2, rank)
        assert len(found) == 3
        for name, weights in found.items():
            assert differing(weights, found["whole"]) == [], name


def test_nan_in_one_process_stops_all(run: Path) -> None:
    first, second = (_load(run, "broken", 2, rank) for rank in range(2))
    assert first == second
    assert first["step"] == 4
    assert "became NaN or infinite before step 5" in first["error"]


def test_settings_of_ddp_that_would_fail_are_refused(run: Path) -> None:
    found = _load(run, "refused", 2)
    assert "ddp_find_unused_parameters" in found["ddp_find_unused_parameters"]
    assert "ddp_static_graph" in found["ddp_static_graph"]
    assert "over several GPUs only" in found["fsdp"]
    assert "'bert.encoder.layer.1' is sharded (FSDPBertLayer)" in found["a part"]


def test_a_sharded_student_trains_as_a_whole_one(run: Path) -> None:
    alone = _load(run, "sharded_training", 1)
    ranks = [_load(run, "sharded_training", 2, rank) for rank in range(2)]
    for found in ranks:
        for name, value in alone["weights"].items():
            torch.testing.assert_close(found["weights"][name], value, atol=1e-5, rtol=1e-4)
    losses = [sum(pair) / 2 for pair in zip(*(found["losses"] for found in ranks), strict=True)]
    assert losses == pytest.approx(alone["losses"], rel=1e-4)
    packed = tutelage.load(run / "packed-2")
    plain = pair("bert")[0]
    plain.load_state_dict(ranks[0]["weights"])
    batch = inputs_of(make_batch())
    assert torch.equal(logits_of(packed, batch), logits_of(plain.eval(), batch))


def test_a_sharded_student_under_autocast(run: Path) -> None:
    for rank in range(2):
        found = _load(run, "sharded_bf16", 2, rank)
        assert found["dtypes"] == {torch.float32}
        assert "leave param_dtype out" in found["error"]
        assert found["hooks"] == 0
    loss = sum(_load(run, "sharded_bf16", 2, rank)["loss"] for rank in range(2)) / 2
    expected = _load(run, "gradients", 1)["paper/none"][1]["loss"].item()
    assert loss != expected
    assert loss == pytest.approx(expected, rel=0.01)


def test_the_trainer_shards_a_student(run: Path) -> None:
    alone = _load(run, "training", 1)
    ranks = [_load(run, "sharded_trainer", 2, rank) for rank in range(2)]
    for found in ranks:
        assert found["class"] == "FSDPBertForSequenceClassification"
        assert len(found["sharded"]) == len(list(pair("bert")[0].parameters()))
        for one, other in zip(alone["log"], found["log"], strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() - {"epoch"}:
                assert other[key] == pytest.approx(one[key], rel=1e-3, abs=1e-9), key
    weights = load_file(run / "fsdp-2" / "checkpoint-8" / "latent.safetensors")
    for name, value in alone["weights"].items():
        torch.testing.assert_close(weights[name], value, atol=1e-5, rtol=1e-4)
    plain = pair("bert")[0].eval()
    plain.load_state_dict(weights)
    batch = make_batch(8, 6, seed=5)
    packed = tutelage.load(run / "fsdp-packed")
    assert torch.equal(logits_of(packed, batch), logits_of(plain, batch))
    with torch.no_grad():
        assert ranks[0]["eval"] == pytest.approx(plain(**batch).loss.item(), rel=1e-4)


def test_a_sharded_training_resumes_to_the_same_bits(run: Path) -> None:
    whole, again = (
        load_file(run / f"{name}-2" / "checkpoint-8" / "latent.safetensors")
        for name in ("fsdp-whole", "fsdp-again")
    )
    assert differing(whole, again) == []
    files = {file.name for file in (run / "fsdp-whole-2" / "checkpoint-4").iterdir()}
    assert {"optimizer.pt", "optimizer-1.pt", "rng_state_0.pth", "rng_state_1.pth"} <= files


def test_a_sharded_training_ends_at_the_mean_of_its_weights(run: Path) -> None:
    mean, again = (
        load_file(run / f"{name}-2" / "checkpoint-8" / "latent.safetensors")
        for name in ("fsdp-mean", "fsdp-mean-again")
    )
    assert differing(mean, again) == []
    alone = _load(run, "averaged", 1)["weights"]
    for name, value in alone.items():
        torch.testing.assert_close(mean[name], value, atol=1e-5, rtol=1e-4)
    assert differing(alone, _load(run, "training", 1)["weights"])


def test_a_sharded_training_in_bf16(run: Path) -> None:
    alone, found = _load(run, "training", 1)["log"], _load(run, "sharded_trainer", 2)["bf16"]
    expected, losses = ([entry["loss"] for entry in log] for log in (alone, found))
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.05)


def test_a_broken_weight_in_one_shard_stops_all(run: Path) -> None:
    for rank in range(2):
        found = _load(run, "sharded_trainer", 2, rank)
        assert "'classifier.bias' became NaN or infinite at step 6" in found["broken"]
    assert not (run / "fsdp-nothing").exists()


def test_settings_of_fsdp() -> None:
    student, _ = pair("distilbert")
    plugin = SimpleNamespace(
        fsdp_version=2,
        activation_checkpointing=False,
        mixed_precision_policy="bf16",
        transformer_cls_names_to_wrap=None,
    )
    _sharded.check_plugin(plugin, student)
    assert plugin.mixed_precision_policy is None
    assert plugin.transformer_cls_names_to_wrap == ["TransformerBlock"]
    plugin.transformer_cls_names_to_wrap = ["Own"]
    _sharded.check_plugin(plugin, student)
    assert plugin.transformer_cls_names_to_wrap == ["Own"]
    with pytest.raises(UnsupportedModelError, match="leave activation_checkpointing out"):
        _sharded.check_plugin(
            SimpleNamespace(fsdp_version=2, activation_checkpointing=True), student
        )
    with pytest.raises(UnsupportedModelError, match="version 2 only"):
        _sharded.check_plugin(SimpleNamespace(fsdp_version=1), student)
