"""One picture a task: metric against time, metric against parameters, and widths over time."""

from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import CONTENDERS, REFERENCE

MARKERS = "osD^v<>PX*hdp"


def draw(path: Path, task: Mapping[str, Mapping[int, dict[str, Any]]], metric: str) -> None:
    """Write the picture; a point is a contender's median over seeds, the line joins those that none surpasses."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, cost, label in ((left, "wall_s", "wall seconds"), (middle, "parameters", "parameters")):
        points(axes, task, cost)
        axes.set(xscale="log", xlabel=label, ylabel=metric, title=f"{metric} against {label}")
    widths(right, task)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize="small")
    figure.savefig(path, dpi=80)


def points(axes: Axes, task: Mapping[str, Mapping[int, dict[str, Any]]], cost: str) -> None:
    found = []
    for name, marker in zip(CONTENDERS, cycle(MARKERS), strict=False):
        if runs := list(task.get(name, {}).values()):
            found.append((median(run[cost] for run in runs), median(run["metric"] for run in runs)))
            axes.plot(*found[-1], marker, label=name, markersize=9 if name == REFERENCE else 6)
    axes.plot(*zip(*front(found), strict=True), color="grey", linewidth=0.8, zorder=0)


def front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those (cost, metric) for which no other has less cost and no less metric, by cost."""
    best: list[tuple[float, float]] = []
    for cost, metric in sorted(points, key=lambda point: (point[0], -point[1])):
        if not best or metric > best[-1][1]:
            best.append((cost, metric))
    return best


def widths(axes: Axes, task: Mapping[str, Mapping[int, dict[str, Any]]]) -> None:
    """Each group's width over the steps of the first seed's run with apoptosis."""
    axes.set(title="widths over time, apoptosis", xlabel="step", ylabel="neurons")
    runs = task.get(REFERENCE, {})
    events = runs[min(runs)]["events"] if runs else []
    if not events:
        axes.text(0.5, 0.5, "no event", ha="center", transform=axes.transAxes)
        return
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")
    steps = [0, *(event["step"] for event in events)]
    for name, full in events[0]["widths_before"].items():
        kept = [full, *(event["widths_after"][name] for event in events)]
        if len(set(kept)) > 1:
            axes.step(steps, kept, where="post", marker=".", label=name)
    if len(axes.lines) <= 8:
        axes.legend(fontsize="small")
