"""Real gloo ranks against one process on the same global batches: same widths at every event, same weights."""

import os
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import ranks
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from apoptorch import Apoptosis, ArgumentError, Policy, load, planning, removal, save
from apoptorch.batches import Batch
from apoptorch.distributed import Ranks, fingerprint
from apoptorch.errors import AbandonedError, RanksError
from apoptorch.removal import remove_
from apoptorch.sharding import reshard_

POLICY = Policy(
    payback=0, full_run=1, room=0, first_step=8, samples=256, gap=1.6, stop=1.0, price=2.0, tolerance=0.05, multiple=4,
    floor=4,
)  # fmt: skip
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


def whole(tensor):
    """The tensor itself, also of a sharded one."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


@contextmanager
def unsynchronised(model):
    """DDP's no_sync, FSDP2's equivalent."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield
        model.set_requires_gradient_sync(True)


def train(
    rank, world, build=mlp, optimizer=torch.optim.SGD, lr=0.1, parts=1, parallel=DistributedDataParallel, hook=None,
    policy=POLICY, **options,
):  # fmt: skip
    """Widths after every step, weights and history of one run; `parts`: batches that gradients are accumulated over."""
    model = build()
    wrapped = parallel(model, **options) if world > 1 else model
    if hook is not None and world > 1:
        hook(wrapped)
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
            with unsynchronised(wrapped) if quiet else nullcontext():
                (F.cross_entropy(wrapped(px), py) / parts).backward()
        optimizer.step()
        apoptosis.step(x, targets=y)
        widths.append([group.width for group in apoptosis.groups])
    weights = {name: whole(p) for name, p in model.named_parameters()}
    return {"widths": widths, "weights": weights, "history": [event.to_json() for event in apoptosis.history]}


def power(model):
    model.register_comm_hook(PowerSGDState(None, matrix_approximation_rank=1, start_powerSGD_iter=2), powerSGD_hook)


VARIANTS = {
    "plain": {},
    "Adam, a static graph, views of buckets": {
        "optimizer": torch.optim.Adam, "lr": 0.01, "static_graph": True, "gradient_as_bucket_view": True,
    },
    "unused parameters, accumulation, a hook": {
        "build": Branched, "find_unused_parameters": True, "parts": 2,
        "hook": lambda model: model.register_comm_hook(None, allreduce_hook),
    },
    "small buckets, a builtin hook": {
        "bucket_cap_mb": 0.001, "hook": lambda model: model._register_builtin_comm_hook(builtin()),
    },
}  # fmt: skip


def builtin():
    return torch._C._distributed_c10d.BuiltinCommHookType.ALLREDUCE


def all_variants(rank, world, names):
    """PowerSGD remembers errors in the shapes of the old buckets; it is lossy, so only the ranks are compared."""
    compressed = {"compressed": train(rank, world, hook=power)} if world == 2 else {}
    return {**compressed, **{name: train(rank, world, **VARIANTS[name]) for name in names}}


def assert_same(found, expected):
    assert found["widths"] == expected["widths"]
    assert found["widths"][-1] != found["widths"][0]
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=0, atol=1e-5)


def timeless(history):
    return [{**event, "seconds": 0, "step_seconds": None} for event in history]


@pytest.mark.parametrize(("world", "names"), [(2, list(VARIANTS)), (4, list(VARIANTS)[1:2])])
def test_ranks_train_as_one_process_with_the_same_global_batch(world, names):
    found = ranks.run(world, all_variants, world, names)
    for name in names:
        alone = train(0, 1, **VARIANTS[name])
        for rank in range(world):
            assert_same(found[rank][name], alone)
    for run in found:
        for name in run:
            assert run[name]["widths"][-1] != run[name]["widths"][0]
            assert run[name]["history"] == found[0][name]["history"]
            assert fingerprint(run[name]["weights"]) == fingerprint(found[0][name]["weights"])


# Faults: no rank hangs, all do the same


