"""The figures of Kim et al. (arXiv 2302.11812) on a study's own task, as PNG and JSON.

    tutelage compare STUDY.yaml
    python benchmarks/paper_figures.py STUDY.yaml [key=value ...] --output FOLDER

Figure 1 reads the study's records. The others train students on its first task, scheme and seed,
with the largest budget (or ``--steps``): plain distillation (``full-kd``, in the place of
TernaryBERT), TI-O, TI-M and TI-G. Where the published text does not pin a figure down, ``FIGURES``
in ``paper_drawings.py`` says what it was taken to be.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from paper_drawings import FIGURES, entry
from transformers import TrainerCallback

import tutelage
from tutelage.distill import Distiller
from tutelage.nn import ramped
from tutelage.study import load_study, loss_surface, sharpness, stage_errors, summary_of
from tutelage.study._evaluation import AssistedCurve, Curve
from tutelage.study._folder import spaced
from tutelage.study._grid import Cell, cells, evaluation_steps
from tutelage.study._output import write_entry
from tutelage.study._records import Records
from tutelage.study._worker import task_of, train_cell
from tutelage.train._plan import make_losses, make_schedule

KD, ORDER = "full-kd", ("full-kd", "ti-o", "ti-m", "ti-g")
NEEDED = {
    "1": (),
    "2a": (KD, "ti-g"),
    "2b": (KD, "ti-g"),
    "3c": (KD, "ti-o on", "ti-m on"),
    "4a": ORDER,
    "4b": ORDER,
    "5": (KD, "ti-g"),
}


class LossLog(TrainerCallback):
    """Keeps the logits term of the loss, a mean over the steps since the last entry."""

    def __init__(self, every: int) -> None:
        self.every, self.entries = every, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.logging_steps = self.every

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "loss_logits" in logs:
            self.entries.append((state.global_step, logs["loss_logits"]))


class Lifting(TrainerCallback):
    """Keeps the errors of the student on its own when the teacher has just stopped stepping in."""

    def __init__(self, teacher: Any, batches: list[Any], step: int) -> None:
        self.teacher, self.batches, self.step = teacher, batches, step
        self.mse: tuple[float, ...] | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            student = kwargs["model"].eval()
            distiller = Distiller(student, self.teacher)
            (found,) = stage_errors(distiller, self.batches, ["none"])
            self.mse = found.mse


class Case:
    """One task, scheme and seed, and its trained students by method."""

    def __init__(self, args: argparse.Namespace, study: Any) -> None:
        self.args = args
        self.steps = args.steps or max(study.budgets)
        study = study.model_copy(
            update={
                "schemes": study.schemes[:1],
                "budgets": [self.steps],
                "seeds": study.seeds[:1],
                "learning_rates": study.learning_rates[:1],
                "tasks": dict(list(study.tasks.items())[:1]),
                "methods": {name: {"base": name} for name in ORDER},
            }
        )
        self.cells = {cell.method: cell for cell in cells(study)}
        self.task = task_of(self.cells[KD])
        self.batches = self._batches(self.task.plan.eval, args.examples)
        self.found: dict[str, dict[str, Any]] = {}

    def _batches(self, data: Any, count: int, size: int = 32) -> list[dict[str, Any]]:
        rows = sorted(spaced(len(data), count), key=data.length)
        collate = self.task.plan.task.collator(self.task.plan.processor)
        parts = [rows[i : i + size] for i in range(0, len(rows), size)]
        made = [dict(collate([data[row] for row in part])) for part in parts]
        return [{k: v for k, v in batch.items() if k != "labels"} for batch in made]

    def samples(self, size: int) -> list[dict[str, Any]]:
        """Returns training examples for curvature and surfaces."""
        return self._batches(self.task.plan.train, self.args.samples, size)

    def cell(self, name: str) -> Cell:
        """Returns the run of a method; "NAME on" keeps its stage on to the end."""
        found = self.cells[name.removesuffix(" on")]
        if not name.endswith(" on"):
            return found
        section = found.recipe.schedule.model_copy(update={"steps": self.steps})
        recipe = found.recipe.model_copy(update={"schedule": section})
        return Cell(**{**vars(found), "recipe": recipe})

    def train(self, name: str, curves: bool) -> dict[str, Any]:
        """Trains a student once and keeps what figures need of its training."""
        if name in self.found:
            return self.found[name]
        cell, start = self.cell(name), time.monotonic()
        schedule = make_schedule(cell.recipe)
        at = evaluation_steps(self.steps, self.args.curve)
        log = LossLog(max(1, self.steps // 20))
        lifting = Lifting(self.task.teacher, self.batches, schedule.steps)
        watchers: list[Any] = [log, lifting]
        if curves:
            plain = Curve(self.task.evaluator, at)
            assisted = AssistedCurve(self.task.evaluator, at, self.task.teacher, schedule)
            watchers += [plain] if name == KD else [plain, assisted]
        student = train_cell(cell, watchers)
        found: dict[str, Any] = {
            "student": student,
            "distiller": Distiller(student, self.task.teacher, make_losses(cell.recipe.student)),
            "intervention": schedule.steps,
            "loss": log.entries,
            "lifted": lifting.mse,
        }
        if curves:
            found["plain"] = [(p.step, p.metric, p.kl) for p in plain.points]
            found["assisted"] = [(p.step, p.metric, p.kl) for p in assisted.points]
        found["last"] = stage_errors(found["distiller"], self.batches, ["none"])[0].mse
        self.found[name] = found
        print(f"{name}: {self.steps} steps, {time.monotonic() - start:.0f} s", flush=True)
        return found

    def surface(self, model: Any, distiller: Distiller) -> dict[str, Any]:
        """Returns the distillation loss around a model's weights."""
        data = self.samples(self.args.samples)

        def loss() -> float:
            with torch.no_grad():
                return sum(float(distiller.step(batch).loss) for batch in data) / len(data)

        return loss_surface(model, loss, points=self.args.points).to_dict()

    def full_precision(self) -> dict[str, Any]:
        """Returns the surface of the full-precision model under the same loss."""
        scheme = tutelage.Scheme.preset(self.cells[KD].scheme)
        model = tutelage.prepare(copy.deepcopy(self.task.teacher), scheme)
        model.requires_grad_(True).eval()
        distiller = Distiller(model, self.task.teacher, make_losses(self.cells[KD].recipe.student))
        with ramped(model, torch.zeros(())):
            return self.surface(model, distiller)

    def curvature(self, name: str) -> dict[str, Any]:
        """Returns the Hessian eigenvalues of a student."""
        found = sharpness(
            self.found[name]["distiller"],
            self.samples(1),
            self.samples(self.args.samples),
            iterations=self.args.iterations,
            probes=8,
        )
        return found.to_dict()


