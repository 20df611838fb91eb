"""Tests of the full benchmark's machinery: what is run, what is measured, what the page says of it."""

import dataclasses
import json
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comparison import Task, accuracy, mlp, sgd
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from benchmarks import full, models, peers, suite, tune
from benchmarks.contenders import CONTENDERS, REFERENCE, SAME_TIME, SEARCH
from benchmarks.paired import geometric_mean, paired
from benchmarks.pareto import front
from benchmarks.search import random_widths, search


@pytest.fixture
def task():
    return Task(lambda: mlp(6, 32, 32, 2), sgd, F.cross_entropy, accuracy, batch=32, epochs=2)


# -- statistics ----------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.lists(st.integers(-999, 999), min_size=2, max_size=8, unique=True), st.floats(0, 0.5))
def test_non_inferiority_is_the_one_sided_t_test_against_the_margin(thousandths, margin):
    differences = [difference / 1000 for difference in thousandths]
    found = paired(differences, [0.0] * len(differences))
    p = ttest_1samp(differences, -margin, alternative="greater").pvalue
    if np.isfinite(p) and abs(p - 0.05) > 1e-6:
        assert found.non_inferior(margin) == (p < 0.05)


def test_pairs_are_taken_seed_by_seed_and_one_seed_shows_nothing():
    assert paired([0.9, 0.7], [0.8, 0.6]).lower == pytest.approx(0.1)
    assert paired([0.9], [0.8]).non_inferior(0.1) is None
    assert geometric_mean([1, 4]) == pytest.approx(2)


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_front_is_what_no_other_point_surpasses(points):
    def surpassed(point):
        return any(q != point and q[0] <= point[0] and q[1] >= point[1] for q in points)

    assert set(front(points)) == {point for point in points if not surpassed(point)}


# -- tasks and networks --------------------------------------------------------------------------------------


def test_every_task_has_a_recipe_and_every_recipe_a_task():
    assert set(json.loads(suite.RECIPES.read_text())) == set(suite.BENCHMARKS)
    for name in suite.BENCHMARKS:
        assert suite.task(name).epochs > 0
        assert isinstance(suite.optimizer(suite.recipe(name), mlp(2, 2).parameters()), torch.optim.Optimizer)


@pytest.mark.parametrize(
    ("model", "shape", "parameters"),
    [
        (models.lenet5, (1, 28, 28), 431_080),  # the number LeNet-5 has in Caffe and in the pruning literature
        (models.resnet20, (1, 14, 14), 272_186),  # 272,474 with three input channels
        (lambda: models.alexnet(), (3, 224, 224), 61_100_840),  # as in torchvision
        (lambda: models.googlenet(), (3, 224, 224), 6_998_552),  # about 7 million in the paper
    ],
)
def test_networks_have_the_published_number_of_parameters(model, shape, parameters):
    with torch.device("meta"):
        network = model()
        assert network.eval()(torch.empty(2, *shape)).ndim == 2
    shortcuts = sum(p.numel() for n, p in network.named_parameters() if "shortcut" in n)
    assert abs(sum(p.numel() for p in network.parameters()) - shortcuts - parameters) < 3000


def test_the_character_transformer_does_not_see_what_comes():
    model = models.CharacterTransformer(11, block=6, width=8, heads=2, layers=2).eval()
    x = torch.randint(11, (3, 6))
    changed = x.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 11
    difference = (model(x) - model(changed)).abs().amax((0, 2))
    assert (difference[:4] < 1e-6).all()
    assert (difference[4:] > 1e-4).all()
    logits, y = model(x), torch.randint(11, (3, 6))
    expected = -logits.log_softmax(-1).gather(-1, y[..., None]).mean()
    torch.testing.assert_close(suite.next_character_loss(logits, y), expected)


# -- measuring -----------------------------------------------------------------------------------------------


def test_each_seed_is_finished_before_the_next_and_the_peers_follow_the_reference():
    order = list(full.plan(["a", "b"], list(reversed(CONTENDERS)), 2))
    assert len(order) == len(set(order)) == 4 * len(CONTENDERS)
    assert [seed for seed, *_ in order] == sorted(seed for seed, *_ in order)
    assert [contender for *_, contender in order][:2] == ["dense", REFERENCE]


def test_random_widths_are_near_the_given_ones_and_the_search_takes_the_time_it_is_given(task, data):
    found = random_widths({"1": 64, "3": 8}, random.Random(0))
    assert found["1"] % 8 == found["3"] % 8 == 0
    assert 32 <= found["1"] <= 128
    once, model = search(task, data, {"1": 16, "3": 16}, seconds=0.0, seed=0, evaluations=1)
    assert once["tried"] == 1
    assert once["metric"] == accuracy(model(data.test_x), data.test_y)
    more, _ = search(task, data, {"1": 16, "3": 16}, seconds=8 * once["wall_s"], seed=0, evaluations=1)
    assert more["tried"] > 1
    assert more["wall_s"] > once["wall_s"]


