"""Plots of a study: convergence, and the figure over the learning rate."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from pathlib import Path
from typing import Any

from ._summary import Summary, Variant

__all__ = ["plots_missing", "write_plots"]


def plots_missing() -> str:
    """Returns why no plots can be drawn, empty where they can."""
    if importlib.util.find_spec("matplotlib") is None:
        return "no plots: matplotlib is missing; install tutelage[study]."
    return ""


def write_plots(summary: Summary, folder: Path) -> None:
    """Draws one figure a task, scheme and budget: KL over steps, and KL over the learning rate.

    Args:
        summary: The comparison.
        folder: Where ``TASK_SCHEME_STEPS.png`` go.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    best = {
        (f.best.task, f.best.scheme, f.best.steps, f.best.method): f for f in summary.comparisons
    }
    groups: dict[tuple[str, str, int], list[Variant]] = defaultdict(list)
    for variant in summary.variants:
        if variant.steps and variant.kl is not None:
            groups[variant.task, variant.scheme, variant.steps].append(variant)
    methods = list(dict.fromkeys(v.method for v in summary.variants))
    colours: Any = mpl.colormaps["tab10" if len(methods) <= 10 else "tab20"]
    for (task, scheme, steps), variants in groups.items():
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        by_method: dict[str, list[Variant]] = defaultdict(list)
        for variant in variants:
            by_method[variant.method].append(variant)
        for name, found in by_method.items():
            colour = colours(methods.index(name) % colours.N)
            top = best.get((task, scheme, steps, name))
            if top is not None:
                rate = top.best.learning_rate
                label = name if rate is None else f"{name} (lr {rate:g})"
                left.plot(*zip(*top.best.curve, strict=True), color=colour, label=label, marker=".")
            rated = sorted((v.learning_rate, v.kl, v.kl_spread) for v in found if v.learning_rate)
            if rated:
                rates, values, spreads = zip(*rated, strict=True)
                right.errorbar(rates, values, spreads, color=colour, label=name, marker=".")
        left.set(xlabel="steps", title="convergence, each method at its best rate")
        right.set(xlabel="learning rate", xscale="log", title=f"after {steps} steps")
        for axis in (left, right):
            axis.set(ylabel="KL(teacher || student), nats", yscale="log")
            axis.grid(visible=True, alpha=0.3)
        left.legend(fontsize="small")
        figure.suptitle(f"{task}, {scheme}, {steps} steps")
        name = "_".join((task, scheme, str(steps))).replace(" ", "-")
        figure.savefig(folder / f"{name}.png", dpi=120)
