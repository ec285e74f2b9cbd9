"""Checkpoints are whole or absent; a resumed run equals an uninterrupted one bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForSequenceClassification, TrainerCallback

import tutelage
from helpers import ENCODER_TERMS, differing, pair, tiny, trainer_for, weights_of
from tutelage import Schedule, losses
from tutelage.distill.losses import Losses
from tutelage.errors import CheckpointError
from tutelage.train import _checkpoint

# Boundaries: stages at 1 and 2 (gradual), steps at 6; an epoch ends after 6 steps, too, but for
# the schedules of 4, where the boundaries differ.
_SCHEDULES = {
    "gradual": Schedule.gradual(6),
    "gradual-4": Schedule.gradual(4),
    "constant": Schedule.constant("context", 5),
    "inverted": Schedule.inverted(6),
    "stochastic": Schedule.stochastic(6, seed=3),
    "none": Schedule.none(),
}
_EVERY_STEP: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}


def _final(trainer: Any, **options: Any) -> dict[str, torch.Tensor]:
    trainer.train(**options)
    return weights_of(trainer.model)


# Resuming.


@pytest.mark.parametrize("name", _SCHEDULES)
@pytest.mark.parametrize("optimizer", ["adamw", "bert_adam"])
def test_resuming_at_any_step_equals_training_through(
    tmp_path: Path, name: str, optimizer: str
) -> None:
    settings: dict[str, Any] = {
        "schedule": _SCHEDULES[name],
        "qat_optimizer": optimizer,
        "warmup_steps": 0.3,
        **_EVERY_STEP,
    }
    whole = trainer_for(tmp_path, **settings)
    expected = _final(whole)
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {
        f"checkpoint-{n}" for n in range(1, 10)
    }
    for step in range(1, 9) if optimizer == "adamw" else (1, 4, 6, 7):
        torch.manual_seed(step)  # a new process has another random state
        resumed = trainer_for(tmp_path / "other", **{**settings, "save_strategy": "no"})
        found = _final(resumed, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert resumed.state.global_step == 9
        assert differing(found, expected) == [], f"resumed at {step}"
        for key, state in whole.optimizer.state_dict()["state"].items():
            other = resumed.optimizer.state_dict()["state"][key]
            assert all(
                torch.equal(torch.as_tensor(state[k]), torch.as_tensor(other[k])) for k in state
            )


class _Stop(TrainerCallback):
    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            control.should_training_stop = True
            control.should_save = True


@pytest.mark.parametrize("step", [5, 6, 7], ids=["before", "at", "after"])
@pytest.mark.parametrize("family", ["roberta", "distilbert"])
def test_stopping_and_going_on_equals_training_through(
    tmp_path: Path, family: str, step: int
) -> None:
    settings: dict[str, Any] = {"schedule": Schedule.gradual(6), "family": family}
    expected = _final(trainer_for(tmp_path / "whole", **settings))
    stopped = trainer_for(tmp_path / "cut", callbacks=[_Stop(step)], **settings)
    stopped.train()
    assert stopped.state.global_step == step
    resumed = trainer_for(tmp_path / "cut", **settings)
    assert differing(_final(resumed, resume_from_checkpoint=True), expected) == []


def test_resuming_with_accumulation_and_evaluation(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "schedule": Schedule.gradual(3),
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_rows": 5,
        **_EVERY_STEP,
    }
    expected = _final(trainer_for(tmp_path, **settings))
    for step in (1, 2, 3, 5):
        resumed = trainer_for(tmp_path / "other", **settings)
        found = _final(resumed, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert differing(found, expected) == [], f"resumed at {step}"


def test_resuming_in_bf16(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"schedule": Schedule.gradual(6), "bf16": True, **_EVERY_STEP}
    expected = _final(trainer_for(tmp_path, **settings))
    for step in (1, 5, 6, 7):
        torch.manual_seed(step)
        resumed = trainer_for(tmp_path / "other", **settings)
        found = _final(resumed, resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert differing(found, expected) == [], f"resumed at {step}"
    stored = load_file(tmp_path / "checkpoint-9" / "latent.safetensors")
    assert not any(tensor.dtype == torch.bfloat16 for tensor in stored.values())


def test_the_default_schedule_resumes(tmp_path: Path) -> None:
    expected = _final(trainer_for(tmp_path, **_EVERY_STEP))
    resumed = trainer_for(tmp_path / "other", **_EVERY_STEP)
    found = _final(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.active_schedule == Schedule.gradual(3)
    assert differing(found, expected) == []


def test_a_resumed_log_goes_on(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "schedule": Schedule.gradual(6),
        "logging_strategy": "steps",
        "logging_steps": 2,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    whole = trainer_for(tmp_path, **settings)
    whole.train()
    resumed = trainer_for(tmp_path / "other", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    def terms(trainer: Any) -> list[dict[str, float]]:
        return [entry for entry in trainer.state.log_history if "loss" in entry]

    assert terms(resumed) == terms(whole)


# What a checkpoint is.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes a run with checkpoints 3, 6 and 9; copy it before changing it."""
    folder = tmp_path_factory.mktemp("run")
    trainer = trainer_for(folder, schedule=Schedule.gradual(6), save_strategy="steps", save_steps=3)
    trainer.train()
    return folder


