"""The public class: events in plain training runs, resuming bit for bit, and every bad input."""

import copy
import inspect
import json
import math
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

from apoptorch import (
    Apoptosis,
    ApoptosisError,
    ArgumentError,
    Event,
    ExportError,
    Policy,
    SurgeryError,
    checkpoint,
    shrink,
)

# Wall time decides nothing (payback=0), no run is too short, and the first look comes at step 12.
POLICY = Policy(
    payback=0, full_run=1, room=0, first_step=12, samples=128, gap=1.6, stop=1.0, price=5.0, tolerance=0.05, multiple=1,
    floor=4,
)  # fmt: skip
STEPS, BATCH = 48, 32


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


X, Y = normal(BATCH * STEPS, 10), (normal(BATCH * STEPS, 10)[:, :3] + 0.1).argmax(1)


def mlp(*, norm=False, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 64), nn.BatchNorm1d(64) if norm else nn.Identity(), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 3),
    )  # fmt: skip


def batch(i):
    return X[i * BATCH : (i + 1) * BATCH], Y[i * BATCH : (i + 1) * BATCH]


def start(model=None, optimizer=torch.optim.SGD, lr=0.1, **arguments):
    model = mlp() if model is None else model
    optimizer = optimizer(model.parameters(), lr)
    arguments = {"loss_fn": F.cross_entropy, "total_steps": STEPS, "policy": POLICY, **arguments}
    return model, optimizer, Apoptosis(model, optimizer, example_inputs=X[:BATCH], **arguments)


def train(model, optimizer, apoptosis, steps):
    """A plain loop; returns the events and the last loss."""
    events, loss = [], None
    for i in steps:
        x, y = batch(i)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        events.append(apoptosis.step(x, targets=y))
    return [event for event in events if event is not None], loss


def bits(tensors):
    return {
        name: (tuple(t.shape), t.detach().contiguous().flatten().view(torch.uint8).tolist())
        for name, t in tensors.items()
    }


def widths(apoptosis):
    return [group.width for group in apoptosis.groups]


# Training


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("optimizer", "lr"), [(torch.optim.SGD, 0.1), (torch.optim.Adam, 0.01)])
def test_a_plain_run_shrinks_and_learns(optimizer, lr, norm):
    model, optimizer, apoptosis = start(mlp(norm=norm), optimizer, lr)
    first = F.cross_entropy(model(X), Y).item()
    events, loss = train(model, optimizer, apoptosis, range(STEPS))
    assert len([event for event in events if not event.rolled_back]) >= 2
    assert events == apoptosis.history
    assert all(isinstance(event, Event) for event in events)
    assert widths(apoptosis)[0] < 64
    assert widths(apoptosis)[1] < 48
    assert math.isfinite(loss.item())
    assert F.cross_entropy(model(X), Y).item() < first
    assert model[0].weight.shape == (widths(apoptosis)[0], 10)
    for event, later in pairwise(events):
        assert event.step < later.step
        assert later.widths_before == event.widths_after
    assert events[0].step == 12
    assert events[-1].widths_after == {group.name: group.width for group in apoptosis.groups}
    assert events[-1].parameters_after == sum(p.numel() for p in model.parameters())


def test_history_is_json_and_comes_back():
    model, optimizer, apoptosis = start()
    train(model, optimizer, apoptosis, range(STEPS))
    assert apoptosis.history
    text = json.dumps([event.to_json() for event in apoptosis.history], allow_nan=False)
    assert [Event.from_json(data) for data in json.loads(text)] == apoptosis.history


def test_nothing_happens_between_events():
    model, optimizer, apoptosis = start()
    for i in range(11):
        state = bits(dict(model.named_parameters()))
        assert apoptosis._batches == [] or i >= 6
        train(model, optimizer, apoptosis, [i])
        assert bits(dict(model.named_parameters())) != state  # the optimizer's doing
        assert widths(apoptosis) == [64, 48, 3]
    assert apoptosis.history == []


def test_step_without_an_event_does_not_touch_the_run():
    """Until the first event, the run is bit for bit the one without apoptosis."""
    model, optimizer, apoptosis = start(mlp(norm=True, dropout=0.3))
    torch.manual_seed(5)
    train(model, optimizer, apoptosis, range(11))
    plain = mlp(norm=True, dropout=0.3)
    reference = torch.optim.SGD(plain.parameters(), 0.1)
    torch.manual_seed(5)
    for i in range(11):
        x, y = batch(i)
        reference.zero_grad()
        F.cross_entropy(plain(x), y).backward()
        reference.step()
    assert bits(model.state_dict()) == bits(plain.state_dict())


def test_a_run_of_unknown_length():
    model, optimizer, apoptosis = start(total_steps=None)
    events, _ = train(model, optimizer, apoptosis, range(STEPS))
    assert events
    assert widths(apoptosis)[0] < 64


def test_no_event_after_the_stop():
    model, optimizer, apoptosis = start(policy=Policy(**{**vars(POLICY), "stop": 0.3}))
    train(model, optimizer, apoptosis, range(STEPS))
    assert all(event.step <= 0.3 * STEPS for event in apoptosis.history)
    assert apoptosis._batches == []


