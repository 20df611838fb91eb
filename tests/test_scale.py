"""The hosts of benchmarks/scale, where they can be made; its cost model against a simulation and exact runs."""

import math
import os
import shutil
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale import hosts, model, network
from benchmarks.scale.cost import BYTES, Events, Link, Rank, Stage, link, run_seconds

NETWORK = Link(1e-4, 1e-8)


def simulated_ring(size, ranks):
    """A ring all-reduce, message by message: every rank sends a part on once it has the one before."""
    ready = [0.0] * ranks
    for _ in range(2 * (ranks - 1)):
        ready = [max(ready[i], ready[i - 1]) + NETWORK.latency + size / ranks * NETWORK.byte for i in range(ranks)]
    return max(ready)


@given(st.integers(0, 10**8), st.integers(1, 40))
def test_a_ring_takes_what_its_messages_take(size, ranks):
    assert math.isclose(NETWORK.ring(size, ranks), simulated_ring(size, ranks), rel_tol=1e-9)


@given(st.integers(1, 10**8), st.integers(2, 40))
def test_a_link_is_found_from_two_all_reduces(size, ranks):
    found = link(NETWORK.ring(0, ranks), NETWORK.ring(size, ranks), size, ranks)
    assert math.isclose(found.latency, NETWORK.latency, rel_tol=1e-9)
    assert math.isclose(found.byte, NETWORK.byte, rel_tol=1e-6)


def test_many_ranks_need_a_tree_and_few_do_not():
    assert NETWORK.tree(0, 1) == NETWORK.ring(0, 1) == 0.0
    assert NETWORK.tree(4e6, 1024) < NETWORK.ring(4e6, 1024)
    assert NETWORK.tree(4e8, 2) > NETWORK.ring(4e8, 2)


def test_a_run_is_the_sum_of_its_steps_and_events_are_shared_out():
    rank, stages = Rank(1e-3, 1e-10, 1e-9), (Stage(0.0, 1.0, 1.0), Stage(0.25, 0.5, 0.2))
    found = run_seconds(rank, stages, 100, 1e8, 1e6, 4, NETWORK)
    steps = [
        1e-3 + f * 1e8 * 1e-10 + p * 1e6 * 1e-9 + simulated_ring(BYTES * p * 1e6, 4)
        for f, p in [(1.0, 1.0)] * 25 + [(0.5, 0.2)] * 75
    ]
    assert math.isclose(found, sum(steps), rel_tol=1e-9)
    free, cost = Link(0.0, 0.0), Events(seconds=6.0, cubes=3 * 64**3, number=2)
    assert [cost.cost([64] * 3, ranks, free, "ring") for ranks in (1, 2, 1024)] == [6.0, 3.0, 2.0]


def record(contender, ranks, rate, wire):
    """What a machine that is exactly as the model would have written."""
    rank, sizes = Rank(2e-3, 1e-10, 1e-9), [(0.0, 1.0), (0.5, 1.0 if contender == "dense" else 0.25)]
    curve = [
        {"step": 100 * begin, "parameters": s * 1e6, "parameters_after": s * 1e6, "flops": s * 1e8 / ranks, "sent": 0.0,
         "step_s": rank.step(s * 1e8 / ranks, s * 1e6, ranks, wire, "ring")}
        for begin, s in sizes
    ]  # fmt: skip
    return {
        "contender": contender, "hosts": ranks, "rate": rate, "steps": 100, "curve": curve, "parameter_s": 1e-9,
        "machine": {"cores": 64}, "events": [], "total_s": sum(50 * point["step_s"] for point in curve),
        "all_reduce": [[4, wire.ring(4, ranks)], [2**22, wire.ring(2**22, ranks)]],
    }  # fmt: skip


def test_the_fitted_model_predicts_a_machine_that_is_as_it_says():
    wires = {"unlimited": Link(1e-5, 1e-10), "100mbit": Link(1e-4, 8e-8)}
    runs = [
        record(contender, ranks, rate, wire)
        for contender in ("dense", "apoptosis")
        for ranks in (1, 2, 4)
        for rate, wire in wires.items()
        if ranks > 1 or rate == "unlimited"
    ]
    fitted = model.fit(runs)
    assert fitted.rank.overlap < 0.01
    for run in runs:
        assert math.isclose(model.predicted(run, fitted), run["total_s"], rel_tol=1e-4)


def test_the_networks_have_the_sizes_that_are_known():
    found = {name: (shape.parameters, shape.flops) for name, shape in model.shapes().items()}
    assert found["AlexNet"][0] == 61_100_840
    assert round(found["VGG-16"][0] / 1e6) == 138
    assert 0.98 < found["VGG-16"][1] / (3 * 30.94e9) <= 1.0  # three passes, but none to the image


def test_the_page_shows_what_was_measured():
    runs = model.latest_runs()
    assert "\n".join([*model.about(runs), *model.gains(runs)]) in model.PAGE.read_text()
    assert {run["hosts"] for run in runs} == {1, 2, 4}


def possible():
    return os.geteuid() == 0 and shutil.which("ip") and shutil.which("tc")


@pytest.mark.skipif(not possible(), reason="network namespaces need root, ip and tc")
def test_two_hosts_send_the_gradients_once_each_and_leave_nothing_behind():
    run = {"task": "digits", "hosts": 2, "rate": "1gbit", "seed": 0, "contender": "dense", "max_steps": 24}
    found = hosts.measured(run, timeout=300)
    assert found["ranks"] == 2
    # a ring of two sends 2 (n - 1) / n = 1 time the gradients, and headers; the median: the kernel may send again
    assert 1.0 <= statistics.median(point["sent"] / (BYTES * point["parameters"]) for point in found["curve"]) < 1.05
    assert not [name for name in network.namespaces() if name.startswith(f"{network.PREFIX}{os.getpid()}-")]
