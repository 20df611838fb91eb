"""A history as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from apoptorch.plan import Event


def plot_widths(axes: Axes, history: Sequence[Event], total_steps: int | None = None) -> None:
    """Draw the width of every channel group that changed over the steps; a cross marks an event that was undone."""
    axes.set(title="widths", xlabel="step", ylabel="neurons")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter("{x:.0f}")
    if not history:
        axes.text(0.5, 0.5, "no event", ha="center", transform=axes.transAxes)
        return
    end = total_steps or history[-1].step
    steps = [0, *(event.step for event in history), end]
    for name, full_width in history[0].widths_before.items():
        widths = [full_width, *(event.widths_after[name] for event in history)]
        if len(set(widths)) == 1:
            continue
        (line,) = axes.step(steps, [*widths, widths[-1]], where="post", label=name)
        undone = [(event.step, event.widths_after[name]) for event in history if event.rolled_back]
        if undone:
            axes.plot(*zip(*undone, strict=True), "x", color=line.get_color())
    if axes.lines:
        axes.legend(title="group", fontsize="small")


def plot_metric(axes: Axes, curves: Mapping[str, Sequence[tuple[float, float]]], metric: str = "metric") -> None:
    """Draw (wall seconds, metric) of several runs over the same axis."""
    axes.set(title=metric, xlabel="wall seconds", ylabel=metric)
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=name)
    axes.legend()


def save_comparison(
    path: str | Path,
    history: Sequence[Event],
    curves: Mapping[str, Sequence[tuple[float, float]]],
    metric: str = "metric",
    total_steps: int | None = None,
) -> None:
    """Write a picture: widths over the steps beside the metric of every run over its wall seconds."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot_widths(left, history, total_steps)
    plot_metric(right, curves, metric)
    figure.savefig(path, dpi=150)