@given(st.floats(0.05, 1.0), st.floats(1.1, 4.0), st.integers(1, 5000), st.integers(10, 100_000))
def test_looks_come_by_at_most_the_gap_and_the_last_where_the_policy_stops(stop, gap, first, total):
    """As few as the gap allows, and, but for rounding to whole steps, each later by the same factor."""
    policy = Policy(stop=stop, gap=gap)
    last, looks = policy.last_look(total), [first]
    while looks[-1] < last:
        looks.append(policy.next_look(looks[-1], total))
    assert looks[-1] == max(first, last)
    assert all(b <= math.ceil(a * gap) for a, b in pairwise(looks))
    assert len(looks) <= 1 + max(0, math.ceil(math.log(max(1, last / first), gap) - 1e-9))
    assert policy.next_look(first, None) == math.ceil(round(first * gap, 6))


@pytest.mark.parametrize("wrap", [lambda layer: layer, weight_norm, spectral_norm])
@pytest.mark.parametrize(("tokens", "limit", "held_out"), [(1, None, 4), (4, None, 1), (8, None, 1), (4, 1.0, 4)])
def test_tokens_count_as_samples_to_plan_on_but_not_in_a_certificate(tokens, limit, held_out, wrap):
    """A look wants 1.5 * 256 samples in batches of 32, at least 3; a third of them is held out."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), wrap(nn.Linear(64, 3)))
    policy = Policy(**{**vars(POLICY), "samples": 512, "max_loss_increase": limit})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loss_fn(output, targets):
        return F.cross_entropy(output.flatten(0, 1), targets.flatten())

    x, y = normal(BATCH, tokens, 10), normal(BATCH, tokens, 3, seed=1).argmax(-1)
    apoptosis = Apoptosis(model, optimizer, example_inputs=x, loss_fn=loss_fn, total_steps=STEPS, policy=policy)
    event = None
    while event is None:
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        event = apoptosis.step(x, targets=y)
    assert event.certificate.samples == held_out * BATCH


def test_a_short_run_pays_less_by_the_square_of_its_length():
    def width_of(**changed):
        model, optimizer, apoptosis = start(policy=Policy(**{**vars(POLICY), **changed}))
        train(model, optimizer, apoptosis, range(STEPS))
        return widths(apoptosis)

    price = POLICY.price
    assert width_of(full_run=10 * STEPS) == width_of(price=price / 100) > width_of(full_run=STEPS)
    assert width_of(full_run=STEPS) == width_of(full_run=1)


def test_payback_that_can_not_be_reached_leaves_the_network_alone():
    model, optimizer, apoptosis = start(policy=Policy(**{**vars(POLICY), "payback": 1e12}))
    events, _ = train(model, optimizer, apoptosis, range(STEPS))
    assert events == []
    assert widths(apoptosis) == [64, 48, 3]
    assert "would not pay for itself" in apoptosis.explain()


def test_examples_may_be_fewer_than_the_inputs_of_a_batch():
    histories = []
    for size in (1, BATCH):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        apoptosis = Apoptosis(
            model, optimizer, example_inputs=X[:size], loss_fn=F.cross_entropy, total_steps=STEPS, policy=POLICY
        )
        train(model, optimizer, apoptosis, range(STEPS))
        histories.append([(event.step, event.widths_after, event.measured) for event in apoptosis.history])
    assert histories[0] == histories[1] != []
    wide = nn.Sequential(nn.Linear(10, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 3))
    works = []
    for size in (1, 256):
        apoptosis = Apoptosis(wide, example_inputs=X[:size])
        apoptosis.step(X[:256])
        works.append(apoptosis._work())
    assert works[0] == pytest.approx(works[1])


def test_an_event_that_fails_is_followed_by_another():
    model, failing = mlp(), [True]

    def loss_fn(output, targets):
        if failing and len(output) > BATCH:
            raise RuntimeError("no memory")
        return F.cross_entropy(output, targets)

    model, optimizer, apoptosis = start(model, loss_fn=loss_fn)
    train(model, optimizer, apoptosis, range(11))
    x, y = batch(11)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = everything(model, optimizer, apoptosis)
    with pytest.raises(RuntimeError, match="no memory"):
        apoptosis.step(x, targets=y)
    assert everything(model, optimizer, apoptosis) == before
    failing.clear()
    events, _ = train(model, optimizer, apoptosis, range(12, STEPS))
    assert events[0].step == math.ceil(12 * POLICY.gap)


def test_an_optimizer_is_not_needed():
    model, _, _ = start()
    apoptosis = Apoptosis(model, example_inputs=X[:BATCH], policy=POLICY, total_steps=STEPS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, optimizer, apoptosis, range(STEPS))
    assert widths(apoptosis)[0] < 64


def test_several_optimizers_and_a_follower_follow():
    model = mlp(norm=True)
    ema = AveragedModel(model, use_buffers=True)
    optimizers = [torch.optim.SGD(model[:3].parameters(), 0.1), torch.optim.Adam(model[3:].parameters(), 0.003)]
    apoptosis = Apoptosis(
        model,
        optimizers,
        example_inputs=X[:BATCH],
        loss_fn=F.cross_entropy,
        total_steps=STEPS,
        policy=POLICY,
        followers=[ema],
    )
    for i in range(STEPS):
        x, y = batch(i)
        loss = F.cross_entropy(model(x), y)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        apoptosis.step(x, targets=y)
        ema.update_parameters(model)
    assert widths(apoptosis)[0] < 64
    assert [p.shape for p in ema.module.parameters()] == [p.shape for p in model.parameters()]
    assert ema.module[0].out_features == widths(apoptosis)[0]
    assert math.isfinite(F.cross_entropy(ema(X), Y).item())
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            assert all(v.shape == parameter.shape for v in state.values() if torch.is_tensor(v) and v.ndim)


def test_a_loss_held_over_the_event():
    model, optimizer, apoptosis = start()
    held = []
    for i in range(STEPS):
        x, y = batch(i)
        held.append(F.cross_entropy(model(x), y))
        optimizer.zero_grad()
        held[-1].backward(retain_graph=True)
        optimizer.step()
        apoptosis.step(x, targets=y)
    assert widths(apoptosis)[0] < 64
    assert all(loss.isfinite() for loss in held)


def test_autocast_scaler_clipping_schedule_and_accumulation_outside():
    model, optimizer, _ = start()
    apoptosis = Apoptosis(
        model, optimizer, example_inputs=X[:BATCH], loss_fn=F.cross_entropy, total_steps=STEPS, policy=POLICY
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for i in range(STEPS):
        x, y = batch(i)
        optimizer.zero_grad()
        for half in (slice(0, 16), slice(16, 32)):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = F.cross_entropy(model(x[half]), y[half]) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scheduler.step()
        apoptosis.step(x, targets=y)
    assert widths(apoptosis)[0] < 64
    assert loss.isfinite()


def test_a_step_that_the_scaler_skipped_is_no_mistake():
    model, optimizer, apoptosis = start()
    scaler = torch.amp.GradScaler("cpu")
    train(model, optimizer, apoptosis, range(2))
    x, y = batch(2)
    optimizer.zero_grad()
    scaler.scale(F.cross_entropy(model(x), y) * math.inf).backward()
    scaler.step(optimizer)
    scaler.update()
    assert apoptosis.step(x, targets=y) is None


def test_lbfgs_and_closures():
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.5, max_iter=3)
    apoptosis = Apoptosis(
        model, optimizer, example_inputs=X[:BATCH], loss_fn=F.cross_entropy, total_steps=STEPS, policy=POLICY
    )
    for i in range(20):
        x, y = batch(i)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        apoptosis.step(x, targets=y)
    assert widths(apoptosis)[0] < 64


def test_gathered_batches_are_copies():
    """A loader that reuses its buffer doesn't change what was gathered."""
    model, optimizer, apoptosis = start()
    buffer = torch.empty(BATCH, 10)
    for i in range(11):
        x, y = batch(i)
        buffer.copy_(x)
        optimizer.zero_grad()
        F.cross_entropy(model(buffer), y).backward()
        optimizer.step()
        apoptosis.step(buffer, targets=y)
    gathered = apoptosis._batches
    assert len(gathered) > 1
    assert torch.equal(gathered[-1].args[0], batch(10)[0])
    assert torch.equal(gathered[0].args[0], batch(11 - len(gathered))[0])


