"""Figures of weights: curvature, loss surface, oscillation, thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._style import COLOURS, Data, figure_of, histogram_bins, short_names, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_latents", "draw_oscillation", "draw_sharpness", "draw_surface", "fill_surface"]


def draw_sharpness(data: Data) -> Figure:
    """Draws a histogram of the top Hessian eigenvalue of every sample.

    Args:
        data: Of ``sharpness.json``.
    """
    import numpy as np

    values = [value for sample in data["per_sample"] for value in sample]
    batch, trace = data["batch"][0]["value"], data["trace"]
    figure = figure_of(7.5, 4.4)
    axis = figure.subplots()
    edges = np.histogram_bin_edges([*values, batch], bins=histogram_bins(len(values)))
    axis.hist(values, bins=edges, color=COLOURS[0], edgecolor="white", label="one sample each")
    axis.axvline(batch, color=COLOURS[1], ls="--", label=f"all samples together: {batch:.3g}")
    axis.axvline(0, color="black", lw=0.8)
    axis.set(xlabel="Hessian eigenvalue of largest magnitude", ylabel="samples")
    axis.set_title(f"trace of the whole: {trace['value']:.3g} ± {trace['error']:.2g}")
    axis.yaxis.get_major_locator().set_params(integer=True)
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def fill_surface(axis: Any, surface: Data, levels: Sequence[float] | int = 12) -> Any:
    """Draws a loss surface into axes and returns its filled contours.

    Args:
        axis: Matplotlib axes.
        surface: ``steps`` and ``losses``.
        levels: Of the contours.
    """
    import numpy as np

    values = np.array(
        [[np.nan if v is None else v for v in row] for row in surface["losses"]], dtype=float
    )
    steps = surface["steps"]
    grid = np.ma.masked_invalid(values.T)
    drawn = axis.contourf(steps, steps, grid, levels=levels, cmap="viridis")
    style = {"levels": drawn.levels[::2], "colors": "white", "linewidths": 0.7}
    lines = axis.contour(steps, steps, grid, **style)
    axis.clabel(lines, fontsize=8, fmt="%.3g")
    axis.plot(0, 0, "+", color="red", markersize=12, markeredgewidth=2)
    axis.set(xlabel="first direction, row lengths", ylabel="second direction, row lengths")
    axis.set_aspect("equal")
    return drawn


def draw_surface(data: Data) -> Figure:
    """Draws the loss around the student's weights.

    Args:
        data: Of ``surface.json``.
    """
    figure = figure_of(6, 5)
    axis = figure.subplots()
    drawn = fill_surface(axis, data)
    figure.colorbar(drawn, ax=axis, label="distillation loss")
    axis.set_title("loss around the weights (+)")
    return figure


def draw_oscillation(data: Data) -> Figure:
    """Draws flips and oscillations over the steps, and where they are frequent.

    Args:
        data: Of ``oscillation.json``.
    """
    import numpy as np

    layers = data["layers"]
    figure = figure_of(12, max(4.4, 0.17 * len(layers) + 1.2))
    left, right = figure.subplots(1, 2)
    weights = np.array([layer["weights"] for layer in layers], dtype=float)
    for key, label, colour in (
        ("flipped", "code changed", COLOURS[0]),
        ("oscillated", "code changed back", COLOURS[1]),
    ):
        shares = 100 * np.array([layer[key] for layer in layers])
        steps = np.arange(1, shares.shape[1] + 1)
        left.plot(steps, weights @ shares / weights.sum(), color=colour, label=f"{label}, mean")
        left.fill_between(
            steps,
            shares.min(0),
            shares.max(0),
            color=colour,
            alpha=0.2,
            label="lowest to highest layer",
        )
    left.set(xlabel="training step", ylabel="weights, %", title="in every step")
    left.set_ylim(bottom=0)
    whole_numbers(left, shares.shape[1])
    left.grid(visible=True, alpha=0.3)
    left.legend(fontsize="small")
    names = short_names([layer["layer"] for layer in layers])
    places = np.arange(len(layers))
    for key, label, colour, marker, size in (
        ("ever", "changed at least once", COLOURS[0], "o", 8),
        ("moved", "last code is not the first", COLOURS[2], "^", 5),
        ("frequent", "frequency of oscillation above 0.005", COLOURS[1], "s", 4),
    ):
        values = [100 * layer[key] for layer in layers]
        hollow = "none" if size == 8 else "full"
        right.plot(values, places, marker, color=colour, label=label, ms=size, fillstyle=hollow)
    right.set_yticks(places, names, fontsize=7)
    right.invert_yaxis()
    right.set(xlabel="weights, %", title="over the whole training")
    right.set_xlim(left=0)
    right.grid(visible=True, alpha=0.3)
    _legend_below(right)
    return figure


def draw_latents(data: Data) -> Figure:
    """Draws distances to thresholds before and after training, and the codes of every layer.

    Args:
        data: Of ``latents.json``.
    """
    import numpy as np

    figure = figure_of(12, max(4.4, 0.17 * len(data["last"]) + 1.2))
    left, right = figure.subplots(1, 2)
    edges = np.array(data["edges"])
    for key, label, colour, style in (
        ("first", "before the first step", COLOURS[0], "--"),
        ("last", "after the last step", COLOURS[1], "-"),
    ):
        known = [layer for layer in data[key] if layer["distances"]]
        if known:
            weights = np.array([layer["weights"] for layer in known], dtype=float)
            shares = 100 * np.array([layer["distances"] for layer in known])
            mean = weights @ shares / weights.sum()
            left.stairs(mean, edges, color=colour, ls=style, lw=1.8, label=label)
    left.set(
        xlabel="distance to the nearest threshold, in scales of the row",
        ylabel=f"weights in a bin of {edges[1] - edges[0]:g}, %",
        title="latent weights",
    )
    left.grid(visible=True, alpha=0.3)
    left.legend(fontsize="small")
    names = short_names([layer["layer"] for layer in data["last"]])
    codes = list(data["last"][0]["codes"])
    start = np.zeros(len(names))
    for place, code in enumerate(codes):
        values = np.array([100 * layer["codes"].get(code, 0.0) for layer in data["last"]])
        right.barh(names, values, left=start, color=COLOURS[place], label=f"code {code}")
        start = start + values
    right.set_ylim(len(names) - 0.5, -0.5)
    right.tick_params(axis="y", labelsize=7)
    right.set(xlabel="weights, %", title="codes after the last step", xlim=(0, 100))
    _legend_below(right)
    return figure


def _legend_below(axis: Any) -> None:
    axis.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.4, 1.06), ncols=4)
