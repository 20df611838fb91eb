"""torch.compile around, inside and under everything: right outputs, few compilations, and their cost counted."""

import time
from dataclasses import replace

import pytest
import ranks
import torch
import torch.nn.functional as F
from test_apoptosis import BATCH, POLICY, X, Y, mlp, train
from test_distributed import assert_same
from test_distributed import mlp as plain
from test_distributed import train as train_on_ranks
from test_sharding import sharded
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from apoptorch import Apoptosis, Policy


def slow_to_compile(graph, inputs):
    time.sleep(2.0)
    return graph.forward


@pytest.mark.parametrize("compiled", [False, True])
def test_a_look_must_also_make_up_for_compiling_once_more(compiled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 3))
    used = torch.compile(model, backend=slow_to_compile) if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    policy = Policy(payback=0.5, first_step=6, samples=64)
    apoptosis = Apoptosis(
        used, optimizer, example_inputs=X[:BATCH], loss_fn=F.cross_entropy, total_steps=60, policy=policy
    )
    train(used, optimizer, apoptosis, range(6))
    assert apoptosis._unpaid == compiled
    torch.compiler.reset()


class Own(nn.Sequential):  # torch doesn't compile its own classes in place
    def forward(self, x):
        for module in self:
            x = module(x)
        return x


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_compiled_again_only_where_torch_fixes_sizes(in_place, fixed):
    compiles, model = [], Own(*mlp())

    def counting(graph, inputs):
        compiles.append([tuple(p.shape) for p in model.parameters()])
        return graph.forward

    names = ("force_parameter_static_shapes", "force_nn_module_property_static_shapes")
    with torch._dynamo.config.patch({"recompile_limit": 2, **dict.fromkeys(names, True)}):
        model.compile(backend=counting) if in_place else None
        used = model if in_place else torch.compile(model, backend=counting)
        apoptosis = Apoptosis(used, example_inputs=X[:BATCH], loss_fn=F.cross_entropy)
        with torch._dynamo.config.patch(dict.fromkeys(names, True) if fixed else {}):
            for number, floor in enumerate((40, 20, 10, 5)):
                torch.testing.assert_close(used(X[:BATCH]), nn.Sequential(*model)(X[:BATCH]))
                assert len(compiles) == (1 + number if fixed else 1)
                apoptosis.policy = replace(POLICY, guard=99.0, floor=floor)
                assert apoptosis.apoptose(X[:256], targets=Y[:256], budget=9.0).changes
            torch.testing.assert_close(used(X[:BATCH]), nn.Sequential(*model)(X[:BATCH]))
            assert not fixed or compiles[-1] == [tuple(p.shape) for p in model.parameters()]
    torch.compiler.reset()


def test_compiled_model_is_seen_through():
    model = mlp()
    compiled = torch.compile(model)
    apoptosis = Apoptosis(compiled, torch.optim.SGD(compiled.parameters(), 0.1), example_inputs=X[:BATCH])
    assert [group.name for group in apoptosis.groups] == ["0", "4", "6"]
    event = apoptosis.apoptose(X[:256], budget=0.05)
    assert event.parameters_after == sum(p.numel() for p in model.parameters()) < event.parameters_before


def own():
    return Own(*plain())


WAYS = {
    "around DDP": lambda model, backend: torch.compile(DistributedDataParallel(model), backend=backend),
    "inside DDP": lambda model, backend: DistributedDataParallel(torch.compile(model, backend=backend)),
    "around shards": lambda model, backend: torch.compile(sharded(model, layers=()), backend=backend),
}


def compiled(rank, world):
    """How many graphs each way of wrapping had compiled, and the run."""
    found = {}
    for name, way in WAYS.items():
        graphs = []

        def backend(graph, inputs, graphs=graphs):
            graphs.append(graph)
            return graph.forward

        run = train_on_ranks(rank, world, own, parallel=lambda model, way=way, be=backend: way(model, be))
        found[name] = len(graphs), run
        torch.compiler.reset()
    return found


def test_compiled_ranks_train_as_one_process_that_is_not_and_compile_once():
    expected = train_on_ranks(0, 1, own)
    assert len(expected["history"]) > 1
    for found in ranks.run(2, compiled, 2):
        for name, (graphs, run) in found.items():
            assert_same(run, expected)
            assert graphs == (2 if name == "around shards" else 1)  # torch sees for itself which sizes of shards change