# Words


def test_explain_and_groups_say_why():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.pinned, self.kept, self.free = (nn.Linear(10, 16) for _ in range(3))
            self.left, self.middle, self.right = (nn.Linear(16, 3) for _ in range(3))
            with torch.no_grad():
                self.kept.weight[8:], self.kept.bias[8:] = self.kept.weight[:8], self.kept.bias[:8]
                self.free.weight[8:], self.free.bias[8:] = self.free.weight[:8], self.free.bias[:8]

        def forward(self, x):
            seen = (
                self.left(self.pinned(x).cumsum(1)),
                self.middle(self.kept(x).relu()),
                self.right(self.free(x).tanh()),
            )
            return sum(seen)

    model = Model()
    apoptosis = Apoptosis(model, example_inputs=X[:BATCH], policy=POLICY, protect=["kept"])
    groups = {group.name: group for group in apoptosis.groups}
    assert not groups["pinned"].prunable
    assert "cumsum" in groups["pinned"].reason
    assert not groups["kept"].prunable
    assert "protected by protect=('kept',)" in groups["kept"].reason
    assert groups["free"].prunable
    lines = dict(line.split(":", 1) for line in apoptosis.explain().splitlines())
    assert lines.keys() == groups.keys()
    assert "cumsum" in lines["pinned"]
    assert "protect" in lines["kept"]
    assert "nothing was tried yet; next look at step" in lines["free"]
    apoptosis.apoptose(X[:512], budget=1e-6)
    assert {group.name: group.width for group in apoptosis.groups if group.width != 3} == {
        "pinned": 16,
        "kept": 16,
        "free": 8,
    }
    assert "free: 16 -> 8 channels" in apoptosis.explain()
    apoptosis = Apoptosis(Model(), example_inputs=X[:BATCH], policy=Policy(floor=16))
    apoptosis.apoptose(X[:512], budget=1e-6)
    assert "free: 16 -> 16 channels: nothing was redundant" in apoptosis.explain()


