"""Runs the cases of test_distributed.py: one process for each, and two over gloo for the same.

Called as ``python distributed_processes.py FOLDER``. Every case leaves ``CASE-PROCESSES-RANK.pt``.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import tutelage
from helpers import make_batch, pair, rows, trainer_for, weights_of
from tutelage import Distiller, Schedule, TrainStep, losses
from tutelage.distill.losses import Losses
from tutelage.errors import NonFiniteLossError, TutelageError
from tutelage.intervention import stages
from tutelage.train import BertAdam

ROOT = Path(sys.argv[1])
LOSSES = {
    "paper": losses.default(),
    "code": losses.default(local="code"),
    "logits": Losses.of({"logits": 1.0}),
}
# Samples of the two ranks, each in one or two micro-batches, all of unequal size.
SHARES = {"one": [[(0, 2)], [(2, 8)]], "two": [[(0, 1), (1, 4)], [(4, 6), (6, 8)]]}
AVERAGED: dict[str, Any] = {"schedule": Schedule.none(), "average": 0.75}


def global_batch() -> dict[str, Tensor]:
    batch = make_batch(8, 9)
    batch["attention_mask"][:] = torch.arange(9) < torch.tensor([5, 4, 9, 3, 7, 6, 2, 3])[:, None]
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 1)
    return batch


def part(start: int, stop: int) -> dict[str, Tensor]:
    """Returns some samples, padded to the longest of them only."""
    batch = {key: value[start:stop] for key, value in global_batch().items()}
    length = int(batch["attention_mask"].sum(-1).max())
    return {k: v[:, :length] if v.dim() == 2 else v for k, v in batch.items()}


def wrapped(student: nn.Module, processes: int) -> nn.Module | None:
    if processes == 1:
        return None
    return nn.parallel.DistributedDataParallel(student, find_unused_parameters=True)


def sharded(student: Any) -> None:
    """Shards a student in place, as accelerate does: embeddings, every block, the rest."""
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(student.get_input_embeddings(), mesh=mesh)
    for block in student.bert.encoder.layer:
        fully_shard(block, mesh=mesh)
    fully_shard(student, mesh=mesh)


def whole(tensor: Any) -> Any:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gradients(rank: int, processes: int, *, shard: bool = False) -> dict[str, Any]:
    """Gradients of one step: every stage, set of losses and number of micro-batches."""
    found: dict[str, Any] = {}
    for kind, chosen in LOSSES.items():
        student, teacher = pair("bert", dropout=0.0)
        student.train()
        model = None if shard else wrapped(student, processes)
        if shard:
            sharded(student)
        # An update of nothing: the gradients are looked at.
        optimizer = torch.optim.SGD(student.parameters(), lr=0.0)
        train_step = TrainStep(Distiller(student, teacher, chosen), optimizer, max_grad_norm=None)
        seen: dict[str, Tensor | None] = {}

        def look(*_: Any, student: nn.Module = student, seen: dict[str, Any] = seen) -> None:
            seen.update({n: whole(p.grad) for n, p in student.named_parameters()})

        optimizer.register_step_pre_hook(look)
        for stage in (*stages(), *reversed(stages())):  # a stage after another, both ways
            if processes == 1:
                terms = train_step(global_batch(), stage)
                found[f"{kind}/{stage}"] = (dict(seen), terms)
                continue
            for share, ranks in SHARES.items():
                batches = [part(*bounds) for bounds in ranks[rank]]
                terms = train_step(batches, stage, model=model)
                found[f"{kind}/{stage}/{share}"] = (dict(seen), terms)
    return found


def sharded_gradients(rank: int, processes: int) -> dict[str, Any]:
    return gradients(rank, processes, shard=True)


def sharded_training(rank: int, processes: int) -> dict[str, Any]:
    """Weights and losses of a loop of one's own, and the packed model that comes of it."""
    student, teacher = pair("bert", dropout=0.0)
    plain = copy.deepcopy(student)
    student.train()
    if processes > 1:
        sharded(student)
    optimizer = BertAdam(student.parameters(), lr=1e-3)
    train_step = TrainStep(Distiller(student, teacher), optimizer, max_grad_norm=0.5)
    schedule, logged = Schedule.gradual(6), []
    for step in range(8):
        batches = [part(*b) for b in SHARES["two"][rank]] if processes > 1 else global_batch()
        logged.append(train_step(batches, schedule(step))["loss"].item())
    options = StateDictOptions(full_state_dict=True)
    plain.load_state_dict(get_model_state_dict(student, options=options))
    found = {"weights": weights_of(plain), "losses": logged}
    if rank == 0:
        tutelage.save(plain, ROOT / f"packed-{processes}")
    return found


