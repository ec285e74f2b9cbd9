"""How the figures of Kim et al. (arXiv 2302.11812) are drawn, and what each was taken to be.

1: the task's metric over relative fine-tuning time. Time is the number of steps over that of the
shortest budget; the wall seconds of the runs are in the JSON.
2a: the loss along two random filter-normalised directions, -0.5 to 0.5. Which loss is not said:
the distillation loss, which is 0 for the full-precision model at its own weights.
2b: mean squared error of every layer's output against the teacher's.
3c: the metric in training with the intervention never lifted, evaluated with it on. That is
ASSISTED; the student on its own is drawn beside it, and plain distillation as the case without.
4a: the running mean of the loss since the beginning of each of the two steps. The published name is
cross-entropy; here the logits term, KL(teacher || student).
4b: mean squared error of every layer's output. At which point of the training is not said: both
right before the intervention is lifted and at the end, the student on its own.
5: histogram of the Hessian eigenvalue of largest magnitude of single examples; the published one
holds the three largest of each, and a longer budget of distillation as a third panel.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from tutelage.study._output import Entry
from tutelage.study._style import COLOURS, MARKERS, figure_of, histogram_bins, whole_numbers
from tutelage.study._weight_figures import fill_surface

NAMES = {"full-kd": "distillation", "ti-o": "TI-O", "ti-c": "TI-C", "ti-m": "TI-M", "ti-g": "TI-G"}
PLACES = {name: place for place, name in enumerate(NAMES)}


def style(method: str) -> dict[str, Any]:
    """Returns colour and marker of a method, the same in every figure."""
    place = PLACES.get(method.removesuffix(" on"), len(PLACES))
    return {"color": COLOURS[place], "marker": MARKERS[place], "markersize": 5}


def label(method: str) -> str:
    """Returns how a method is named in a figure."""
    plain = method.removesuffix(" on")
    return NAMES.get(plain, plain) + (", never lifted" if method != plain else "")


def finish(axis: Any, **settings: Any) -> None:
    """Sets labels, grid and legend."""
    axis.set(**settings)
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize="small")


def figure_1(data: Mapping[str, Any]) -> Any:
    figure = figure_of(7, 4.4)
    axis = figure.subplots()
    for name, rows in data["methods"].items():
        columns = [[row[key] for row in rows] for key in ("relative_time", "metric", "spread")]
        bars = columns[2] if any(columns[2]) else None
        axis.errorbar(*columns[:2], bars, label=label(name), capsize=3, **style(name))
    if data["teacher"] is not None:
        axis.axhline(data["teacher"], color="black", ls=":", label="teacher")
    axis.set_xscale("log")
    ticks = sorted({row["relative_time"] for rows in data["methods"].values() for row in rows})
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    title = f"{data['task']}, {data['scheme']}"
    finish(axis, xlabel="relative training time", ylabel=data["metric"], title=title)
    return figure


def figure_2a(data: Mapping[str, Any]) -> Any:
    surfaces = data["surfaces"]
    figure = figure_of(4.6 * len(surfaces), 4.4)
    axes = figure.subplots(1, len(surfaces), squeeze=False)[0]
    for axis, (name, surface) in zip(axes, surfaces.items(), strict=True):
        drawn = fill_surface(axis, surface)
        axis.set_title(label(name))
        figure.colorbar(drawn, ax=axis, label="distillation loss", shrink=0.75)
    return figure


def blocks(axis: Any, errors: Mapping[str, Any], title: str) -> None:
    """Draws one error a block for every method."""
    for name, values in errors.items():
        axis.plot(values, label=label(name), **style(name))
    finish(axis, xlabel="block", ylabel="mean squared error of the output", title=title)
    axis.set_ylim(bottom=0)
    whole_numbers(axis, len(next(iter(errors.values()))))


def figure_2b(data: Mapping[str, Any]) -> Any:
    figure = figure_of(6.5, 4.4)
    errors = {name: found["last"] for name, found in data["methods"].items()}
    blocks(figure.subplots(), errors, f"after {data['steps']} steps, no intervention")
    return figure


def figure_3c(data: Mapping[str, Any]) -> Any:
    figure = figure_of(10, 4.6)
    axis = figure.subplots()
    for name, found in data["methods"].items():
        steps, metric, _ = zip(*found["plain"], strict=True)
        axis.plot(steps, metric, label=f"{label(name)}: on its own", **style(name))
        if found["assisted"]:
            steps, metric, _ = zip(*found["assisted"], strict=True)
            text = f"{label(name)}: ASSISTED by the teacher"
            axis.plot(steps, metric, "--", fillstyle="none", label=text, **style(name))
    if data["teacher"] is not None:
        axis.axhline(data["teacher"], color="black", ls=":", label="teacher")
    title = "evaluated with the intervention on (dashed, ASSISTED) and off"
    finish(axis, xlabel="training step", ylabel=data["metric"], title=title)
    axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def running_means(entries: list[Any], border: int) -> list[tuple[int, float]]:
    """Returns the mean of the loss since the beginning of the step that an entry is in."""
    means = []
    total, count, before, second = 0.0, 0, 0, False
    for step, loss in entries:
        if step > border and not second:
            total, count, second = 0.0, 0, True
        total, count = total + loss * (step - before), count + step - before
        means.append((step, total / count))
        before = step
    return means


def figure_4a(data: Mapping[str, Any]) -> Any:
    figure = figure_of(7, 4.4)
    axis = figure.subplots()
    border = max(found["intervention"] for found in data["methods"].values())
    for name, found in data["methods"].items():
        means = running_means(found["loss"], found["intervention"])
        axis.plot(*zip(*means, strict=True), label=label(name), **style(name))
    axis.axvline(border, color="black", ls=":", label="intervention is lifted")
    text = "running mean of KL(teacher || student), nats"
    finish(axis, xlabel="training step", ylabel=text, title=f"{data['task']}, {data['scheme']}")
    axis.set_ylim(bottom=0)
    return figure


def figure_4b(data: Mapping[str, Any]) -> Any:
    figure = figure_of(11, 4.4)
    left, right = figure.subplots(1, 2)
    methods = data["methods"]
    lifted = {name: found["lifted"] for name, found in methods.items() if found["lifted"]}
    border = max(found["intervention"] for found in methods.values())
    blocks(left, lifted, f"after {border} steps, before TI is lifted; on its own")
    last = {name: found["last"] for name, found in methods.items()}
    blocks(right, last, f"after {data['steps']} steps; on its own")
    return figure


def figure_5(data: Mapping[str, Any]) -> Any:
    methods = data["methods"]
    figure = figure_of(7.5, 2.6 * len(methods))
    axes = figure.subplots(len(methods), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    values = {name: list(itertools.chain(*found["per_sample"])) for name, found in methods.items()}
    known = list(itertools.chain(*values.values()))
    edges = np.histogram_bin_edges(known, bins=histogram_bins(len(known)))
    for axis, (name, found) in zip(axes, values.items(), strict=True):
        axis.hist(found, bins=edges, color=style(name)["color"], edgecolor="white")
        trace = methods[name]["trace"]
        top = methods[name]["batch"][0]["value"]
        text = f"all samples together: top {top:.3g}, trace {trace['value']:.3g}"
        axis.set_title(f"{label(name)} ({text} ± {trace['error']:.2g})", fontsize="medium")
        axis.set(ylabel="samples")
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.axvline(0, color="black", lw=0.8)
        axis.grid(visible=True, alpha=0.3)
    axes[-1].set(xlabel="Hessian eigenvalue of largest magnitude")
    return figure


FIGURES = {
    "1": (
        "Metric over training time",
        "The task's metric on evaluation examples after training, over training time relative to "
        "the shortest budget (steps), with no intervention in evaluation. Bars: standard deviation "
        "over seeds. Higher and further left is better.",
        figure_1,
    ),
    "2a": (
        "Loss surfaces",
        "Distillation loss around the weights (cross) of the full-precision model, of a student "
        "trained by plain distillation and of one with gradual Teacher Intervention, along two "
        "random filter-normalised directions; students are quantized anew at every point. Each "
        "panel has its own colours.",
        figure_2a,
    ),
    "2b": (
        "Error over layers",
        "Mean squared error of every block's output against the teacher's after training, with no "
        "intervention, over real tokens of evaluation examples.",
        figure_2b,
    ),
    "3c": (
        "Metric under intervention (assisted)",
        "The task's metric in trainings whose intervention is never lifted. Dashed lines are "
        "ASSISTED: the teacher's signals are in the student's forward pass in evaluation, too. "
        "Full lines are the same students on their own, and plain distillation.",
        figure_3c,
    ),
    "4a": (
        "Loss in training",
        "Running mean of KL(teacher || student) on training batches since the beginning of the "
        "present step of the training. Before the dotted line the intervention is on, and the "
        "figure is assisted.",
        figure_4a,
    ),
    "4b": (
        "Error over layers by stage of intervention",
        "Mean squared error of every block's output against the teacher's, students on their own: "
        "left when the intervention ends, right after the last step.",
        figure_4b,
    ),
    "5": (
        "Hessian eigenvalues",
        "Hessian eigenvalue of largest magnitude, with sign, of the distillation loss of one "
        "training example at a time. Derivatives pass every rounding through the gradient "
        "estimator; embedding tables are left out.",
        figure_5,
    ),
}
"""By number: title, caption, and what draws it."""


def entry(figure: str, data: Mapping[str, Any]) -> Entry:
    """Returns a figure with its data, ready to be written.

    Args:
        figure: Its number in the paper.
        data: What was measured.
    """
    title, caption, draw = FIGURES[figure]
    if "task" in data:
        caption = f"{data['task']}, {data['scheme']}. {caption}"
    return Entry(f"figure_{figure}", title, caption, data, draw)
