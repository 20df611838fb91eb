"""Tests of apoptorch.report."""

import io
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tensorboard.backend.event_processing import event_accumulator
from trainers import POLICY, data, loss_fn, network

from apoptorch import Apoptosis
from apoptorch.plan import Event
from apoptorch.report import LiveView, Record, Recorder, TensorBoard, history_table, write_html
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


@pytest.fixture(scope="module")
def recorded():
    """A real run with a recorder: its sinks' rows, the recorder and the apoptosis."""
    model, rows = network(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = data(960)
    apoptosis = Apoptosis(model, optimizer, example_inputs=x[:32], loss_fn=loss_fn, total_steps=30, policy=POLICY)
    recorder = Recorder(apoptosis, rows.append, every=2)
    for inputs, targets in zip(x.split(32), y.split(32), strict=True):
        loss = loss_fn(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apoptosis.step(inputs, targets=targets)
        recorder.step(loss=loss)
    return rows, recorder, apoptosis


def test_recorder_hands_every_step_and_event_to_its_sinks(recorded):
    rows, recorder, apoptosis = recorded
    assert apoptosis.history
    events = {row["step"]: row for row in rows if "event/seconds" in row}
    assert list(events) == [event.step for event in apoptosis.history]
    first = apoptosis.history[0]
    assert events[first.step]["event/measured"] == first.measured
    assert events[first.step]["parameters"] == first.parameters_after
    assert rows[-1]["width/0"] == apoptosis.groups[0].width
    assert {row["step"] for row in rows} >= set(range(2, 31, 2))
    assert [step for step, _ in recorder.curves["loss"]] == [row["step"] for row in rows]
    assert all(isinstance(value, float) for row in rows for value in row.values())


def test_a_record_is_read_back_as_it_was_written(recorded, tmp_path):
    _, recorder, apoptosis = recorded
    page = recorder.write(tmp_path / "run")
    record = Record.read(page.with_name("history.json"))
    assert record.events == [Event.from_json(event.to_json()) for event in apoptosis.history]
    assert record.curves == recorder.curves
    assert record.explanations.keys() == {group.name for group in apoptosis.groups}
    assert record.architecture["layers"]["0"]["settings"]["out_features"] == apoptosis.groups[0].width


def test_live_view_prints_lines_where_there_is_no_terminal(recorded):
    rows, _, apoptosis = recorded
    console = Console(width=300, file=io.StringIO())
    with LiveView(30, console) as view:
        for row in rows:
            view(row)
    lines = console.file.getvalue().splitlines()
    assert len(lines) > len(apoptosis.history)
    assert f"events {len(apoptosis.history)}" in lines[-1]
    assert "loss" in lines[0]


def test_tensorboard_holds_scalars_and_a_histogram(recorded, tmp_path):
    rows, _, apoptosis = recorded
    board = TensorBoard(tmp_path)
    for row in rows:
        board(row)
    board.writer.close()
    read = event_accumulator.EventAccumulator(str(tmp_path), size_guidance={"histograms": 0}).Reload()
    assert [scalar.step for scalar in read.Scalars("apoptosis/loss")] == [row["step"] for row in rows]
    assert len(read.Histograms("apoptosis/widths")) == len(apoptosis.history)


def test_a_browser_draws_every_chart_and_complains_of_nothing(recorded, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    _, recorder, apoptosis = recorded
    apoptosis.report(str(tmp_path / "report.html"), recorder.curves)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    flags += ["--enable-logging=stderr", "--v=0", f"--user-data-dir={tmp_path}/profile"]
    page = f"file://{tmp_path}/report.html"
    shown = subprocess.run(
        [chromium, *flags, "--dump-dom", page],
        capture_output=True, text=True, timeout=240, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    titles = re.findall("<figcaption>(.*?)</figcaption>", shown.stdout)
    assert titles[:2] == ["Width of every group that changed", "loss"]
    assert titles[-2:] == ["Milliseconds per training step", "Seconds saved so far"]
    assert shown.stdout.count('class="curve"') >= len(titles)
    for path in re.findall('class="curve"[^>]* d="(.*?)"', shown.stdout):
        assert path.startswith("M")
        assert "NaN" not in path


def test_the_core_imports_neither_rich_nor_matplotlib():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", "import sys, apoptorch; print(*sys.modules)"]
    shown = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout.split()
    assert {"apoptorch.apoptosis", "torch"} <= set(shown)
    assert not {"rich", "matplotlib", "apoptorch.report"} & set(shown)