@pytest.fixture
def own_run(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def _resumable(folder: Path, **settings: Any) -> Any:
    return trainer_for(
        folder,
        **{"schedule": Schedule.gradual(6), "save_strategy": "steps", "save_steps": 3, **settings},
    )


def test_contents(run: Path) -> None:
    names = {file.name for file in (run / "checkpoint-6").iterdir()}
    assert {
        "latent.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "tutelage_checkpoint.json",
    } <= names
    assert not names & {"config.json", "model.safetensors", "pytorch_model.bin"}
    assert not [path for path in run.iterdir() if "partial" in path.name]
    manifest = _checkpoint.verify(run / "checkpoint-6")
    assert set(manifest["files"]) == names - {"tutelage_checkpoint.json"}
    assert manifest["run"]["scheme"]["name"] == "ternary-a8"
    assert manifest["run"]["max_steps"] == 9


def test_latent_weights_are_stored_in_full_precision(run: Path) -> None:
    student, _ = pair("bert")
    stored = load_file(run / "checkpoint-9" / "latent.safetensors")
    assert list(sorted(stored)) == sorted(student.state_dict())
    assert all(
        tensor.dtype == torch.float32 for name, tensor in stored.items() if "position" not in name
    )
    weight = stored["bert.encoder.layer.0.output.dense.weight"]
    assert len(weight.unique()) > 1000  # not three levels a row


@pytest.mark.parametrize("cls", [AutoModel, AutoModelForSequenceClassification])
def test_a_checkpoint_does_not_load_as_a_model(run: Path, cls: Any) -> None:
    with pytest.raises((OSError, ValueError)):
        cls.from_pretrained(run / "checkpoint-6")
    with pytest.raises((OSError, ValueError)):
        cls.from_pretrained(run / "checkpoint-6", config=tiny("bert").config)
    with pytest.raises(tutelage.TutelageError):
        tutelage.load(run / "checkpoint-6")


def test_best_model_at_the_end(tmp_path: Path) -> None:
    values = iter([0.3, 0.9, 0.1])
    trainer = trainer_for(
        tmp_path,
        schedule=Schedule.gradual(6),
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        eval_rows=4,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        save_total_limit=1,
        compute_metrics=lambda _: {"score": next(values)},
    )
    trainer.train()
    assert trainer.state.best_global_step == 6
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-6"
    stored = load_file(tmp_path / "checkpoint-6" / "latent.safetensors")
    assert differing(weights_of(trainer.model), stored) == []
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    trainer = trainer_for(tmp_path, schedule=Schedule.gradual(6), save_total_limit=2, **_EVERY_STEP)
    trainer.train()
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-9"}


def test_state_of_callbacks_is_kept(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    def make(folder: Path) -> Any:
        return trainer_for(
            folder,
            schedule=Schedule.gradual(3),
            eval_strategy="steps",
            eval_steps=3,
            save_strategy="steps",
            save_steps=3,
            eval_rows=4,
            metric_for_best_model="loss",
            load_best_model_at_end=True,
            callbacks=[EarlyStoppingCallback(early_stopping_patience=5)],
        )

    make(tmp_path).train()
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]
    assert kept["EarlyStoppingCallback"]["args"]["early_stopping_patience"] == 5
    assert "TrainerControl" in kept


def test_tied_weights_are_stored_and_loaded(tmp_path: Path) -> None:
    student, _ = pair("bert")
    student.classifier.weight = torch.nn.Parameter(torch.zeros(3, 32))
    student.extra = torch.nn.Linear(32, 3)
    student.extra.weight = student.classifier.weight
    _checkpoint.save_latent(student, tmp_path)
    stored = load_file(tmp_path / "latent.safetensors")
    assert torch.equal(stored["extra.weight"], stored["classifier.weight"])
    assert set(stored) == set(student.state_dict())


# Refusals.


def test_without_a_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(
            CheckpointError, match=r"no complete checkpoint in .*; train without resume_from"
        ):
            _resumable(folder).train(resume_from_checkpoint=True)


def test_a_named_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere is no complete checkpoint"):
        _resumable(tmp_path).train(resume_from_checkpoint=str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "scheduler.pt", "trainer_state.json", "latent.safetensors", "rng_state.pth"],
)
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_an_incomplete_checkpoint_is_refused(own_run: Path, name: str, how: str) -> None:
    checkpoint = own_run / "checkpoint-9"
    file = checkpoint / name
    if how == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    trainer = _resumable(own_run)
    before = weights_of(trainer.model)
    with pytest.raises(CheckpointError, match=rf"{name} (is missing|has \d+ bytes instead of \d+)"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert differing(before, weights_of(trainer.model)) == []
    # The newest complete one is older.
    assert _checkpoint.latest_checkpoint(own_run) == own_run / "checkpoint-6"


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(None, id="missing"),
        pytest.param("", id="empty"),
        pytest.param("{", id="cut"),
        pytest.param("{}", id="no-files"),
        pytest.param('{"files": {}}', id="no-run"),
        pytest.param('{"files": [], "run": {}}', id="files-a-list"),
        pytest.param("[]", id="a-list"),
        pytest.param("null", id="null"),
    ],
)
def test_a_damaged_manifest_is_refused(own_run: Path, content: str | None) -> None:
    manifest = own_run / "checkpoint-9" / "tutelage_checkpoint.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    with pytest.raises(CheckpointError, match="checkpoint-9"):
        _resumable(own_run).train(resume_from_checkpoint=str(own_run / "checkpoint-9"))


