"""Real gloo ranks against one process on the same global batches: same widths at every event, same weights."""

from contextlib import nullcontext

import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from apoptorch import Apoptosis, Policy
from apoptorch.distributed import fingerprint

POLICY = Policy(payback=0, first_step=8, samples=256, gap=1.6, stop=1.0, price=2.0, tolerance=0.05, multiple=4, floor=4)
STEPS, BATCH = 24, 64


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X = normal(BATCH * STEPS, 10)
Y = (X[:, :3] + 0.1).argmax(1)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 3))


class Branched(nn.Module):
    """`spare` is used on no rank: DDP must be told to find it unused."""

    def __init__(self):
        super().__init__()
        self.body, self.spare = mlp(), nn.Linear(10, 8)

    def forward(self, x):
        return self.body(x)


def share(i, rank, world):
    """This rank's part of global batch i."""
    rows = slice(i * BATCH + rank * BATCH // world, i * BATCH + (rank + 1) * BATCH // world)
    return X[rows], Y[rows]


def train(
    rank, world, build=mlp, optimizer=torch.optim.SGD, lr=0.1, parts=1, wrap=None, hook=None, policy=POLICY, **ddp
):
    """Widths after every step, weights and history of one run; `parts`: batches that gradients are accumulated over."""
    model = build()
    wrapped = DistributedDataParallel(model, **ddp) if world > 1 else model
    if hook is not None and world > 1:
        hook(wrapped)
    wrapped = wrapped if wrap is None else wrap(wrapped)
    optimizer = optimizer(model.parameters(), lr)
    apoptosis = Apoptosis(
        wrapped, optimizer, example_inputs=share(0, rank, world)[0], loss_fn=F.cross_entropy, total_steps=STEPS,
        policy=policy,
    )  # fmt: skip
    widths = []
    for i in range(STEPS):
        x, y = share(i, rank, world)
        optimizer.zero_grad()
        for part, (px, py) in enumerate(zip(x.chunk(parts), y.chunk(parts), strict=True)):
            quiet = world > 1 and part < parts - 1
            with wrapped.no_sync() if quiet else nullcontext():
                (F.cross_entropy(wrapped(px), py) / parts).backward()
        optimizer.step()
        apoptosis.step(x, targets=y)
        widths.append([group.width for group in apoptosis.groups])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return {"widths": widths, "weights": weights, "history": [event.to_json() for event in apoptosis.history]}


def power(model):
    model.register_comm_hook(PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2), powerSGD_hook)


VARIANTS = {
    "plain": {},
    "Adam": {"optimizer": torch.optim.Adam, "lr": 0.01},
    "static graph": {"static_graph": True},
    "bucket views": {"gradient_as_bucket_view": True},
    "small buckets": {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True},
    "unused": {"build": Branched, "find_unused_parameters": True},
    "accumulation": {"parts": 2},
    "hook": {"hook": lambda model: model.register_comm_hook(None, allreduce_hook)},
    "builtin hook": {"hook": lambda model: model._register_builtin_comm_hook(builtin())},
}


def builtin():
    return torch._C._distributed_c10d.BuiltinCommHookType.ALLREDUCE


def all_variants(rank, world, names):
    return {name: train(rank, world, **VARIANTS[name]) for name in names}


def assert_same(found, expected):
    assert found["widths"] == expected["widths"]
    assert found["widths"][-1] != found["widths"][0]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)


def timeless(history):
    return [{**event, "seconds": 0, "step_seconds": None} for event in history]


@pytest.mark.parametrize(("world", "names"), [(2, list(VARIANTS)), (4, ["plain", "Adam"])])
def test_ranks_train_as_one_process_with_the_same_global_batch(world, names):
    found = ranks.run(world, all_variants, world, names)
    for name in names:
        alone = train(0, 1, **VARIANTS[name])
        for rank in range(world):
            assert_same(found[rank][name], alone)
            assert found[rank][name]["history"] == found[0][name]["history"]
            assert fingerprint(found[rank][name]["weights"]) == fingerprint(found[0][name]["weights"])