def failing(rank, world, fault, parallel=DistributedDataParallel):
    """One run in which rank 1 fails at the first event, as `fault` says."""
    events = []
    model = mlp()
    ddp = parallel(model)
    optimizer = torch.optim.Adam(ddp.parameters(), 0.01)
    apoptosis = Apoptosis(
        ddp,
        optimizer,
        example_inputs=share(0, rank, world)[0],
        loss_fn=F.cross_entropy,
        total_steps=STEPS,
        policy=POLICY,
    )
    if rank == 1 and fault == "out of memory":
        fail_once(planning, "select_blocks", torch.OutOfMemoryError("tried to allocate 80 GiB"))
    if rank == 1 and fault in SURGERY:
        fail_once(removal.Surgery, "fold_", RuntimeError("no room"), SURGERY.index(fault))
    for i in range(13):  # the next event
        x, y = share(i, rank, world)
        optimizer.zero_grad()
        F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
        before = values_of(model, optimizer)
        bad = rank == 1 and i + 1 == 7
        if bad and fault == "NaN":
            x = x * torch.nan
        if bad and fault == "empty":
            x, y = x[:0], y[:0]
        with pytest.warns(UserWarning, match="abandoned") if i + 1 == 8 else nullcontext():
            event = apoptosis.step(x, targets=y)
        if event is not None and not event.changes:
            assert values_of(model, optimizer) == before
        events += [] if event is None else [event.to_json()]
    return {"events": events, "weights": fingerprint({name: whole(p) for name, p in model.named_parameters()})}


SURGERY = ["surgery", "second surgery"]


def values_of(model, optimizer):
    """The bits of this rank's weights and optimizer state, and the module's sizes."""
    if isinstance(model, FSDPModule):
        reshard_(model)
    values = [*model.parameters(), *(v for state in optimizer.state.values() for v in state.values())]
    local = [v.to_local() if isinstance(v, DTensor) else v for v in values]
    return fingerprint([*local, [tuple(p.shape) for p in model.parameters()], str(model)])


def fail_once(owner, name, error, after=0):
    original, calls = getattr(owner, name), iter(range(after + 1))

    def replacement(*args, **options):
        if next(calls) < after:
            return original(*args, **options)
        setattr(owner, name, original)
        raise error

    setattr(owner, name, replacement)


def several_faults(rank, world, faults, parallel=DistributedDataParallel):
    return [failing(rank, world, fault, parallel) for fault in faults]


FAULTS = {
    "out of memory": "searching failed: rank 1: OutOfMemoryError: tried to allocate 80 GiB",
    "surgery": "removing neurons failed: rank 1: RuntimeError: no room",
    "second surgery": "removing neurons failed: rank 1: RuntimeError: no room",
    "NaN": "checking the data failed: rank 1: ArgumentError: `inputs` must be finite, got 320 NaN",
    "empty": "checking the data failed: rank 1: ArgumentError: `inputs` must not be empty",
}


def test_what_fails_on_one_rank_is_abandoned_on_all_and_training_goes_on():
    assert_abandoned(ranks.run(2, several_faults, 2, list(FAULTS)))


def assert_abandoned(found):
    for (fault, reason), one, other in zip(FAULTS.items(), *found, strict=True):
        assert one == other, fault
        first, *later = one["events"]
        assert first["step"] == 8
        assert first["rolled_back"]
        assert first["widths_after"] == first["widths_before"]
        assert first["reason"].startswith(f"abandoned on all ranks, {reason}")
        assert any(event["changes"] and not event["rolled_back"] for event in later)