@pytest.mark.parametrize("name", ["missing.safetensors", "other-shape"])
def test_weights_of_another_model_are_refused(own_run: Path, name: str) -> None:
    checkpoint = own_run / "checkpoint-6"
    student, teacher = pair("bert", layers=3 if name == "other-shape" else 2, labels=2)
    with pytest.raises(CheckpointError, match=r"does not fit the student"):
        _resumable(own_run, student=student, teacher=teacher).train(
            resume_from_checkpoint=str(checkpoint)
        )


def test_a_corrupt_file_of_the_right_size_is_refused(own_run: Path) -> None:
    file = own_run / "checkpoint-6" / "latent.safetensors"
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match="does not fit the student"):
        _resumable(own_run).train(resume_from_checkpoint=str(own_run / "checkpoint-6"))


_OTHER: dict[str, dict[str, Any]] = {
    "scheme": {"preset": "binary-a8"},
    "activation-bits": {"preset": "ternary-a4"},
    "schedule": {"schedule": Schedule.inverted(6)},
    "schedule-steps": {"schedule": Schedule.gradual(5)},
    "learning_rate": {"learning_rate": 2e-3},
    "losses": {"losses": Losses.of({"logits": 1.0, "attention_scores": 1.0})},
    "weights": {"losses": Losses.of(dict.fromkeys(ENCODER_TERMS, 0.5))},
    "local": {"losses": losses.default(local="code")},
    "optimizer": {"qat_optimizer": "bert_adam"},
    "optim": {"optim": "sgd"},
    "max_steps": {"max_steps": 12},
    "batch": {"per_device_train_batch_size": 8},
    "accumulation": {"gradient_accumulation_steps": 2},
    "seed": {"seed": 7},
    "precision": {"bf16": True},
    "dropout": {"dropout": False},
    "warmup": {"warmup_steps": 0.5},
    "weight_decay": {"weight_decay": 0.5},
    "clipping": {"max_grad_norm": 0.01},
    "betas": {"adam_beta1": 0.5},
    "unmasked-losses": {"losses": losses.reference(local="paper")},
    "curve": {"lr_scheduler_type": "cosine"},
}