@pytest.mark.parametrize("name", ["block", "block.0", "block.0.parametrizations"])
def test_protection_reaches_modules_inside_and_parametrized_ones(name):
    model = nn.Sequential()
    model.add_module("block", nn.Sequential(weight_norm(nn.Linear(10, 16)), nn.ReLU()))
    model.add_module("last", nn.Linear(16, 3))
    apoptosis = Apoptosis(model, example_inputs=X[:4], protect=[name])
    assert not apoptosis.groups[0].prunable


# Bad input: a clear error, all problems together, and nothing changed


def refused(model, *arguments, error=ArgumentError, **keywords):
    """The text of the error with which the class refuses; nothing may have changed."""
    before = bits(dict(model.named_parameters())) if isinstance(model, nn.Module) else None
    generator = torch.get_rng_state()
    with pytest.raises(error) as raised:
        Apoptosis(model, *arguments, **{"example_inputs": X[:BATCH], **keywords})
    assert isinstance(raised.value, ApoptosisError)
    if before is not None:
        assert bits(dict(model.named_parameters())) == before
    assert torch.equal(torch.get_rng_state(), generator)
    return str(raised.value)


def test_optimizer_of_another_model():
    other = torch.optim.SGD(mlp().parameters(), 0.1)
    text = refused(mlp(), other)
    assert "`optimizer` must own parameters of `model`" in text
    assert "Build it from model.parameters()" in text
    model = mlp()
    assert "(number 1)" in refused(model, [torch.optim.SGD(model.parameters(), 0.1), other])
    assert "`optimizer` must be" in refused(mlp(), "adam")


@pytest.mark.parametrize(
    ("example", "text"),
    [
        (X[:4, :7], "`example_inputs` must fit model.forward, got (4, 7): RuntimeError"),
        ((X[:4], X[:4]), "`example_inputs` must fit model.forward"),
        ({"data": X[:4]}, "`example_inputs` must fit model.forward"),
        (X[:0], "`example_inputs` must not be empty, got shape (0, 10)"),
        ((), "`example_inputs` must hold at least one tensor"),
        (None, "`example_inputs` must hold at least one tensor"),
        ("text", "`example_inputs` must hold at least one tensor"),
        (X[:4] * math.nan, "`example_inputs` must be finite, got 40 NaN or infinite values"),
        (X[:4] / 0, "`example_inputs` must be finite"),
        (torch.zeros(4, 10, dtype=torch.long), "`example_inputs` must fit model.forward"),
    ],
    ids=["shape", "too many", "keyword", "empty", "none", "nothing", "text", "nan", "inf", "integers"],
)
def test_example_inputs_that_do_not_fit(example, text):
    assert text in refused(mlp(), example_inputs=example)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(10, 3)

    def forward(self, x):
        return self.a(x) if bool(x.sum() > 0) else self.a(-x)


def test_model_that_can_not_be_exported():
    text = refused(Branching(), error=ExportError, policy=POLICY)
    for part in ("`model` (Branching)", "torch.export", "in train()", "in eval()", "data-dependent", "submodule"):
        assert part in text


def test_a_network_without_anything_to_gain_is_left_alone_until_its_groups_are_asked_for():
    model = Branching()
    apoptosis = Apoptosis(model, example_inputs=X, loss_fn=F.cross_entropy, total_steps=1000)
    for _ in range(3):
        assert apoptosis.step(X, targets=Y) is None
    for ask in (
        apoptosis.explain,
        apoptosis.state_dict,
        lambda: apoptosis.apoptose(X, targets=Y),
        lambda: apoptosis.groups,
    ):
        with pytest.raises(ExportError, match="Branching"):
            ask()


def test_small_examples_of_large_batches_do_not_make_a_network_small():
    wakes = []
    for size in (1, 8192):
        model = nn.Sequential(nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
        x = normal(8192, 10)
        apoptosis = Apoptosis(model, example_inputs=x[:size], total_steps=1000)
        apoptosis.step(x)
        wakes.append(apoptosis._wake)
    assert wakes[0] == wakes[1] < 1000


@pytest.mark.parametrize("policy", ["bold", None, 3, ["normal"], {}])
def test_unknown_policy(policy):
    text = refused(mlp(), policy=policy)
    assert "`policy` must be one of 'conservative', 'normal', 'aggressive' or a Policy" in text


def test_unknown_names():
    assert "`protect` must name modules of the model, got 'missing'. See model.named_modules()" in refused(
        mlp(), protect=["missing"]
    )
    model = nn.Sequential()
    model.add_module("encoder", nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 3)))
    assert "Did you mean 'encoder'" in refused(model, protect=["encode"])
    for wrong in ("encoder", [model], None, [""], 3):
        assert "`protect` must" in refused(model, protect=wrong)
    assert "`protect` must name modules that have parameters, got '2' (ReLU)" in refused(mlp(), protect=["2"])