def dying(rank, world, folder):
    """Rank 1 is killed inside its part of the search; what the other one sees, and after how long."""

    def die(*args, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        planning.select_blocks = die
    model = DistributedDataParallel(mlp())
    apoptosis = Apoptosis(model, example_inputs=X[:4], loss_fn=F.cross_entropy, policy=POLICY)
    save(model, folder, apoptosis)
    before, start = fingerprint(model.module.state_dict()), time.monotonic()
    with pytest.raises(RanksError) as raised:
        apoptosis.apoptose(X[:256], targets=Y[:256])
    assert fingerprint(model.module.state_dict()) == before
    return str(raised.value), time.monotonic() - start


def test_a_rank_killed_inside_an_event_ends_the_others_in_time_and_the_last_checkpoint_loads(tmp_path):
    survivor, killed = ranks.outcomes(2, dying, 2, str(tmp_path))
    assert killed is None
    assert survivor[0], survivor[1]
    text, seconds = survivor[1]
    assert "can't be reached any more" in text
    assert "last checkpoint" in text
    assert seconds < ranks.TIMEOUT + 5
    model = mlp()
    nn.init.zeros_(model[0].weight)
    load(model, tmp_path)
    assert fingerprint(model.state_dict()) == fingerprint(mlp().state_dict())


def at_the_door(rank, world):
    """Every difference between ranks, refused by both."""
    texts = []

    def refused(change=lambda model: None, **arguments):
        model = DistributedDataParallel(mlp())
        if rank == 1:
            change(model.module)
        settings = {"example_inputs": X[:4], "loss_fn": F.cross_entropy, **arguments}
        with pytest.raises((ArgumentError, AbandonedError)) as raised:
            Apoptosis(model, torch.optim.SGD(model.parameters(), 0.1), **settings)
        texts.append(str(raised.value))

    refused(total_steps=100 + rank)
    refused(policy="normal" if rank == 0 else "aggressive")
    refused(lambda model: model.double() and None, example_inputs=X[:4] if rank == 0 else X[:4].double())
    refused(lambda model: model.__setitem__(4, nn.Linear(48, 5)))
    refused(lambda model: nn.init.zeros_(model[4].bias))
    refused(lambda model: model.__setitem__(3, nn.Sigmoid()))
    refused(protect=() if rank == 0 else ("nothing",))
    refused(example_inputs=X[:4] if rank == 0 else X[:0])
    return texts


def test_ranks_that_differ_are_refused_at_the_door_on_all_of_them():
    one, other = ranks.run(2, at_the_door, 2)
    assert one == other
    expected = (
        "`total_steps` must be the same on every rank, got 100, 101 (by rank)",
        "`policy` must be the same on every rank, got normal, aggressive",
        "`0.weight` must be the same on every rank, got torch.float32 (64, 10) True, torch.float64",
        "`4.weight` must be the same on every rank, got torch.float32 (3, 48) True, torch.float32 (5, 48)",
        "`values of the parameters` must be the same",
        "channel groups of ranks [1] differ",
        "`protect` must name modules of the model, got 'nothing'. See model.named_modules(). (ranks [1])",
        "`example_inputs` must not be empty, got shape (0, 10) (tensor 0). Pass a batch of data. (ranks [1])",
    )
    for text, part in zip(one, expected, strict=True):
        assert part in text


def pieces(rank, world):
    group = Ranks(torch.distributed.group.WORLD)
    shared = group.shared({"a": 9, "b": 5, "c": 4}, lambda name: (name, group.rank), "working")
    try:
        group.agree("plans", [torch.arange(3), 1.0 + (rank == 1) * 2**-52])
    except AbandonedError as error:
        return shared, str(error)


def test_work_is_shared_out_by_cost_and_one_bit_of_difference_is_seen():
    for shared, text in ranks.run(2, pieces, 2):
        assert shared == {"a": ("a", 0), "b": ("b", 1), "c": ("c", 1)}
        assert text == "abandoned on all ranks: plans of ranks [1] differ from those of rank 0"


# What an event is expected to save and to cost


def looked(model):
    """Is there to be a look for redundancy under the usual pay-back? And the seconds a step that follow the widths."""
    policy = Policy(first_step=8, start=0)
    apoptosis = Apoptosis(model, example_inputs=X[:4], loss_fn=F.cross_entropy, total_steps=10**6, policy=policy)
    return apoptosis._wake < 10**6, apoptosis._work()


def on_a_slow_network(rank, world):
    original = torch.distributed.all_reduce

    def slow(tensor, *args, **options):
        time.sleep(5e-6 * tensor.numel() * (1 + rank))
        return original(tensor, *args, **options)

    torch.distributed.all_reduce = slow
    return looked(DistributedDataParallel(mlp()))


def test_a_slow_network_makes_a_small_model_worth_shrinking():
    one, other = ranks.run(2, on_a_slow_network, 2)
    assert one[0]
    assert one[1] >= 1e-5 * sum(p.numel() for p in mlp().parameters())  # the slower rank's
    assert not looked(mlp())[0]
    assert other[0]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(10, 32), nn.BatchNorm1d(32), nn.Linear(32, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def synchronised(rank, world):
    """An event with four times as many batches on rank 0 as on rank 1.

    On the CPU, DDP takes no SyncBatchNorm, and the layer refuses to normalise over ranks: here it must not even try.
    """
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Normed())
    apoptosis = Apoptosis(model, example_inputs=X[:4], loss_fn=F.cross_entropy, policy=POLICY)
    network = replace(apoptosis._network, ranks=Ranks(torch.distributed.group.WORLD))
    rows = 1024 if rank == 0 else 256
    batches = [Batch((x,), {}, y) for x, y in zip(X[:rows].split(256), Y[:rows].split(256), strict=True)]
    event = remove_(network, batches, batches[:1], F.cross_entropy, POLICY)
    assert model.training
    assert "forward" not in vars(model.norm)
    assert model.norm.num_batches_tracked == 0
    return event.widths_after, fingerprint(model.state_dict())


def test_synchronised_batch_norm_waits_for_no_rank_that_has_fewer_batches():
    one, other = ranks.run(2, synchronised, 2)
    assert one == other
    assert one[0]["first"] < 32