@pytest.mark.parametrize("changed", _OTHER)
def test_another_run_is_refused(run: Path, tmp_path: Path, changed: str) -> None:
    trainer = _resumable(tmp_path, **_OTHER[changed])
    before = weights_of(trainer.model)
    told = r"is of a run with \w+ = .*, now it is .*; resume with"
    with pytest.raises(CheckpointError, match=told):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    if changed != "max_steps":  # known only when the data loader is
        assert differing(before, weights_of(trainer.model)) == []


def test_a_checkpoint_from_before_precision_was_noted_is_of_float32(own_run: Path) -> None:
    manifest = own_run / "checkpoint-6" / "tutelage_checkpoint.json"
    content = json.loads(manifest.read_text())
    assert content["run"].pop("precision") == "no"
    manifest.write_text(json.dumps(content))
    _checkpoint.refuse_other_run(own_run / "checkpoint-6", {"precision": "no"})
    with pytest.raises(CheckpointError, match="precision = 'no', now it is 'bf16'"):
        _checkpoint.refuse_other_run(own_run / "checkpoint-6", {"precision": "bf16"})


def test_the_newest_complete_checkpoint_is_taken(
    own_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = load_file(own_run / "checkpoint-9" / "latent.safetensors")
    (own_run / "checkpoint-9" / "optimizer.pt").unlink()
    (own_run / "checkpoint-12").mkdir()  # nothing in it
    (own_run / "checkpoint-best").mkdir()  # no number
    (own_run / ".checkpoint-10.partial").mkdir()
    shutil.copytree(own_run / "checkpoint-6", own_run / ".checkpoint-11.partial")
    assert _checkpoint.latest_checkpoint(own_run) == own_run / "checkpoint-6"
    assert "optimizer.pt is missing" in caplog.text
    trainer = _resumable(own_run)
    assert differing(_final(trainer, resume_from_checkpoint=True), expected) == []
    _checkpoint.verify(own_run / "checkpoint-9")  # written again, whole


def test_numbers_are_compared_as_numbers(tmp_path: Path, run: Path) -> None:
    for number in (3, 20, 100):
        shutil.copytree(run / "checkpoint-9", tmp_path / f"checkpoint-{number}")
    assert _checkpoint.latest_checkpoint(tmp_path) == tmp_path / "checkpoint-100"


def test_a_finished_run_resumes_to_itself(own_run: Path) -> None:
    trainer = _resumable(own_run)
    stored = load_file(own_run / "checkpoint-9" / "latent.safetensors")
    assert differing(_final(trainer, resume_from_checkpoint=True), stored) == []


def test_a_failed_write_leaves_the_older_checkpoint(
    own_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A full disk while checkpoint-9 is written.
    shutil.rmtree(own_run / "checkpoint-9")
    trainer = _resumable(own_run)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.train(resume_from_checkpoint=True)
    assert not (own_run / "checkpoint-9").exists()
    assert _checkpoint.latest_checkpoint(own_run) == own_run / "checkpoint-6"
    monkeypatch.undo()
    assert _resumable(own_run).train(resume_from_checkpoint=True).global_step == 9
    assert not [path for path in own_run.iterdir() if "partial" in path.name]


def test_an_older_checkpoint_of_the_same_number_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "stale").write_text("x")
    stage = _checkpoint.stage_for(tmp_path / "checkpoint-3")
    assert list(stage.iterdir()) == []
    save_file({"a": torch.zeros(2)}, stage / "latent.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "trainer_state.json"):
        (stage / name).write_text(name)
    _checkpoint.commit(stage, tmp_path / "checkpoint-3", {"seed": 1})
    assert not stage.exists()
    assert not (tmp_path / "checkpoint-3" / "stale").exists()
    assert _checkpoint.verify(tmp_path / "checkpoint-3")["run"] == {"seed": 1}
    with safe_open(tmp_path / "checkpoint-3" / "latent.safetensors", "pt") as file:
        assert list(file.keys()) == ["a"]


# Killed.

_SCRIPT = '''
"""Forks one child a case: trains until it is killed, then another one that resumes."""
import json, os, shutil, signal, sys, warnings
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerState

from helpers import trainer_for, weights_of
from tutelage import Schedule
from tutelage.errors import CheckpointError
from tutelage.train import _checkpoint

torch.set_num_threads(1)
ROOT = Path(sys.argv[1])
WRITES = []          # names of what was written while the checkpoint of interest was made
KILL = None          # (checkpoint, index, how)
CURRENT = 0


def wrote(path):
    """Called after every write; kills where the case says so."""
    path = Path(path)
    if CURRENT != KILL[0]:
        return
    WRITES.append(path.name)
    if len(WRITES) - 1 == KILL[1]:
        if KILL[2] == "half" and path.is_file():
            os.truncate(path, path.stat().st_size // 2)
        if KILL[2] != "record":
            os.kill(os.getpid(), signal.SIGKILL)


def wrap(owner, name, path_of):
    real = getattr(owner, name)

    def wrapped(*args, **kwargs):
        out = real(*args, **kwargs)
        wrote(path_of(*args, **kwargs))
        return out

    setattr(owner, name, wrapped)


def instrument():
    global CURRENT
    wrap(torch, "save", lambda obj, f, *a, **k: f)
    wrap(_checkpoint, "save_file", lambda tensors, f, *a, **k: f)
    wrap(TrainerState, "save_to_json", lambda self, f: f)
    wrap(Path, "write_text", lambda self, *a, **k: self)
    wrap(Path, "rename", lambda self, target: target)
    wrap(Path, "mkdir", lambda self, *a, **k: self)
    wrap(shutil, "rmtree", lambda f, *a, **k: f)


class Where(TrainerCallback):
    """Says which step it is; kills at a step of the case."""

    def on_step_begin(self, args, state, control, **kwargs):
        global CURRENT
        CURRENT = state.global_step + 1
        if KILL[2] == "begin" and state.global_step == KILL[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if KILL[2] == "backward" and state.global_step == KILL[1]:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):
        if KILL[2] == "end" and state.global_step == KILL[1] + 1:
            os.kill(os.getpid(), signal.SIGKILL)


def make(folder, callbacks=()):
    return trainer_for(
        folder, schedule=Schedule.gradual(6), save_strategy="steps", save_steps=2, max_steps=9,
        save_total_limit=2, callbacks=list(callbacks),
    )


def child(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            sys.stdout = open(os.devnull, "w")
            work()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def train(folder, out, resume):
    torch.manual_seed(os.getpid())  # a new process has another random state
    trainer = make(folder)
    trainer.train(resume_from_checkpoint=resume or None)
    save_file(weights_of(trainer.model), out)


def case(name, kill, first=False):
    global KILL
    KILL = kill
    folder, out = ROOT / name, ROOT / f"{name}.safetensors"

    def doomed():
        instrument()
        make(folder, [Where()]).train()

    status = child(doomed)
    result = {"killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL}
    result["left"] = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    found = _checkpoint.latest_checkpoint(folder)
    result["latest"] = found and found.name
    if found is None:
        def refused():
            try:
                make(folder).train(resume_from_checkpoint=True)
            except CheckpointError:
                return
            raise AssertionError("resumed from nothing")
        result["refused"] = child(refused) == 0
    result["finished"] = child(lambda: train(folder, out, found is not None)) == 0
    result["after"] = sorted(p.name for p in folder.iterdir())
    return result


def main():
    global KILL
    results = {}
    KILL = (0, -1, "record")
    make(ROOT / "warm").train()  # so that the children find everything imported
    child(lambda: train(ROOT / "whole", ROOT / "whole.safetensors", False))

    def record():
        global KILL
        KILL = (6, -1, "record")
        instrument()
        make(ROOT / "record", [Where()]).train()
        (ROOT / "writes.json").open("w").write(json.dumps(WRITES))

    assert child(record) == 0
    writes = json.loads((ROOT / "writes.json").read_text())
    for index, name in enumerate(writes):
        results[f"after-{index}-{name}"] = case(f"after-{index}", (6, index, "after"))
        if Path(name).suffix in (".pt", ".pth", ".json", ".safetensors"):
            results[f"half-{index}-{name}"] = case(f"half-{index}", (6, index, "half"))
    for index in (1, 3, 5):
        results[f"first-{index}"] = case(f"first-{index}", (2, index, "after"))
    for step, how in ((1, "begin"), (4, "backward"), (6, "begin"), (6, "end"), (8, "end")):
        results[f"step-{step}-{how}"] = case(f"step-{step}-{how}", (0, step, how))
    (ROOT / "results.json").open("w").write(json.dumps({"writes": writes, "results": results}))


warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
main()
'''


@pytest.fixture(scope="module")
def kills(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("kills")
    script = root / "script.py"
    script.write_text(_SCRIPT)
    here = str(Path(__file__).resolve().parents[1])
    found = subprocess.run(
        [sys.executable, str(script), str(root)],
        env={
            **os.environ,
            "PYTHONPATH": here,
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",  # autograd may be forked as long as it has no device
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return root, json.loads((root / "results.json").read_text())


def test_every_file_of_a_checkpoint_was_a_moment_to_be_killed_at(kills: tuple[Path, Any]) -> None:
    _, found = kills
    order = found["writes"]
    assert order[0] == ".checkpoint-6.partial"  # mkdir, or rmtree of what an earlier run left
    written = [name for name in order if "." in name and "partial" not in name]
    assert set(written) == {
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "latent.safetensors",
        "trainer_state.json",
        "tutelage_checkpoint.json",
    }
    # The manifest is the last file, then the folder takes its name, then old ones are removed.
    assert written[-1] == "tutelage_checkpoint.json"
    tail = order[order.index("tutelage_checkpoint.json") + 1 :]
    assert tail == ["checkpoint-6", "checkpoint-2"]
    assert len([name for name in found["results"] if name.startswith("after-")]) == len(order)


def test_a_killed_run_resumes_to_the_same_bits(kills: tuple[Path, Any]) -> None:
    root, found = kills
    expected = load_file(root / "whole.safetensors")
    wrong = {}
    for name, result in found["results"].items():
        assert result["killed"], name
        assert result["finished"], name
        case = name if name.startswith(("step", "first")) else "-".join(name.split("-")[:2])
        changed = differing(load_file(root / f"{case}.safetensors"), expected)
        if changed:
            wrong[name] = changed[:3]
    assert wrong == {}
    assert len(found["results"]) >= 20


def test_a_kill_never_leaves_half_a_checkpoint_to_resume_from(kills: tuple[Path, Any]) -> None:
    _, found = kills
    order = found["writes"]
    for name, result in found["results"].items():
        if name.startswith(("after", "half")):
            done = name.startswith("after") and int(name.split("-")[1]) >= order.index(
                "checkpoint-6"
            )
            assert result["latest"] == ("checkpoint-6" if done else "checkpoint-4"), name
        if name.startswith("first"):
            assert result["latest"] is None
            assert result["refused"]


def test_what_a_kill_left_is_cleared_away(kills: tuple[Path, Any]) -> None:
    _, found = kills
    for name, result in found["results"].items():
        assert result["after"] == ["checkpoint-8", "checkpoint-9"], name