def sharded_bf16(rank: int, processes: int) -> dict[str, Any]:
    """Weights cast by FSDP are refused; autocast is not."""
    found: dict[str, Any] = {}
    student, teacher = pair("bert", dropout=0.0)
    sharded(student)
    train_step = TrainStep(Distiller(student, teacher), None)
    batches = [part(*b) for b in SHARES["one"][rank]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        counts = train_step.counts(batches)
        terms = train_step.accumulate(batches[0], counts=counts)
    found["loss"] = terms["loss"].item()
    found["dtypes"] = {p.grad.dtype for p in student.parameters()}
    student, teacher = pair("bert", dropout=0.0)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(student, mesh=init_device_mesh("cpu", (2,)), mp_policy=policy)
    try:
        Distiller(student, teacher).step(batches[0])
    except TutelageError as error:
        found["error"] = str(error)
    found["hooks"] = sum(len(m._forward_pre_hooks) for n, m in student.named_modules() if n)
    return found


def collate(samples: list[Any]) -> dict[str, Tensor]:
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    length = int(batch["attention_mask"].sum(-1).max())
    return {k: v[:, :length] if v.dim() == 2 else v for k, v in batch.items()}


def shard_without_gpus() -> None:
    """Lets accelerate shard in processes without a GPU, which it leaves out otherwise."""
    from accelerate import state

    real = state.AcceleratorState.__init__

    def init(self: Any, *args: Any, **options: Any) -> None:
        shared = state.PartialState._shared_state
        if shared.get("distributed_type") == state.DistributedType.MULTI_CPU:
            shared["distributed_type"] = state.DistributedType.MULTI_XPU
        real(self, *args, **options)

    state.AcceleratorState.__init__ = init


def sharded_trainer(rank: int, processes: int) -> dict[str, Any]:
    """A training with FSDP: log, weights, packed model, resumed training, bf16, NaN."""
    shard_without_gpus()
    keep: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4, "fsdp": True}
    trainer = trainer_of("fsdp", processes, **keep)
    trainer.train()
    packed = ROOT / "fsdp-packed"
    trainer.save_model(str(packed))
    found: dict[str, Any] = {
        "class": type(trainer.model).__name__,
        "sharded": [n for n, p in trainer.model.named_parameters() if isinstance(p, DTensor)],
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "eval": trainer.evaluate(rows(8, seed=5))["eval_loss"],
    }
    more: dict[str, Any] = {"rate": 0.1, "qat_optimizer": "adamw", "ramp": 0.75}
    # Three steps an epoch: the checkpoint lies inside the second one.
    more |= {"rate_by_magnitude": True, "train_sampling_strategy": "group_by_length"}
    settings: dict[str, Any] = {**keep, **more}
    trainer_of("fsdp-whole", processes, **settings).train()
    torch.manual_seed(7 + rank)
    again = trainer_of("fsdp-again", processes, **settings)
    again.train(resume_from_checkpoint=str(ROOT / f"fsdp-whole-{processes}" / "checkpoint-4"))
    # The checkpoint lies inside the steps that are averaged.
    tail: dict[str, Any] = {**keep, **AVERAGED}
    trainer_of("fsdp-mean", processes, **tail).train()
    torch.manual_seed(9 + rank)
    checkpoint = ROOT / f"fsdp-mean-{processes}" / "checkpoint-4"
    trainer_of("fsdp-mean-again", processes, **tail).train(resume_from_checkpoint=str(checkpoint))
    half = trainer_of("fsdp-bf16", processes, fsdp=True, bf16=True)
    half.train()
    found["bf16"] = [entry for entry in half.state.log_history if "loss" in entry]
    broken = trainer_of("fsdp-broken", processes, max_steps=6, fsdp=True)
    broken.train()
    with torch.no_grad():
        bias = broken.model.classifier.bias.to_local()
        if rank == 1:
            bias.fill_(float("nan"))
    try:
        broken.save_model(str(ROOT / "fsdp-nothing"))
    except NonFiniteLossError as error:
        found["broken"] = str(error)
    return found


def trainer_of(name: str, processes: int, **settings: Any) -> Any:
    trainer = trainer_for(
        ROOT / f"{name}-{processes}",
        schedule=settings.pop("schedule", Schedule.gradual(6)),
        per_device_train_batch_size=8
        // processes
        // settings.get("gradient_accumulation_steps", 1),
        **{
            "rate": 0.0,
            "max_steps": 8,
            "qat_optimizer": "bert_adam",
            "logging_steps": 2,
            **settings,
        },
        logging_strategy="steps",
        ddp_backend="gloo" if processes > 1 else None,
    )
    trainer.train_dataset = rows(24)
    trainer.data_collator = collate
    return trainer