@pytest.mark.parametrize("wrong", [0, -3, 1.5, "10"])
def test_total_steps(wrong):
    assert "`total_steps` must be a positive integer" in refused(mlp(), total_steps=wrong)


def test_loss_that_is_no_function():
    assert "`loss_fn` must be callable" in refused(mlp(), loss_fn="cross_entropy")


def test_followers():
    assert "`followers` must be a list or tuple" in refused(mlp(), followers=mlp())
    assert "`followers` must be modules" in refused(mlp(), followers=["ema"])
    text = refused(mlp(), followers=[mlp(), nn.Linear(10, 3)])
    assert "`followers[1]` must have the tensors of the model" in text
    assert "deepcopy" in text


def test_all_problems_are_reported_together():
    with pytest.raises(ArgumentError) as raised:
        Apoptosis(
            mlp(), torch.optim.SGD(mlp().parameters(), 0.1), example_inputs=X[:4, :3], policy="bold",
            protect=["missing"], total_steps=0, loss_fn=3, followers=[nn.Linear(1, 1)],
        )  # fmt: skip
    assert len(raised.value.problems) == 7
    text = str(raised.value)
    assert text.startswith("7 problems, nothing was changed:")
    for name in ("optimizer", "example_inputs", "policy", "protect", "total_steps", "loss_fn", "followers"):
        assert f"`{name}" in text


def test_models_that_do_not_hold_ordinary_parameters():
    assert "`model` must be a torch.nn.Module, got function" in refused(batch)
    assert "`model` must have parameters" in refused(nn.ReLU())
    assert "lazy parameter" in refused_without_values(nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 3)))
    with torch.device("meta"):
        meta = nn.Linear(10, 3)
    assert "on the meta device" in refused_without_values(meta)
    mixed = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 3, device="meta"))
    text = refused_without_values(mixed)
    assert "`model` must be on one device, got meta besides cpu (1.weight, shape (3, 8))" in text
    assert "2 problems" in text
    model = mlp()
    model.register_parameter("counts", nn.Parameter(torch.arange(3), requires_grad=False))
    text = refused(model)
    assert "floating-point parameters, got torch.int64 (counts, shape (3,))" in text
    assert "Make it a buffer" in text


def refused_without_values(model):
    with pytest.raises(ArgumentError) as raised:
        Apoptosis(model, example_inputs=X[:4])
    return str(raised.value)


