"""Tests of what the examples and benchmarks measure with: examples/comparison.py and benchmarks/."""

import json
import time
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from comparison import (
    Apoptosis,
    Contender,
    Meter,
    Task,
    accuracy,
    auc,
    batches,
    mlp,
    ratio,
    sgd,
    step_flops,
    train,
    widths,
)
from sklearn.metrics import roc_auc_score
from torch import nn

from benchmarks import core, tables


@pytest.fixture
def task():
    return Task(lambda: mlp(6, 16, 16, 2), sgd, F.cross_entropy, accuracy, batch=32, epochs=2)


@pytest.mark.parametrize("levels", [3, 10_000])
def test_auc_equals_scikit_learn_with_and_without_ties(levels):
    generator = torch.Generator().manual_seed(levels)
    scores = torch.randint(levels, (500, 1), generator=generator).float()
    labels = (torch.rand(500, 1, generator=generator) < 0.3).float()
    assert auc(scores, labels) == pytest.approx(roc_auc_score(labels.numpy(), scores.numpy()))


def test_batches_cover_each_example_once_and_in_the_seed_s_order(data):
    first, second = ([x for x, _ in batches(data, 50, torch.Generator().manual_seed(3))] for _ in range(2))
    assert torch.equal(torch.cat(first), torch.cat(second))
    assert torch.equal(torch.cat(first).sort(0).values, data.train_x.sort(0).values)


def test_flops_are_those_of_the_matrix_products_and_follow_the_shapes(task, data):
    def expected(*shape):
        products = [2 * task.batch * a * b for a, b in pairwise(shape)]
        return 3 * sum(products) - products[0]  # the input needs no gradient

    assert step_flops(mlp(6, 16, 16, 2), task, data) == expected(6, 16, 16, 2)
    meter = Meter(task, data)
    meter.step(mlp(6, 16, 16, 2))
    meter.step(mlp(6, 8, 4, 2))
    assert meter.train_flops == expected(6, 16, 16, 2) + expected(6, 8, 4, 2)


