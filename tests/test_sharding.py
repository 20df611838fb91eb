"""FSDP2 on real gloo ranks: as one process with the same global batch, never whole on one rank, and whole or undone."""

from dataclasses import replace

import pytest
import ranks
import torch
import torch.nn.functional as F
from test_distributed import (
    FAULTS,
    POLICY,
    X,
    Y,
    assert_abandoned,
    assert_same,
    mlp,
    several_faults,
    share,
    train,
    values_of,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils.parametrizations import weight_norm

from apoptorch import Apoptosis, ArgumentError, Policy, calibrate, removal


def sharded(model, shape=None, layers=(nn.Linear,), **options):
    """`fully_shard` on every layer of these types, then on the model; a mesh of two dimensions replicates over one."""
    shape = shape or (torch.distributed.get_world_size(),)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for module in model:
        if isinstance(module, layers):
            fully_shard(module, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


VARIANTS = {
    "layer by layer, momentum": {"optimizer": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.5), "lr": 0.05},
    "the model as one, Adam, accumulation": {"layers": (), "optimizer": torch.optim.Adam, "lr": 0.01, "parts": 2},
    "replicated too, not freed after forward": {"shape": (2, 2), "reshard_after_forward": False},
}


def variants(rank, world, names):
    return {name: train(rank, world, parallel=sharded, **VARIANTS[name]) for name in names}


@pytest.mark.parametrize(("world", "names"), [(2, list(VARIANTS)[:2]), (4, list(VARIANTS)[1:])])
def test_a_sharded_model_trains_as_one_process_with_the_same_global_batch(world, names):
    found = ranks.run(world, variants, world, names)
    for name in names:
        alone = {key: value for key, value in VARIANTS[name].items() if key in ("optimizer", "lr", "parts")}
        expected = train(0, 1, **alone)
        for run in found:
            assert_same(run[name], expected)
            assert run[name]["history"] == found[0][name]["history"]


# What one rank holds


def held(model, optimizer):
    """Bytes of parameters and optimizer state that are whole on this rank."""
    state = [(v, p) for p, values in optimizer.state.items() for v in values.values() if torch.is_tensor(v)]
    tensors = [*model.parameters(), *(v for v, p in state if v.shape == p.shape and v.ndim)]
    return sum(t.numel() * t.element_size() for t in tensors if not isinstance(t, DTensor) and not t.is_meta)


def of_equal_layers(rank, world):
    """The most that an event holds whole at the moments when most is: cuts, and sums over the weights of a part."""
    torch.manual_seed(0)
    layers = [nn.Linear(10, 64), nn.Tanh(), *(m for _ in range(8) for m in (nn.Linear(64, 64), nn.Tanh()))]
    model = sharded(nn.Sequential(*layers, nn.Linear(64, 3)))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    x, y = share(0, rank, world)
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    most = []

    def watching(owner, name):
        original = getattr(owner, name)

        def watched(*args, **options):
            most.append((name, held(model, optimizer)))
            result = original(*args, **options)
            most.append((name, held(model, optimizer)))
            return result

        setattr(owner, name, watched)

    watching(removal.Surgery, "fold_")
    watching(calibrate._Sums, "add_columns")
    apoptosis = Apoptosis(model, optimizer, example_inputs=x, loss_fn=F.cross_entropy, policy=replace(POLICY, guard=99))
    event = apoptosis.apoptose(x, targets=y, budget=1.0)
    full = 3 * sum(p.numel() * p.element_size() for p in model.parameters())  # with Adam's two
    layer = 4 * (64 * 64 + 64)
    return len(event.changes), max(n for at, n in most if at == "fold_"), max(n for _, n in most), layer, full


def test_no_rank_ever_has_more_than_one_channel_group_whole():
    for changes, cut, most, layer, _ in ranks.run(2, of_equal_layers, 2):
        assert changes >= 4
        assert 0 < cut <= 3 * 2 * layer  # two layers, with their optimizer state
        assert most == cut


# The rest of what fully_shard is told


def in_half_precision(rank, world):
    """Weights after a run in bfloat16, outputs of the sharded model, the dtypes that it computes and stores in."""
    seen = []
    model = sharded(mlp(), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32))

    def see(module, args):
        if not args[0].is_meta:
            seen.append((module.weight.dtype, args[0].dtype))

    model[2].register_forward_pre_hook(see)
    result = train(rank, world, build=lambda: model, parallel=lambda model: model)
    return {**result, "output": model(X[:64]).detach(), "seen": set(seen)}


