"""Tests of apoptorch.report."""

import io
import os
import subprocess
import sys

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from apoptorch.plan import Event
from apoptorch.report import Record, history_table, write_html
from apoptorch.report.figures import plot_metric, plot_widths, save_comparison


def event(step, before, after, rolled_back=False, reason=None):
    return Event(
        step=step,
        changes=(),
        widths_before=before,
        widths_after=after,
        parameters_before=10_000,
        parameters_after=2_500,
        flops_before=2e4,
        flops_after=5e3,
        seconds=0.25,
        budget=1e-3,
        predicted=5e-4,
        measured=None,
        bound=None,
        certificate=None,
        rolled_back=rolled_back,
        reason=reason,
    )


@pytest.fixture
def history():
    full, half = {"1": 64, "3": 32, "5": 10}, {"1": 16, "3": 24, "5": 10}
    return [event(10, full, half), event(20, half, half, rolled_back=True, reason="loss rose by 0.2")]


def test_table_has_one_row_per_event_and_says_what_was_undone(history):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(history_table(history))
    removed, undone = (line for line in console.export_text().splitlines() if "2,500" in line)
    assert "16 24 10" in removed
    assert "removed 56" in removed
    assert "+5.0e-04" in removed
    assert "undone: loss rose by 0.2" in undone


def test_widths_are_drawn_as_steps_from_the_full_width_to_the_end_of_the_run(history):
    axes = Figure().subplots()
    plot_widths(axes, history, total_steps=30)
    first, cross = axes.lines[0], axes.lines[1]
    assert first.get_xdata().tolist() == [0, 10, 20, 30]
    assert first.get_ydata().tolist() == [64, 16, 16, 16]
    assert list(cross.get_xdata()) == [20]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["1", "3"]


def test_metric_curves_keep_their_points():
    axes = Figure().subplots()
    plot_metric(axes, {"dense": [(1.0, 0.5), (2.0, 0.7)], "apoptosis": [(0.5, 0.6)]}, "AUC")
    assert [line.get_label() for line in axes.lines] == ["dense", "apoptosis"]
    assert list(axes.lines[0].get_xdata()) == [1.0, 2.0]
    assert axes.get_ylabel() == "AUC"


@pytest.mark.parametrize("events", [0, 2])
def test_picture_is_written_also_when_nothing_happened(tmp_path, history, events):
    save_comparison(tmp_path / "run.png", history[:events], {"dense": [(1.0, 0.5)]})
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("events", [0, 2])
def test_html_page_needs_nothing_else_and_escapes_what_it_quotes(tmp_path, history, events):
    write_html(Record(history[:events], {"3": "32 -> 24 <channels>"}), tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert "src=" not in page
    assert "http" not in page
    assert "&lt;channels&gt;" in page
    assert ("loss rose by 0.2" in page) == ("<svg" in page) == (events == 2)
    assert ("10,000 parameters before, 2,500 after 2 events, 1 of them undone" in page) == (events == 2)


def test_the_core_imports_neither_rich_nor_matplotlib():
    code = "import sys, apoptorch; assert not {'rich', 'matplotlib', 'apoptorch.report'} & set(sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