def data_of(figure: str, case: Case, study: Any) -> dict[str, Any]:
    """Measures what a figure shows."""
    if figure == "1":
        return over_time(study)
    trained = {name: case.train(name, figure == "3c") for name in NEEDED[figure]}
    first = case.cells[KD]
    common = {"task": first.task, "scheme": first.scheme, "steps": case.steps, "seed": first.seed}
    if figure == "2a":
        surfaces = {"full precision": case.full_precision()}
        surfaces |= {n: case.surface(t["student"], t["distiller"]) for n, t in trained.items()}
        return {**common, "examples": case.args.samples, "surfaces": surfaces}
    if figure == "5":
        found = {name: case.curvature(name) for name in trained}
        return {**common, "examples": case.args.samples, "methods": found}
    keys = {
        "2b": ("last",),
        "3c": ("plain", "assisted"),
        "4a": ("loss", "intervention"),
        "4b": ("lifted", "last", "intervention"),
    }[figure]
    evaluator = case.task.evaluator
    return {
        **common,
        "metric": evaluator.metric,
        "teacher": evaluator.teacher,
        "methods": {name: {key: found[key] for key in keys} for name, found in trained.items()},
    }


def over_time(study: Any) -> dict[str, Any]:
    """Reads metric and wall time of every method and budget from the records of a study."""
    folder = Path(study.output)
    summary, records = summary_of(folder), Records(folder)
    first = next(iter(study.tasks)), study.schemes[0]
    seconds: dict[tuple[str, int], list[float]] = {}
    for cell in cells(study):
        if cell.key in records and (cell.task, cell.scheme) == first and cell.steps:
            seconds.setdefault((cell.method, cell.steps), []).append(records[cell.key].seconds)
    methods: dict[str, list[Any]] = {}
    for variant in summary.variants:
        place = variant.method, variant.steps
        if (variant.task, variant.scheme) == first and place in seconds and variant.seeds:
            row = (variant.steps, variant.metric, variant.metric_spread, variant.kl)
            methods.setdefault(variant.method, []).append(row)
    shortest = min(row[0] for found in methods.values() for row in found)
    return {
        "task": first[0],
        "scheme": first[1],
        "metric": summary.metrics[first[0]],
        "teacher": summary.teachers[first[0]],
        "methods": {
            name: [
                {
                    "steps": steps,
                    "relative_time": steps / shortest,
                    "seconds": seconds[name, steps],
                    "metric": metric,
                    "spread": spread,
                    "kl": kl,
                }
                for steps, metric, spread, kl in sorted(found)
            ]
            for name, found in methods.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/figures"))
    parser.add_argument("--figures", nargs="+", choices=list(FIGURES), default=list(FIGURES))
    parser.add_argument("--steps", type=int, help="default: the study's largest budget")
    parser.add_argument("--curve", type=int, default=4, help="evaluations in a training (3c)")
    parser.add_argument("--examples", type=int, default=128, help="evaluation examples (2b, 4b)")
    parser.add_argument("--samples", type=int, default=16, help="training examples (2a, 5)")
    parser.add_argument("--points", type=int, default=9, help="of a surface, each way (2a)")
    parser.add_argument("--iterations", type=int, default=15, help="of the power method (5)")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    study = load_study(args.study, args.overrides)
    trained = [figure for figure in args.figures if figure != "1"]
    case = Case(args, study) if trained else None
    # Curves first: what is trained with them serves the other figures, too.
    for figure in sorted(args.figures, key=lambda name: name != "3c"):
        for file in write_entry(entry(figure, data_of(figure, case, study)), args.output, print):
            print(file, flush=True)


if __name__ == "__main__":
    main()