def training(rank: int, processes: int, **settings: Any) -> dict[str, Any]:
    """Weights and log of a training; sentences of unequal length on the ranks."""
    trainer = trainer_of("training", processes, **settings)
    trainer.train()
    wrapper = type(trainer.model_wrapped).__name__
    return {
        "weights": weights_of(trainer.model),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "wrapper": wrapper,
        "eval": trainer.evaluate(rows(8, seed=5))["eval_loss"],
    }


def averaged(rank: int, processes: int) -> dict[str, Any]:
    """Weights of a training that ends at the mean of its last six."""
    return training(rank, processes, **AVERAGED)


def accumulated(rank: int, processes: int) -> dict[str, Any]:
    return training(rank, processes, gradient_accumulation_steps=2)


def bf16(rank: int, processes: int) -> dict[str, Any]:
    return training(rank, processes, bf16=True)


def resumed(rank: int, processes: int) -> dict[str, Any]:
    """A training with dropout, straight through and resumed before and after the boundary."""
    settings: dict[str, Any] = {"rate": 0.1, "qat_optimizer": "adamw"}
    whole = trainer_of("whole", processes, save_strategy="steps", save_steps=2, **settings)
    whole.train()
    found = {"whole": weights_of(whole.model)}
    for step in (2, 6):
        torch.manual_seed(100 * rank + step)
        again = trainer_of("again", processes, **settings)
        again.train(resume_from_checkpoint=str(ROOT / f"whole-{processes}" / f"checkpoint-{step}"))
        found[f"resumed at {step}"] = weights_of(again.model)
    return found


def broken(rank: int, processes: int) -> dict[str, Any]:
    """Data that are NaN on one rank stop all ranks at the same step, with the same error."""
    trainer = trainer_of("broken", processes, max_steps=20)
    real = trainer.distiller.step

    def step(*args: Any, **options: Any) -> Any:
        out = real(*args, **options)
        if rank == 1 and trainer.state.global_step == 2:
            out.loss.data.fill_(float("nan"))
        return out

    trainer.distiller.step = step
    try:
        trainer.train()
    except NonFiniteLossError as error:
        return {"error": str(error), "step": trainer.state.global_step}
    return {}


def refused(rank: int, processes: int) -> dict[str, Any]:
    found = {}
    for setting in (
        {"ddp_find_unused_parameters": False},
        {"ddp_static_graph": True},
        {"fsdp": True},
    ):
        try:
            trainer_of("refused", processes, **setting)
        except TutelageError as error:
            found[next(iter(setting))] = str(error)
    student, teacher = pair("bert")
    fully_shard(student.bert.encoder.layer[1], mesh=init_device_mesh("cpu", (2,)))
    try:
        Distiller(student, teacher).step(part(0, 2))
    except TutelageError as error:
        found["a part"] = str(error)
    return found


CASES: dict[str, tuple[Callable[..., dict[str, Any]], tuple[int, ...]]] = {
    "gradients": (gradients, (1, 2)),
    "sharded_gradients": (sharded_gradients, (2,)),
    "sharded_training": (sharded_training, (1, 2)),
    "sharded_bf16": (sharded_bf16, (2,)),
    "training": (training, (1, 2)),
    "accumulated": (accumulated, (2,)),
    "averaged": (averaged, (1, 2)),
    "bf16": (bf16, (2,)),
    "resumed": (resumed, (2,)),
    "broken": (broken, (2,)),
    "refused": (refused, (2,)),
}


# In processes of their own: accelerate's state is changed.
APART = {"sharded_trainer": (sharded_trainer, (2,))}


def child(rank: int, processes: int, names: list[str]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(processes),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=(ROOT / "port").read_text(),
    )
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if processes == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            os.environ.pop(name)
    else:
        torch.distributed.init_process_group("gloo")
    for name in names:
        found = {**CASES, **APART}[name][0](rank, processes)
        torch.save(found, ROOT / f"{name}-{processes}-{rank}.pt")
    if processes > 1:
        torch.distributed.destroy_process_group()


def spawn(processes: int, cases: dict[str, Any]) -> None:
    names = [name for name, (_, counts) in cases.items() if processes in counts]
    children = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                child(rank, processes, names)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(pid)
    while children:
        pid, status = os.wait()
        children.remove(pid)
        if status:
            for other in children:  # it would wait for the one that failed
                os.kill(other, signal.SIGKILL)
            sys.exit(f"a process of {processes} failed")


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*fork.*")
    torch.set_num_threads(1)
    spawn(1, CASES)
    spawn(2, CASES)
    spawn(2, APART)
