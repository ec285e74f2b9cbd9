"""Figures of signals: errors by block and stage, ranges of activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._style import COLOURS, MARKERS, Data, figure_of, whole_numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_activations", "draw_blocks", "draw_stages", "stage_label"]


def draw_blocks(data: Data) -> Figure:
    """Draws the error of every block, and the KL of every attention head.

    Args:
        data: Of ``blocks.json``.
    """
    blocks = data["blocks"]
    figure = figure_of(11, 4.2)
    left, right = figure.subplots(1, 2)
    sites = list(dict.fromkeys(site for block in blocks for site in block["signals"]))
    for place, site in enumerate(sites):
        found = [block["signals"].get(site) for block in blocks]
        points = [(i, error["relative"]) for i, error in enumerate(found) if error]
        style = {"marker": MARKERS[place], "color": COLOURS[place], "markersize": 5}
        left.plot(*zip(*points, strict=True), label=site.replace("_", " "), **style)
    left.set(xlabel="block", ylabel="squared error / squared norm of the teacher's")
    left.set_ylim(bottom=0)
    whole_numbers(left, len(blocks))
    left.grid(visible=True, alpha=0.3)
    left.legend(fontsize="small")
    heads = [block["attention_kl"] for block in blocks]
    widest = max(map(len, heads))
    if widest:
        padded = [[*row, *[float("nan")] * (widest - len(row))] for row in heads]
        image = right.imshow(padded, aspect="auto", cmap="viridis", vmin=0)
        figure.colorbar(image, ax=right, label="KL(teacher || student), nats")
        right.set(xlabel="head", ylabel="block", title="attention maps")
        whole_numbers(right, widest)
        whole_numbers(right, len(heads), "y")
    else:
        right.text(0.5, 0.5, "attention maps are out of reach", ha="center", va="center")
        right.set_axis_off()
    left.set_title("inner signals")
    return figure


def draw_stages(data: Data) -> Figure:
    """Draws the error of every block on its own and under every stage, marked as assisted.

    Args:
        data: Of ``stages.json``.
    """
    figure = figure_of(7.5, 4.4)
    axis = figure.subplots()
    for place, stage in enumerate(data["stages"]):
        label = stage_label(stage["stage"]) + (" (ASSISTED)" if stage["assisted"] else "")
        style = "--" if stage["assisted"] else "-"
        axis.plot(
            stage["mse"], style, marker=MARKERS[place], color=COLOURS[place], label=label, ms=5
        )
    axis.set(xlabel="block", ylabel="mean squared error of the block's output")
    axis.set_ylim(bottom=0)
    whole_numbers(axis, len(data["stages"][0]["mse"]))
    axis.grid(visible=True, alpha=0.3)
    axis.legend(fontsize="small")
    axis.set_title("error against the teacher, with its signals stepping in")
    return figure


def stage_label(stage: str) -> str:
    """Returns how a figure names a stage.

    Args:
        stage: Its name.
    """
    return "no intervention" if stage == "none" else stage.replace("_", " ")


def draw_activations(data: Data) -> Figure:
    """Draws ranges of teacher and student by site, and the codes that the student uses.

    Args:
        data: Of ``activations.json``.
    """
    ranges = data["ranges"]
    sites = list(dict.fromkeys(entry["site"] for entry in ranges))
    columns = 4
    rows = -(-len(sites) // columns)
    figure = figure_of(12, 2.6 * rows + 3.2)
    upper, lower = figure.subfigures(2, 1, height_ratios=[2.6 * rows, 3.2])
    axes = upper.subplots(rows, columns, squeeze=False, sharex=True).flat
    for axis, site in zip(axes, sites, strict=False):
        found = [entry for entry in ranges if entry["site"] == site]
        for which, colour, marker in (
            ("teacher", COLOURS[0], "o"),
            ("student", COLOURS[1], "s"),
        ):
            style = {"color": colour, "marker": marker, "markersize": 4}
            largest = [entry[which]["largest"] for entry in found]
            most = [entry[which]["percentile"] for entry in found]
            axis.plot(largest, label=f"{which}, largest", **style)
            axis.plot(most, "--", label=f"{which}, 99.9th percentile", fillstyle="none", **style)
        axis.set_title(site.replace("_", " "))
        _scale(axis, [entry[w][k] for entry in found for w, k in _RANGES])
        axis.grid(visible=True, alpha=0.3)
        whole_numbers(axis, len(found))
    for axis in list(axes)[len(sites) :]:
        axis.set_axis_off()
    upper.supxlabel("block", fontsize="medium")
    upper.supylabel("magnitude", fontsize="medium")
    handles, labels = upper.axes[0].get_legend_handles_labels()
    upper.legend(handles, labels, loc="outside upper center", ncols=4, fontsize="small")
    blocks = list(dict.fromkeys(entry["block"] for entry in ranges))
    for axis, key, title in zip(
        lower.subplots(1, 2),
        ("zeros", "used"),
        ("codes that are zero, %", "codes of the grid that occur, %"),
        strict=True,
    ):
        cells = {(e["site"], e["block"]): e[key] for e in ranges if e[key] is not None}
        table = [[100 * cells.get((s, b), float("nan")) for b in blocks] for s in sites]
        _heat(axis, table, [s.replace("_", " ") for s in sites], title)
    return figure


_RANGES = [(which, key) for which in ("teacher", "student") for key in ("largest", "percentile")]


def _scale(axis: Any, values: list[float]) -> None:
    from matplotlib.ticker import NullFormatter

    if max(values) > 50 * min(values) > 0:
        axis.set_yscale("log")
        axis.yaxis.set_minor_formatter(NullFormatter())
    else:
        axis.set_ylim(bottom=0)


def _heat(axis: Any, table: list[list[float]], names: list[str], title: str) -> None:
    axis.imshow(table, aspect="auto", cmap="cividis", vmin=0, vmax=100)
    axis.set(xlabel="block", title=title)
    axis.set_yticks(range(len(names)), names, fontsize="small")
    whole_numbers(axis, len(table[0]))
    if len(table[0]) > 16:
        return
    for row, values in enumerate(table):
        for column, value in enumerate(values):
            if value == value:
                colour = "black" if value > 55 else "white"
                axis.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8
                )