def test_meter_leaves_out_evaluation_and_keeps_the_mode(task, data, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr("comparison.time.perf_counter", lambda: next(now))
    meter, model = Meter(task, data), task.model().train()
    meter.evaluate(model)  # stops at 1, goes on at 2
    meter.evaluate(model)  # stops at 3, goes on at 4
    assert [t for t, _ in meter.curve] == [1, 2]
    assert model.training


def test_dense_training_is_reproducible_counts_its_steps_and_makes_no_apoptorch_object(task, data, monkeypatch):
    monkeypatch.setattr("comparison.apoptorch", None)
    seen = []
    first, model = train(task, data, Contender(), 1, 2, lambda model, loss, meter: seen.append(meter.steps))
    second, _ = train(task, data, Contender(), 1, 2)
    assert seen == list(range(1, 13))
    assert accuracy(model.eval()(data.test_x), data.test_y) == first["metric"]
    assert first["trajectory"] == []
    assert first["metric"] == second["metric"]
    assert [m for _, m in first["curve"]] == [m for _, m in second["curve"]]
    assert len(first["curve"]) == 4
    assert first["widths"] == [16, 16]
    assert json.loads(json.dumps(first))["parameters"] == first["parameters"]


def test_apoptosis_sees_every_step_and_ends_as_dense_does_when_nothing_is_removed(task, data, monkeypatch):
    class Idle:
        def __init__(self, model, optimizer, *, example_inputs, loss_fn, total_steps, policy):
            assert example_inputs.shape == (32, 6)
            assert policy == "normal"
            assert total_steps == 12
            self.history = []

        def step(self, x, *, targets):
            assert len(x) == len(targets) == 32

    monkeypatch.setattr("comparison.apoptorch.Apoptosis", Idle, raising=False)
    dense, ours = (train(task, data, contender())[0] for contender in (Contender, Apoptosis))
    assert ours["metric"] == dense["metric"]
    assert ours["train_flops"] == dense["train_flops"]
    assert ours["event_s"] == 0 < ours["contender_s"] < ours["wall_s"]
    assert ours["idle_share"] > 0


def test_events_are_timed_apart_and_leave_a_trajectory(task, data):
    class Narrow(Contender):
        def begin(self, run):
            self.model, self.steps = run.model, 0

        def step(self, x, y):
            self.steps += 1
            if self.steps == 3:
                time.sleep(0.05)
                self.model.append(nn.Linear(2, 2))
                return "an event"

        def facts(self):
            return {"note": "widened"}

    record, _ = train(task, data, Narrow())
    assert record["trajectory"] == [(3, 16 * 7 + 16 * 17 + 2 * 17 + 6, [16, 16, 2])]
    assert 0.05 <= record["event_s"] <= record["contender_s"]
    assert record["event_cpu_s"] < record["event_s"]
    assert record["note"] == "widened"


def test_widths_leave_out_the_output_layer():
    assert widths(mlp(6, 16, 8, 2)) == [16, 8]


def test_ratio_divides_costs_and_subtracts_metrics():
    dense = {"wall_s": 10.0, "train_flops": 8, "parameters": 6, "metric": 0.9}
    ours = {"wall_s": 2.0, "train_flops": 2, "parameters": 2, "metric": 0.8}
    assert ratio(dense, ours) == pytest.approx({"wall_s": 5, "train_flops": 4, "parameters": 3, "metric": -0.1})


def record(contender, seed=0, task="fashion-mlp", **changes):
    base = {
        "task": task,
        "contender": contender,
        "seed": seed,
        "epochs": 5,
        "commit": "abc",
        "machine": {"cpu": "some", "cores": 2, "threads": 2},
        "python": "3",
        "torch": "2",
        "examples": 60_000,
        "wall_s": 100.0,
        "cpu_s": 200.0,
        "train_flops": 1e12,
        "parameters": 1000,
        "metric": 0.9,
        "widths": [8],
        "curve": [[50.0, 0.8], [100.0, 0.9]],
        "idle_share": 5e-4,
    }
    ours = {"wall_s": 10.0, "parameters": 50, "contender_s": 2.0, "event_s": 1.0, "idle_share": 15e-4}
    return {**base, **(ours if contender == "apoptosis" else {}), **changes}


def verdicts(runs):
    """{(task, what): (median, verdict)} of the rows that were measured."""
    lines = [tables.line(row, runs) for row in tables.ROWS]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(lines) == len(tables.ROWS)
    return {(row.task, row.what): (c[3], c[5]) for row, c in zip(tables.ROWS, cells, strict=True) if c[5]}


def test_table_takes_medians_over_seeds_and_says_pass_or_miss():
    runs = [record("dense", seed) for seed in range(3)]
    runs += [
        record("apoptosis", seed, wall_s=w, metric=m)
        for seed, (w, m) in enumerate([(10, 0.897), (20, 0.897), (50, 0.9)])
    ]
    found = verdicts(runs)
    assert found["fashion-mlp", "wall time, dense / apoptosis"] == ("5x", "pass")
    assert found["fashion-mlp", "parameters, dense / apoptosis"] == ("20x", "pass")
    assert found["fashion-mlp", "metric, apoptosis - dense, points"] == ("-0.3", "**miss**")
    assert found["fashion-mlp", "all seconds in apoptorch / dense run, %"] == ("2", "pass")
    assert found["fashion-mlp", "idle call of step / training step, %"] == ("0.1", "pass")  # less an empty one
    assert not [task for task, _ in found if task in ("cnn", "higgs", "tiny")]


def test_time_to_dense_accuracy_takes_the_best_schedule_and_counts_a_run_that_never_gets_there_as_a_miss():
    never = record("apoptosis", curve=[[5.0, 0.85]])
    found = verdicts([record("dense"), never])
    assert found[tables.SOONER, "wall time, apoptosis / dense"] == ("infx", "**miss**")
    shorter = record("apoptosis", task=tables.SOONER, epochs=3, curve=[[5.0, 0.8], [12.0, 0.91], [15.0, 0.92]])
    found = verdicts([record("dense"), never, shorter])
    assert found[tables.SOONER, "wall time, apoptosis / dense"] == ("0.12x", "pass")


def test_page_keeps_the_last_of_repeated_runs():
    page = tables.page([record("dense", metric=0.1), record("dense", metric=0.9), record("apoptosis")])
    assert "0.9000" in page
    assert "0.1000" not in page
    assert "not measured" in page


def test_benchmark_resumes_and_stretches_the_schedule_by_the_measured_speed_up(tmp_path, monkeypatch, task, data):
    monkeypatch.setattr(core, "RESULTS", tmp_path / "core.jsonl")
    monkeypatch.setattr(core, "commit", lambda measured: "abc")
    monkeypatch.setattr(core, "TASKS", {"fashion-mlp": (task, lambda: data)})
    trained = []

    def fake(recipe, data, contender, seed, evaluations):
        name = "apoptosis" if isinstance(contender, Apoptosis) else "dense"
        trained.append((name, seed, recipe.epochs))
        return record(name, seed, epochs=recipe.epochs), recipe.model()

    monkeypatch.setattr(core, "train", fake)
    monkeypatch.setattr(core, "warm_up", lambda task, data: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr("sys.argv", ["core", "--seeds", "0", "--tasks", "fashion-mlp"])
    core.main()
    core.main()
    assert trained == [("dense", 0, 2), ("apoptosis", 0, 2)]
    assert core.schedules(core.SAME_TIME, 0, "abc") == (20,)
    with pytest.raises(SystemExit, match="must follow fashion-mlp"):
        core.schedules(core.SAME_TIME, 7, "abc")