def test_distributed_wrappers_that_are_not_followed_are_refused():
    assert "`model` must not be wrapped by DataParallel" in refused(nn.DataParallel(mlp()))
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        part = mlp()
        fully_shard(part[4], mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        for take in (Apoptosis, shrink):
            with pytest.raises(ArgumentError, match=r"must not be sharded here.* got a DTensor .4\.weight"):
                take(part, example_inputs=X[:4])
        with pytest.raises(ArgumentError, match="must not be wrapped by DistributedDataParallel here"):
            shrink(nn.parallel.DistributedDataParallel(mlp()), example_inputs=X[:4])
        model = mlp()
        sharded = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(ArgumentError, match="got ZeroRedundancyOptimizer"):
            Apoptosis(model, sharded, example_inputs=X[:4])
    finally:
        dist.destroy_process_group()


def everything(model, optimizer, apoptosis):
    state = copy.deepcopy(optimizer.state_dict())
    return (
        bits(model.state_dict()),
        {k: bits({n: v for n, v in values.items() if torch.is_tensor(v)}) for k, values in state["state"].items()},
        widths(apoptosis),
        bits({"rng": torch.get_rng_state()}),
    )


BAD_DATA = {
    "nan": (X[:BATCH] * math.nan, "must be finite, got 320 NaN"),
    "inf": (X[:BATCH].clone().index_fill(0, torch.tensor([3]), math.inf), "must be finite, got 10 NaN or infinite"),
    "empty": (X[:0], "must not be empty, got shape (0, 10)"),
    "nothing": (None, "must hold at least one tensor"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_while_gathering_and_in_apoptose(case):
    bad, text = BAD_DATA[case]
    model, optimizer, apoptosis = start(optimizer=torch.optim.Adam, lr=0.003)
    train(model, optimizer, apoptosis, range(9))
    assert apoptosis._batches
    x, y = batch(9)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = everything(model, optimizer, apoptosis)
    for call in (apoptosis.step, apoptosis.apoptose):
        with pytest.raises(ArgumentError, match="`inputs` must") as raised:
            call(*([] if bad is None else [bad]), targets=y)
        assert text in str(raised.value)
    assert everything(model, optimizer, apoptosis) == before
    assert apoptosis.state_dict()["step"] == 9
    assert apoptosis.step(x, targets=y) is None  # the right data, for the same optimizer step
    assert apoptosis.state_dict()["step"] == 10
    events, _ = train(model, optimizer, apoptosis, range(10, STEPS))
    assert events


@pytest.mark.parametrize("targets", [torch.full((64, 3), math.nan), torch.full((64, 3), math.inf)])
def test_targets_without_a_finite_loss(targets):
    model = mlp()
    apoptosis = Apoptosis(model, example_inputs=X[:4], loss_fn=F.mse_loss)
    before = bits(model.state_dict())
    with pytest.raises(ArgumentError, match=r"`loss_fn` must give a finite loss.*Check the targets"):
        apoptosis.apoptose(X[:64], targets=targets)
    half = torch.zeros(64, 3)
    half[0] = targets[0]  # where the plan is made, not where it is judged
    with pytest.raises(ArgumentError, match="must be finite"):
        apoptosis.apoptose(X[:64], targets=half)
    assert bits(model.state_dict()) == before
    assert apoptosis.history == []


def test_weights_that_have_diverged():
    model = mlp()
    apoptosis = Apoptosis(model, example_inputs=X[:4], loss_fn=F.cross_entropy)
    with torch.no_grad():
        model[4].weight[3, 3] = math.nan
    with pytest.raises(ArgumentError, match="must give finite outputs"):
        apoptosis.apoptose(X[:64], targets=Y[:64])


@pytest.mark.parametrize("budget", [-1.0, math.nan, math.inf, "much"])
def test_budget(budget):
    with pytest.raises(ArgumentError, match="`budget` must be a finite number >= 0"):
        Apoptosis(mlp(), example_inputs=X[:4]).apoptose(X[:64], budget=budget)


@pytest.mark.parametrize("call", ["step", "apoptose"])
def test_inside_autocast_or_inference_mode(call):
    model, optimizer, apoptosis = start()
    x, y = batch(0)
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = everything(model, optimizer, apoptosis)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ArgumentError, match=r"outside torch\.autocast"):
        getattr(apoptosis, call)(x, targets=y)
    with torch.inference_mode(), pytest.raises(ArgumentError, match=r"outside torch\.inference_mode"):
        getattr(apoptosis, call)(x, targets=y)
    assert everything(model, optimizer, apoptosis) == before
    assert apoptosis.step(x, targets=y) is None
    train(model, optimizer, apoptosis, range(1, 11))
    optimizer.step()
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ArgumentError, match=r"outside torch\.autocast"):
        getattr(apoptosis, call)(x, targets=y)  # also later, while data is being gathered


@pytest.mark.parametrize("done", [0, 3])
def test_between_forward_and_backward_or_before_the_optimizer(done):
    model, optimizer, apoptosis = start()
    train(model, optimizer, apoptosis, range(done))
    x, y = batch(done)
    loss = F.cross_entropy(model(x), y)
    before = everything(model, optimizer, apoptosis)
    with pytest.raises(ArgumentError, match=r"`step` must be called once after every optimizer.step\(\)"):
        apoptosis.step(x, targets=y)
    optimizer.zero_grad()
    loss.backward()
    with pytest.raises(ArgumentError, match=r"Move it behind optimizer.step\(\)"):
        apoptosis.step(x, targets=y)
    assert everything(model, optimizer, apoptosis) == before
    optimizer.step()
    assert apoptosis.step(x, targets=y) is None


@pytest.mark.parametrize("call", ["step", "apoptose"])
def test_from_a_second_thread(call):
    model, optimizer, apoptosis = start()
    train(model, optimizer, apoptosis, range(2))
    before, caught = everything(model, optimizer, apoptosis), []

    def other():
        try:
            getattr(apoptosis, call)(*batch(2)[:1], targets=batch(2)[1])
        except ArgumentError as error:
            caught.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(caught) == 1
    assert "`step` must be called by one thread" in caught[0]
    assert everything(model, optimizer, apoptosis) == before
    train(model, optimizer, apoptosis, range(2, 5))


# Modules that are used twice


class Twice(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.b, self.s, self.last = (
            kind,
            nn.Linear(10, 64),
            nn.Linear(10, 64),
            nn.Linear(64, 64),
            nn.Linear(64, 3),
        )

    def forward(self, x):
        if self.kind == "in a row":
            return self.last(self.s(self.s(self.a(x)).relu()).relu())
        if self.kind == "two inputs":
            return self.last(self.s(self.a(x).relu()).relu()) + self.last(self.s(self.b(x).tanh()).relu())
        return self.last(self.s(self.a(x).relu()).relu()) + self.last(self.s(x.repeat(1, 7)[:, :64]).relu())


@pytest.mark.parametrize("kind", ["in a row", "two inputs", "group and raw input"])
def test_a_layer_that_is_used_twice_is_never_cut_in_two_ways(kind):
    model, optimizer, apoptosis = start(Twice(kind))
    groups = {group.name: group for group in apoptosis.groups}
    if kind == "in a row":  # what `s` reads is also what it makes: its rows and columns go together
        assert {("a.weight", 0), ("s.weight", 0)} <= {(slot.tensor, slot.dim) for slot in groups["a"].producers}
        assert "s.weight" in {consumer.weight.tensor for consumer in groups["a"].consumers}
    if kind == "group and raw input":
        assert "s.weight also reads other inputs" in groups["a"].reason
    copied = copy.deepcopy(model)
    event = apoptosis.apoptose(X[:512], targets=Y[:512], budget=1e-4)
    assert not event.rolled_back
    assert event.changes
    loss, reference = F.cross_entropy(model(X), Y).item(), F.cross_entropy(copied(X), Y).item()
    assert loss == pytest.approx(reference, abs=2e-3)
    train(model, optimizer, apoptosis, range(STEPS))
    assert math.isfinite(F.cross_entropy(model(X), Y).item())


class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.a, self.b = nn.Conv1d(1, 16, 3), nn.Linear(16 * 8, 32), nn.Linear(32, 3)

    def forward(self, x):
        return self.b(self.a(self.conv(x[:, None]).relu().view(-1, 16 * 8)).relu())


def test_sizes_written_as_numbers_pin_instead_of_failing_later():
    model, optimizer, apoptosis = start(LeNet())
    groups = {group.name: group for group in apoptosis.groups}
    assert not groups["conv"].prunable
    assert "forward() fails with fewer of them" in groups["conv"].reason
    assert groups["a"].prunable
    train(model, optimizer, apoptosis, range(STEPS))
    assert (model.conv.out_channels, model.a.in_features) == (16, 128)
    assert widths(apoptosis)[1] < 32


# Resuming


def resume(stop, optimizer, lr, through):
    """Trains to `stop`, saves, builds everything anew, loads, trains on; returns all that must be equal."""
    model, optimizer_, apoptosis = start(mlp(norm=True, dropout=0.1), optimizer, lr)
    torch.manual_seed(11)
    train(model, optimizer_, apoptosis, range(stop))
    if stop < STEPS:
        model, optimizer_, apoptosis = through(
            model, optimizer_, apoptosis, lambda: start(mlp(norm=True, dropout=0.1), optimizer, lr)
        )
        train(model, optimizer_, apoptosis, range(stop, STEPS))
    history = [{**event.to_json(), "seconds": 0.0, "step_seconds": None} for event in apoptosis.history]
    return everything(model, optimizer_, apoptosis), history, apoptosis.groups


def by_state_dicts(model, optimizer, apoptosis, begin):
    states = copy.deepcopy([apoptosis.state_dict(), model.state_dict(), optimizer.state_dict()])
    generator = torch.get_rng_state()
    model, optimizer, apoptosis = begin()
    apoptosis.load_state_dict(states[0])
    model.load_state_dict(states[1])
    optimizer.load_state_dict(states[2])
    torch.set_rng_state(generator)
    return model, optimizer, apoptosis


@pytest.fixture
def by_checkpoint(tmp_path):
    def through(model, optimizer, apoptosis, begin):
        checkpoint.save(model, tmp_path / "run", apoptosis)
        torch.save([optimizer.state_dict(), torch.get_rng_state()], tmp_path / "optimizer")
        model, optimizer, apoptosis = begin()
        apoptosis.load_state_dict(checkpoint.load(model, tmp_path / "run"))
        saved, generator = torch.load(tmp_path / "optimizer")
        optimizer.load_state_dict(saved)
        torch.set_rng_state(generator)
        return model, optimizer, apoptosis

    return through


@pytest.fixture
def narrowed_first(tmp_path):
    """The checkpoint is loaded before the class is built: it then sees a small model."""

    def through(model, optimizer, apoptosis, begin):
        checkpoint.save(model, tmp_path / "run", apoptosis)
        states, generator, kind = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state(), type(optimizer)
        model = mlp(norm=True, dropout=0.1)
        state = checkpoint.load(model, tmp_path / "run")
        model, optimizer, apoptosis = start(model, kind, states["param_groups"][0]["lr"])
        apoptosis.load_state_dict(state)
        optimizer.load_state_dict(states)
        torch.set_rng_state(generator)
        return model, optimizer, apoptosis

    return through


OPTIMIZERS = {"SGD": (torch.optim.SGD, 0.1), "Adam": (torch.optim.Adam, 0.01)}


@pytest.fixture(scope="module")
def unbroken():
    return {name: resume(STEPS, *arguments, None) for name, arguments in OPTIMIZERS.items()}


# Looks come at steps 12, 20, 32 (and 52); a window of gathering is 6 steps.
@pytest.mark.parametrize("stop", [1, 5, 9, 12, 18, 20, 22, 30, 33])
@pytest.mark.parametrize("way", ["by_state_dicts", "by_checkpoint", "narrowed_first"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_is_bitwise_equal(optimizer, way, stop, unbroken, request):
    through = by_state_dicts if way == "by_state_dicts" else request.getfixturevalue(way)
    state, history, groups = resume(stop, *OPTIMIZERS[optimizer], through)
    expected, events, final = unbroken[optimizer]
    assert len([event for event in events if not event["rolled_back"]]) >= 2
    assert [event["widths_after"] for event in history] == [event["widths_after"] for event in events]
    assert state == expected
    assert history == events
    assert groups == final


def test_the_run_that_is_resumed_has_windows_and_events_where_they_are_said_to_be():
    model, optimizer, apoptosis = start(mlp(norm=True, dropout=0.1))
    torch.manual_seed(11)
    gathering, looks = [], []
    for i in range(STEPS):
        before = apoptosis._event_step
        train(model, optimizer, apoptosis, [i])
        looks += [i + 1] if apoptosis._event_step != before else []
        gathering += [i + 1] if apoptosis._batches else []
    assert looks == [12, 20, 31, STEPS]  # the last look where the policy stops, the others evenly between
    assert {9, 18, 30} <= set(gathering)
    assert not {1, 5, 12, 20, 22, 33} & set(gathering)


def test_a_finished_run_that_is_made_longer_has_looks_to_come():
    model, optimizer, apoptosis = start(total_steps=16)
    train(model, optimizer, apoptosis, range(16))
    assert [event.step for event in apoptosis.history] == [12, 16]
    fresh, other, longer = start()
    longer.load_state_dict(apoptosis.state_dict())
    fresh.load_state_dict(model.state_dict())
    train(fresh, other, longer, range(16, STEPS))
    assert longer._looked is not None
    assert longer._looked.step > 16
    _, _, same = start(total_steps=16)
    same.load_state_dict(apoptosis.state_dict())
    assert same.state_dict() == apoptosis.state_dict()


def test_followers_and_several_optimizers_are_narrowed_by_loading():
    def begin():
        model = mlp()
        ema = AveragedModel(model)
        optimizers = [torch.optim.SGD(model[:3].parameters(), 0.1), torch.optim.Adam(model[3:].parameters(), 0.003)]
        return (
            model,
            ema,
            optimizers,
            Apoptosis(model, optimizers, example_inputs=X[:4], followers=[ema], policy=POLICY),
        )

    model, ema, optimizers, apoptosis = begin()
    F.cross_entropy(model(X), Y).backward()
    for optimizer in optimizers:
        optimizer.step()
    apoptosis.apoptose(X[:256], budget=0.05)
    assert widths(apoptosis)[0] < 64
    states = copy.deepcopy(
        [apoptosis.state_dict(), model.state_dict(), ema.state_dict(), *(o.state_dict() for o in optimizers)]
    )
    model, ema, optimizers, apoptosis = begin()
    for owner, state in zip((apoptosis, model, ema, *optimizers), states, strict=True):
        owner.load_state_dict(state)
    assert [p.shape for p in ema.module.parameters()] == [p.shape for p in model.parameters()]
    F.cross_entropy(model(X), Y).backward()
    for optimizer in optimizers:
        optimizer.step()
    ema.update_parameters(model)


def test_state_is_plain_data_between_looks():
    model, optimizer, apoptosis = start()
    train(model, optimizer, apoptosis, range(13))
    text = json.dumps(apoptosis.state_dict(), allow_nan=False)
    _, _, fresh = start()
    fresh.load_state_dict(json.loads(text))
    assert widths(fresh) == widths(apoptosis)
    assert fresh.history == apoptosis.history


def test_state_of_another_model_is_refused_and_nothing_changed():
    _, _, apoptosis = start()
    model, _, other = start(LeNet())
    before = bits(model.state_dict())
    mine = other.state_dict()
    for state, words in (
        (apoptosis.state_dict(), "of this model"), ({}, "of this model"), (None, "what `state_dict` gives"),
        (mine | {"step": "3"}, "`step` of `state` must be as"), (mine | {"history": [{}]}, "`history` and `batches`"),
        (mine | {"widths": dict.fromkeys(mine["widths"], 10 ** 6)}, "`widths` of `state` must be from 1"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=words):
            other.load_state_dict(state)
    state = other.state_dict()
    state["shapes"] = {name: [size + 1 for size in shape] for name, shape in state["shapes"].items()}
    with pytest.raises(SurgeryError, match="full size"):
        other.load_state_dict(state)
    assert bits(model.state_dict()) == before
    assert widths(other) == [16, 32, 3]


def test_public_names_are_documented():
    for name in ("step", "apoptose", "explain", "report", "state_dict", "load_state_dict", "groups"):
        assert inspect.getdoc(getattr(Apoptosis, name))


@pytest.mark.parametrize("width", [8, 12, 16])
def test_a_grouped_convolution_never_looks_like_a_depthwise_one(width):
    torch.manual_seed(0)
    convolutions = (
        nn.Conv2d(3, width, 3),
        nn.Conv2d(width, 2 * width, 3, groups=4),
        nn.Conv2d(2 * width, 8, 3, groups=4),
    )
    layers = [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    x, y = torch.randn(64, 3, 8, 8), torch.randint(0, 5, (64,))
    policy = replace(POLICY, multiple=1, floor=1, guard=99.0, tolerance=99.0)
    apoptosis = Apoptosis(model, example_inputs=x[:8], loss_fn=F.cross_entropy, policy=policy)
    for _ in range(2):
        apoptosis.apoptose(x, targets=y, budget=99.0)
        F.cross_entropy(model(x), y).backward()
    assert [(c.in_channels, c.out_channels, c.groups) for c in convolutions] == [(3, 8, 1), (8, 8, 4), (8, 4, 4)]
    assert [tuple(c.weight.shape[:2]) for c in convolutions] == [(8, 3), (8, 2), (4, 2)]