def test_a_benchmark_goes_on_where_it_stopped_and_measures_again_after_a_change(tmp_path, monkeypatch, task, data):
    settings = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0, "batch": 32, "epochs": 2, "examples": 200}
    state = {"commit": "abc"}
    monkeypatch.setattr(full, "RESULTS", tmp_path / "full.jsonl")
    monkeypatch.setattr(full, "settings", lambda name, quick: settings | {"tuned": None})
    monkeypatch.setattr(full, "conditions", lambda measured: {"commit": state["commit"]})
    monkeypatch.setattr(suite, "task", lambda name, chosen: task)
    monkeypatch.setattr(suite, "load", lambda name, chosen: data)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    arguments = ["full", "--tasks", "lenet-300-100", "--seeds", "1", "--contenders", "dense", REFERENCE, "hindsight"]

    def runs(*more):
        full.loaded.cache_clear()
        monkeypatch.setattr("sys.argv", [*arguments, SEARCH, SAME_TIME, *more])
        full.main()
        return [json.loads(line) for line in full.RESULTS.read_text().splitlines()] if full.RESULTS.exists() else []

    assert runs("--hours", "1e-9") == []
    first = runs()
    assert [run["contender"] for run in first] == ["dense", REFERENCE, SAME_TIME, "hindsight", SEARCH]
    assert first[2]["train_flops"] >= first[1]["train_flops"]
    for run in first:
        assert run["peak_memory_mb"] > 50
        assert 0 < run["inference_s"] < 5
        assert run["examples"] == 200
    assert runs() == first
    state["commit"] = "def"
    assert len(runs()) == 10


def test_the_dense_run_is_needed_for_its_time(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["full", "--contenders", REFERENCE, SAME_TIME])
    with pytest.raises(SystemExit):
        full.arguments()
    assert "--contenders must include dense" in capsys.readouterr().err


def test_a_contender_that_fails_is_recorded_and_does_not_end_the_benchmark(task, data, tmp_path):
    broken = dataclasses.replace(task, batch=0)
    error = full.attempt("dense", broken, data, 0, None)["error"]
    assert error.startswith("ZeroDivisionError")
    assert full.attempt("merging", task, data, 0, None) == {"error": "no run of apoptosis to follow"}
    page = peers.page([record("merging", error=error)], tmp_path, "x")
    assert f"merging on lenet-5: {error}" in page


def test_peak_memory_is_that_since_the_reset():
    full.reset_peak_memory()
    before = full.peak_memory_mb()
    block = torch.ones(64 * 2**18)  # 64 MB
    assert full.peak_memory_mb() > before + 50
    del block
    full.reset_peak_memory()
    assert full.peak_memory_mb() < before + 40


def test_tuning_chooses_on_validation_data_and_goes_on_where_it_stopped(tmp_path, monkeypatch, task, data):
    recipe = {"optimizer": "sgd", "lr": 0.3, "weight_decay": 0.001, "batch": 32, "epochs": 2, "examples": 200}
    recipes = {"lenet-5": {**recipe, "tuned": None}, "other": {}}
    (tmp_path / "recipes.json").write_text(json.dumps(recipes))
    monkeypatch.setattr(suite, "RECIPES", tmp_path / "recipes.json")
    monkeypatch.setattr(tune, "RESULTS", tmp_path / "tuning.jsonl")
    monkeypatch.setattr(suite, "load", lambda name, settings: data)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    tried = []

    def fake(task, held_out, contender):
        assert len(held_out.train_x) == 180
        chosen = task.optimizer(mlp(2, 2).parameters()).param_groups[0]
        tried.append((chosen["lr"], chosen["weight_decay"]))
        return {"metric": 1 - abs(chosen["lr"] - 0.1) - abs(chosen["weight_decay"] - 0.01)}, None

    monkeypatch.setattr(tune, "train", fake)
    monkeypatch.setattr("sys.argv", ["tune", "--tasks", "lenet-5"])
    tune.main()
    tune.main()
    assert len(tried) == len(set(tried)) == 5
    chosen = suite.recipe("lenet-5")
    assert (chosen["lr"], chosen["weight_decay"]) == (0.1, 0.01)
    assert chosen["tuned"]["settings"] == 5
    assert json.loads(suite.RECIPES.read_text())["other"] == {}


# -- the page ------------------------------------------------------------------------------------------------


