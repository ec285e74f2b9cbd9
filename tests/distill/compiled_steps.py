"""Steps of a compiled student beside those of the same student as it is.

In a process without the checks of shapes, which torch.compile cannot trace.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters

import tutelage
from tutelage.intervention import stages


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Sentences of random tokens."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(index)
        ids = torch.randint(1, 64, (8,), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[0] % 3}


def pair(layers: int) -> tuple[nn.Module, nn.Module]:
    """Returns a student and its teacher; dropout is off, since compiled code draws otherwise."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    teacher = transformers.BertForSequenceClassification(config)
    return tutelage.prepare(copy.deepcopy(teacher), tutelage.Scheme.preset("ternary-a8")), teacher


def batch(index: int) -> dict[str, Tensor]:
    """Returns a batch."""
    ids = torch.randint(1, 64, (4, 8), generator=torch.Generator().manual_seed(index))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def steps(backend: str, names: list[str], count: int) -> dict[str, Any]:
    """Trains through the stages, twice each where compiled code must be found again."""
    losses: list[list[float]] = []
    for compiled in (False, True):
        student, teacher = pair(layers=1)
        model = torch.compile(student, backend=backend) if compiled else student
        if backend == "eager":
            with torch.no_grad():
                model(**batch(0))  # compiled before anything is known of stages
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
        step = tutelage.TrainStep(tutelage.Distiller(student, teacher), optimizer)
        losses.append([])
        for index in range(count):
            stage = names[index * len(names) // count]
            losses[-1].append(step(batch(index), stage, model=model)["loss"].item())
        graphs = counters["stats"]["unique_graphs"]
        for index, stage in enumerate(names):
            step(batch(index), stage, model=model)
    plain, other = losses
    return {
        "largest": max(abs(a - b) / abs(a) for a, b in zip(plain, other, strict=True)),
        "moved": abs(plain[0] - plain[-1]),
        "graphs": graphs,
        "anew": counters["stats"]["unique_graphs"] - graphs,
        "breaks": sum(counters["graph_break"].values()),
    }


def trainer(backend: str, **_: Any) -> dict[str, Any]:
    """Trains with ``QATTrainer``, evaluation between the steps included."""
    found = []
    for compiled in (False, True):
        student, teacher = pair(layers=1)
        with tempfile.TemporaryDirectory() as folder:
            args = tutelage.QATArguments(
                folder,
                max_steps=9,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                eval_strategy="steps",
                eval_steps=2,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                **({"torch_compile": True, "torch_compile_backend": backend} if compiled else {}),
            )
            made = tutelage.QATTrainer(
                student,
                teacher,
                args=args,
                schedule=tutelage.Schedule.gradual(6),
                train_dataset=Rows(),
                eval_dataset=Rows(),
            )
            made.train()
            losses = [row["eval_loss"] for row in made.state.log_history if "eval_loss" in row]
        found.append((losses, student.state_dict()))
    (plain, weights), (other, compiled_weights) = found
    return {
        "evaluations": len(plain),
        "losses": plain == other,
        "names": list(weights) == list(compiled_weights),
        "weights": all(torch.equal(weights[n], compiled_weights[n]) for n in weights),
        "graphs": counters["stats"]["unique_graphs"],
    }


def main() -> None:
    """Prints a JSON object."""
    torch.set_num_threads(1)
    what, backend = sys.argv[1:3]
    if what == "trainer":
        print(json.dumps(trainer(backend)))
    else:
        names = ["context"] if backend == "inductor" else list(stages())
        print(json.dumps(steps(backend, names, 100)))


if __name__ == "__main__":
    main()
