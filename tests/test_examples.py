"""The examples run as a newcomer runs them, only smaller."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import images
from test_datasets import write_idx

from apoptorch.plan import Event

EXAMPLES = Path(datasets.__file__).parents[1]


def run(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120"}
    command = [sys.executable, EXAMPLES / script, *map(str, arguments)]
    return subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout


@pytest.fixture
def few_events(tmp_path):
    for split, n in (("train", 6_000), ("test", 500)):
        table = pq.read_table(datasets.HIGGS_SAMPLE / f"{split}.parquet").slice(0, n)
        pq.write_table(pa.table(table.to_pydict(), table.schema), tmp_path / f"{split}.parquet")
    return tmp_path


def test_demo_without_a_terminal_writes_summary_history_and_picture(few_events, tmp_path):
    out = tmp_path / "out"
    shown = run("demo.py", "--data", few_events, "--width", 128, "--epochs", 4, "--out", out)
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == {"dense", "apoptosis", "ratio"}
    for run_ in summary.values():
        assert set(run_) == {"wall_s", "train_flops", "parameters", "metric"}
    assert summary["dense"]["parameters"] == 28 * 128 + 128 + 2 * (128 * 128 + 128) + 128 + 1
    history = [Event.from_json(event) for event in json.loads((out / "history.json").read_text())]
    if history:
        assert history[-1].parameters_after == summary["apoptosis"]["parameters"]
    assert (out / "widths.png").read_bytes().startswith(b"\x89PNG")
    assert "wall seconds" in shown
    assert "\x1b[" not in shown
    assert f"{summary['dense']['metric']:.4f}" in shown


def test_fashion_mnist_prints_every_epoch_and_the_comparison(tmp_path):
    folder = write_idx(tmp_path / "images", images.FASHION_MNIST, shade=8, n=256)
    shown = run("fashion_mnist.py", "--data", folder, "--width", 16, "--epochs", 2)
    assert shown.count("test accuracy") == 5
    assert "dense: epoch 2" in shown
    assert "apoptosis: epoch 2" in shown


def test_the_two_lines_are_the_whole_use_of_apoptorch_in_the_plain_loop():
    source = (EXAMPLES / "fashion_mnist.py").read_text()
    assert source.count("apoptorch.Apoptosis(") == source.count("apoptosis.step(") == 1