def record(contender, seed=0, task="lenet-5", **changes):
    base = {
        "task": task, "contender": contender, "seed": seed, "recipe": suite.recipe(task), "commit": "abc",
        "machine": {"cpu": "some", "cores": 2, "threads": 2}, "python": "3", "torch": "2", "wall_s": 100.0,
        "cpu_s": 200.0, "event_s": 0.0, "train_flops": 1e12, "parameters": 1000, "metric": 0.9, "widths": [8],
        "inference_s": 0.01, "peak_memory_mb": 300.0, "events": [], "curve": [[50.0, 0.8], [100.0, 0.9]],
    }  # fmt: skip
    return base | changes


def test_page_sets_ours_beside_the_paper_s_claims_and_names_what_is_lost(tmp_path):
    runs = [record("dense", seed, metric=0.9 + 0.01 * seed, curve=[[100.0, 0.95]]) for seed in range(3)]
    runs += [
        record(REFERENCE, seed, metric=0.9 + 0.01 * seed - 0.02, wall_s=25.0, parameters=100, curve=[[25.0, 0.8]])
        for seed in range(3)
    ]
    runs += [record("hindsight", seed, metric=0.92, wall_s=20.0, parameters=100) for seed in range(3)]
    page = peers.page(runs, tmp_path / "figures", "somewhere.jsonl")
    assert "4.00x (geometric mean of 1 tasks" in page
    assert "10.0x" in page
    assert (tmp_path / "figures" / "lenet-5.png").stat().st_size > 5000
    lost = page[page.index("## Where it loses") :]
    assert "not shown to be non-inferior to dense: -0.0200, limit -0.0200" in lost
    assert "dense's final metric is never reached; the dense run has it after 100.0 s" in lost
    assert "hindsight is as good or better in all three" in lost
    assert "slower" not in lost


def test_targets_are_judged_by_medians_over_tasks_and_by_peers_that_are_as_good_at_once(tmp_path):
    runs = [record("dense", task="higgs-relu", metric=0.84, curve=[[100.0, 0.84]])]
    runs += [record(REFERENCE, task="higgs-relu", metric=0.8395, wall_s=25.0, parameters=10, curve=[[25.0, 0.8395]])]
    runs += [record(SAME_TIME, task="higgs-relu", metric=0.85, wall_s=90.0, parameters=10)]
    runs += [record("merging", task="higgs-relu", metric=0.8395, wall_s=30.0, parameters=10)]
    runs += [record("dense"), record(REFERENCE, metric=0.95, wall_s=50.0, parameters=100, curve=[[40.0, 0.9]])]
    runs += [record("hindsight", wall_s=25.0), record("merging", metric=0.95, wall_s=50.0, parameters=100)]
    page = peers.page(runs, tmp_path, "x")
    for row in (
        "| metric within the margin of dense | all tasks | 2 of 2 in the mean; shown at 95 %: 0, one seed: 2 | pass |",
        "| wall time, dense / apoptosis, geometric mean | >= 3x | 2.83x | **miss** |",
        "| the same, smallest | >= 1x | 2.00x | pass |",
        "| parameters, dense / apoptosis, geometric mean | >= 10x | 31.6x | pass |",
        "| time to dense's final metric, apoptosis / dense | <= 1x on all tasks | on 1 of 2 | **miss** |",
        "| wall time, apoptosis / hindsight, median | <= 1.5x | 2.00x | **miss** |",
        "in as little time | 3 of 4 tasks | 1 of 2 tasks with peers | **miss** |",
        "| higgs AUC with 3x fewer parameters, less the best dense one | >= 0 | -0.0005 | **miss** |",
        "| higgs AUC with the dense run's time, less the best dense one | >= 0 | +0.0100 | pass |",
    ):
        assert row in page


def test_page_without_results_says_so_and_a_win_is_no_loss(tmp_path):
    assert "Nothing was measured yet" in peers.page([], tmp_path, "x")
    runs = [record("dense", seed) for seed in range(3)]
    runs += [record(REFERENCE, seed, wall_s=10.0, parameters=10, curve=[[9.0, 0.95]]) for seed in range(3)]
    assert "Nowhere in what was measured" in peers.page(runs, tmp_path, "x")


def test_the_last_recipe_counts_and_time_to_dense_s_metric_is_read_off_the_curve():
    old = record("dense", metric=0.1, recipe=suite.recipe("lenet-5") | {"lr": 9.0})
    assert peers.by_task([old, record("dense")])["lenet-5"]["dense"][0]["metric"] == 0.9
    run = record(REFERENCE, curve=[[5.0, 0.8], [7.0, 0.9], [9.0, 0.85]])
    assert peers.time_to_dense(record("dense"), run) == 7.0