def test_the_mixed_precision_policy_is_kept():
    for run in ranks.run(2, in_half_precision, 2):
        assert run["widths"][-1] != run["widths"][0]
        assert run["seen"] == {(torch.bfloat16, torch.bfloat16)}
        assert {weight.dtype for weight in run["weights"].values()} == {torch.float32}
        weights = [weight.bfloat16() for weight in run["weights"].values()]
        hidden = F.linear(F.linear(X[:64].bfloat16(), *weights[:2]).relu(), *weights[2:4]).tanh()
        torch.testing.assert_close(run["output"], F.linear(hidden, *weights[4:]).float(), rtol=0, atol=0.05)


def several(rank, world):
    """Faults of one rank, and a removal that is undone."""
    faults = several_faults(rank, world, list(FAULTS), sharded)
    model = sharded(mlp())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    policy = Policy(max_changed_predictions=0.0, multiple=4, floor=4)
    apoptosis = Apoptosis(model, optimizer, example_inputs=X[:4], loss_fn=F.cross_entropy, policy=policy)
    losses, before = [], None
    for i in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X[:64]), Y[:64])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if i == 1:
            before = values_of(model, optimizer)
            event = apoptosis.apoptose(X[:256], targets=Y[:256], budget=0.1)
            assert event.rolled_back
            assert values_of(model, optimizer) == before
    return faults, losses


def test_what_fails_or_hurts_is_undone_on_all_ranks():
    found = ranks.run(2, several, 2)
    assert_abandoned([faults for faults, _ in found])
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for i in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X[:64]), Y[:64])
        loss.backward()
        optimizer.step()
        for _, losses in found:
            assert losses[i] == pytest.approx(loss.item(), abs=1e-5)


def at_the_door(rank, world):
    texts = []

    def refused(model, optimizer=None, **arguments):
        with pytest.raises(ArgumentError) as raised:
            Apoptosis(model, optimizer, example_inputs=X[:4], loss_fn=F.cross_entropy, **arguments)
        texts.append(str(raised.value))

    def in_two_ways():
        mesh = init_device_mesh("cpu", (1, world), mesh_dim_names=("data", "tensor"))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        return fully_shard(parallelize_module(mlp(), mesh["tensor"], plan), mesh=mesh["data"])

    mesh = init_device_mesh("cpu", (world,))
    inner = mlp()
    fully_shard(inner[0], mesh=mesh)
    pair = mlp()
    fully_shard([pair[0], pair[2]], mesh=mesh)
    normed = mlp()
    weight_norm(normed[0])
    refused(in_two_ways())
    refused(inner)
    refused(fully_shard(pair, mesh=mesh))
    refused(sharded(mlp(), offload_policy=CPUOffloadPolicy(pin_memory=False)))
    refused(sharded(normed))
    refused(sharded(mlp()), followers=[mlp()])
    refused(model := sharded(mlp()), torch.optim.LBFGS(model.parameters()))
    refused(sharded(mlp()), policy=Policy(cost="milliseconds"))
    refused(sharded(mlp()), total_steps=100 + rank)
    return texts


def test_what_is_not_followed_is_refused_at_the_door_on_all_ranks():
    one, other = ranks.run(2, at_the_door, 2)
    assert one == other
    expected = (
        "Leave out tensor parallelism",
        "or by fully_shard on the model itself, got a DTensor (0.weight",
        "sharded one module at a time, got fully_shard([a, b])",
        "without CPUOffloadPolicy",
        "must have no parametrizations where it is sharded, got one (0)",
        "`followers` must be () where the model is sharded, got 1",
        "`optimizer` must not be LBFGS",
        "`policy` must count flops where the model is sharded",
        "`total_steps` must be the same on every rank, got 100, 101",
    )
    for text, part in zip(one, expected, strict=True):
        assert part in text
