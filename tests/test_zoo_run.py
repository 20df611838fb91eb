"""The zoo's runner: what never returns, fails or dies costs only itself; and what the page makes of it."""

import os
import time
from dataclasses import replace

import pytest
import torch
from datasets import Split

from benchmarks import learning
from benchmarks.learning import Decoder, resnet20
from benchmarks.zoo import __main__ as zoo
from benchmarks.zoo.page import page, verdict


def returns(entry):
    yield {"trace_s": 0.5}


def hangs(entry):
    yield {"trace_s": 0.5}
    time.sleep(60)


def raises(entry):
    yield {"trace_s": 0.5}
    raise ValueError("no\nsuch   op")


def dies(entry):
    yield {"trace_s": 0.5}
    os._exit(3)


@pytest.mark.parametrize(
    ("contender", "error"),
    [
        (returns, None),
        (hangs, "did not return within 0.5 s"),
        (raises, "ValueError: no such op"),
        (dies, "the process died (exit code 3)"),
    ],
)
def test_each_stage_s_findings_are_kept_whatever_comes_after(contender, error, monkeypatch):
    monkeypatch.setitem(zoo.CONTENDERS, "one", contender)
    monkeypatch.setitem(zoo.SECONDS, "one", 0.5 if contender is hangs else 60)
    start = time.monotonic()
    found = zoo.examine("mlp", "one")
    assert found["trace_s"] == 0.5
    assert found.get("error") == error
    assert time.monotonic() - start < 30


GOOD = {"planted_groups": 2, "planted_problems": [], "halved_problems": []}


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (None, "not measured"),
        (GOOD, "ok"),
        ({**GOOD, "planted_groups": 0}, "nothing prunable"),
        ({**GOOD, "planted_problems": ["the outputs changed"]}, "wrong: the outputs changed"),
        ({**GOOD, "halved_problems": ["undone | x"]}, "wrong: undone / x"),
        ({"planted_groups": 2, "error": "ValueError: no"}, "fails: ValueError: no"),
    ],
)
def test_verdict(run, expected):
    assert verdict(run) == expected


def test_the_page_counts_the_last_run_of_each_model():
    def run(model, contender, **found):
        return {"model": model, "contender": contender, "version": "abc", "versions": {"torch": "2"}, **found}

    text = page([
        run("mlp", "apoptorch", error="old"),
        run("mlp", "apoptorch", **GOOD, prunable=0.75, pinned=0.25, trace_s=5.0, parameters=10, nodes=3, reasons=[]),
        run("mlp", "torch-pruning", error="x"),
        run("gru", "apoptorch", **{**GOOD, "planted_groups": 0}, prunable=0.0),
        run("gru", "torch-pruning", halved_problems=[]),
        run("lstm", "apoptorch", **GOOD),
    ])  # fmt: skip
    assert "| models that pass everything | >= 97 % | 67% of 3 | **miss** |" in text
    assert "| mlp | hand-written | 10 | 3 | 5.0 | 75% | 25% | ok | fails: x |" in text
    assert "Of 2 models on which both were measured both are ok on 0, only apoptorch on 1, only Torch-Pr" in text
    assert "Torch-Pruning is not measured yet on 1 of the zoo's" in text
    assert "graph, in the median model: 1666.7 ms (below 200 nodes)." in text
    assert "traced in over 4 s CPU | none | mlp | **miss** |" in text
    assert "apoptorch is not | none | gru | **miss** |" in text


def test_learning_models_have_the_shapes_that_the_page_says():
    decoder = Decoder(vocabulary=10, width=8, heads=2, hidden=16, layers=2, length=6)
    assert decoder(torch.randint(10, (3, 6))).shape == (3, 6, 10)
    model = resnet20(4)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)
    assert sum(isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3) for module in model.modules()) == 19


@pytest.mark.parametrize("contender", learning.CONTENDERS)
def test_a_learning_run_gives_what_the_page_reads(contender, monkeypatch):
    recipe, _ = learning.TASKS["transformer"]
    small = replace(recipe, model=lambda: Decoder(10, 8, 2, 16, 1, 6), batch=8)
    rows = torch.arange(96)[:, None] + torch.arange(7) * 3
    data = Split(rows[:80, :-1] % 10, rows[:80, 1:] % 10, rows[80:, :-1] % 10, rows[80:, 1:] % 10)
    monkeypatch.setitem(learning.TASKS, "transformer", (small, lambda: data))
    run = learning.measure("transformer", contender, seed=0)
    about = {"task": "transformer", "seed": 0, "contender": contender, "machine": {"cpu": "x"}, "torch": "2"}
    assert -5 < run["metric"] < 0
    assert "Measured on x" in learning.page([{**run, **about, "commit": "abc"}])
    assert learning.measure("transformer", contender, seed=0, examples=16)["curve"]


def test_the_learning_page_compares_runs_of_one_seed():
    about = {"seed": 0, "task": "transformer", "machine": {"cpu": "x"}, "torch": "2", "commit": "abc"}
    costs = {"cpu_s": 12.0, "train_flops": 6, "parameters": 4}
    dense = {**about, "contender": "dense", "wall_s": 13.0, "metric": -1.5, **costs}
    half = {key: value / 2 for key, value in costs.items()}
    ours = {**about, "contender": "apoptosis", "wall_s": 10.0, "metric": -1.505, **half}
    ours["groups"] = {"up": [16, 8], "v": [4, 4]}
    text = learning.page([dense, ours])
    assert "| transformer | 0 | wall time, dense / apoptosis | | 1.3 | |" in text
    assert "| transformer | 0 | nats of validation loss saved | >= -0.01 | -0.005 | pass |" in text
    assert "| transformer | 0 | CPU time, dense / apoptosis | >= 1.3 | 2 | pass |" in text
    assert "- transformer, seed 0: up 16 -> 8" in text
