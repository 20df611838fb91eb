"""Runs that are killed or moved to other ranks, and go on from their last checkpoint."""

import json
import math
import os
import random
import signal
import sys
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_distributed import BATCH, POLICY, STEPS, X, assert_same, mlp, share, timeless, whole
from test_sharding import sharded
from torch import nn
from torch.nn.parallel import DistributedDataParallel as ddp
from torch.optim.swa_utils import AveragedModel

from apoptorch import Apoptosis, ApoptosisError, CheckpointError, load, save
from apoptorch.distributed import fingerprint
from apoptorch.training_state import decoded, encoded, random_state

KILLS = 30


class Run:
    """A run with all that has state: optimizer, scheduler, scaler, EMA copy, dropout, batch norm, shuffled data."""

    def __init__(self):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)  # noqa: NPY002
        self.model = nn.Sequential(
            nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 24), nn.Tanh(),
            nn.Linear(24, 3),
        )  # fmt: skip
        self.ema = AveragedModel(self.model, avg_fn=lambda old, new, _: 0.9 * old + 0.1 * new)
        optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        self.parts = {
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 15], 0.5),
            "scaler": torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=5),
            "ema": self.ema,
        }
        self.apoptosis = Apoptosis(
            self.model, optimizer, example_inputs=X[:BATCH], loss_fn=F.cross_entropy, total_steps=STEPS,
            policy=replace(POLICY, price=0.25), followers=[self.ema],  # so that it shrinks twice
        )  # fmt: skip
        self.step = 0

    def resume(self, folder):
        self.step = load(self.model, folder, self.apoptosis, **self.parts, step=0)["step"]

    def train(self, end, folder=None):
        optimizer, scaler = self.parts["optimizer"], self.parts["scaler"]
        for i in range(self.step, end):
            x, y = share(i, 0, 1)
            x = x + 0.01 * random.random() + 0.01 * np.random.rand()  # noqa: NPY002
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(self.model(x), y)).backward()
            scaler.step(optimizer), scaler.update()
            self.parts["scheduler"].step()
            self.ema.update_parameters(self.model)
            self.apoptosis.step(x, targets=y)
            if folder is not None and i % 2:
                save(self.model, folder, self.apoptosis, **self.parts, step=i + 1)

    def result(self):
        states = [item.state_dict() for item in (self.model, *self.parts.values())]
        history = timeless([event.to_json() for event in self.apoptosis.history])
        return {"bits": fingerprint([*states, torch.get_rng_state(), random.getstate()]), "history": history}


def life(run, folder, moment, pipe):
    """One process: resumes if it can, and is killed at the given call of a function, counted from there on.

    Returns the run's result, the number of calls, and that at which the first event began.
    """
    calls, first = 0, 0

    def count(frame, event, argument):
        nonlocal calls, first
        calls += 1
        if not first and event == "call" and frame.f_code.co_name == "remove_":
            first = calls
        if calls == moment:
            names = set[str]()
            while frame is not None:
                names.add(frame.f_code.co_name)
                frame = frame.f_back
            os.write(pipe, b"e" if "remove_" in names else b"s" if "save" in names else b"t")
            os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)
    if (folder / "manifest.json").exists():
        run.resume(folder)
    run.train(STEPS, folder)
    sys.setprofile(None)
    return run.result(), calls, first


def lives(_, folder):
    """Forks one process after the other, from one that has all built but trains nothing (builds of torch for GPUs have
    no backward pass in a process whose parent had one); each but the last is killed."""
    folder, fresh, start = Path(folder), Run(), random.getstate()
    reader, writer = os.pipe()

    def forked(name, work):
        """The child's exit status; what `work` returns is in the file."""
        if (pid := os.fork()) == 0:
            random.setstate(start)  # Python seeds anew after a fork
            (folder / f"{name}.json").write_text(json.dumps(work()))
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def result(name):
        return json.loads((folder / f"{name}.json").read_text())

    def unbroken():
        fresh.train(STEPS)
        return fresh.result()

    assert forked("unbroken", unbroken) == 0
    assert forked("whole", lambda: life(fresh, folder / "run", -1, writer)) == 0
    whole, calls, first = result("whole")
    dice, round_, ends = random.Random(0), 0, []
    while len(ends) < KILLS:
        round_ += 1
        while True:
            moment = dice.randrange(calls // 5) if ends else first + dice.randrange(500)  # for one within an event
            moment = moment if len(ends) < KILLS else -1
            place = folder / str(round_)
            if forked(f"{round_}", lambda moment=moment, place=place: life(fresh, place, moment, writer)[0]) == 0:
                break
            ends.append(os.read(reader, 1).decode())
    return result("unbroken"), whole, [result(i + 1) for i in range(round_)], ends


def test_a_run_killed_thirty_times_ends_as_the_one_that_was_not(tmp_path):
    (unbroken, whole, found, ends) = ranks.run(1, lives, str(tmp_path))[0]
    assert sum(not event["rolled_back"] for event in unbroken["history"]) >= 2
    assert whole == unbroken  # saving changes nothing
    assert len(ends) >= KILLS
    assert {"e", "s", "t"} <= set(ends)  # inside events, saves, and ordinary training
    for result in found:
        assert result == unbroken


def segment(rank, world, folder, begin, end, parallel):
    """Steps `begin` to `end` on so many ranks, resumed from and saved to `folder`."""
    model = mlp()
    wrapped = parallel(model) if world > 1 else model
    optimizer = torch.optim.Adam(wrapped.parameters(), 0.01)
    apoptosis = Apoptosis(
        wrapped, optimizer, example_inputs=share(0, rank, world)[0], loss_fn=F.cross_entropy, total_steps=STEPS,
        policy=POLICY,
    )  # fmt: skip
    widths = []
    if begin:
        assert load(wrapped, folder, apoptosis, optimizer=optimizer, step=None) == {"step": begin}
    gathered = len(apoptosis.state_dict()["batches"])
    for i in range(begin, end):
        x, y = share(i, rank, world)
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
        apoptosis.step(x, targets=y)
        widths.append([group.width for group in apoptosis.groups])
    if end < STEPS:
        save(wrapped, folder, apoptosis, optimizer=optimizer, step=end)
    weights = {name: whole(p) for name, p in model.named_parameters()}
    return {"widths": widths, "weights": weights, "gathered": gathered}


def journey(folder, *stages):
    """(ranks, last step, wrapper) one after the other; widths of all steps, and the last weights."""
    widths, gathered, begin, last = [], [], 0, None
    for world, end, parallel in stages:
        every = ranks.run(world, segment, world, folder, begin, end, parallel)
        last = every[0]
        assert all(fingerprint(other) == fingerprint(last) for other in every)
        widths, gathered, begin = widths + last["widths"], [*gathered, last["gathered"]], end
    assert last is not None
    return {**last, "widths": widths, "gathered": gathered}


def test_a_run_goes_on_on_any_number_of_ranks(tmp_path):
    alone = journey(str(tmp_path), (1, STEPS, ddp))
    looks = [i for i in range(1, STEPS) if alone["widths"][i] != alone["widths"][i - 1]]
    assert len(looks) >= 2
    middle, after = looks[1] - 1, looks[1] + 1  # data for the second event is being gathered; it has happened
    journeys = (
        [(2, middle, ddp), (1, STEPS, ddp)],
        [(2, middle, ddp), (4, after, sharded), (2, STEPS, ddp)],
        [(2, middle, sharded), (1, after, ddp), (4, STEPS, sharded)],
    )
    for i, stages in enumerate(journeys):
        found = journey(str(tmp_path / str(i)), *stages)
        assert_same(found, alone)
        assert found["gathered"][1] > 0


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.just("!"), inner)
        | st.dictionaries(st.integers() | st.tuples(st.integers(), st.text()), inner).map(OrderedDict)
    ),
    max_leaves=12,
)


@given(plain)
def test_plain_data_comes_back_from_json_as_it_was(value):
    tensors = {}
    text = json.dumps(encoded(value, tensors, "x"), allow_nan=False)
    found = decoded(json.loads(text), tensors)
    assert repr(found) == repr(value)  # nan is not equal to itself


def test_tensors_and_counters_come_back_and_objects_are_refused():
    value = {
        "state": {0: {"step": torch.tensor(3.0)}, 1: [torch.arange(2)]},
        "c": Counter([5, 5, 7]),
        "n": np.float64(2),
    }
    tensors = {}
    found = decoded(json.loads(json.dumps(encoded(value, tensors, "optimizer"))), tensors)
    assert found["c"] == Counter([5, 5, 7])
    assert type(found["c"]) is Counter
    assert found["n"] == 2.0
    assert torch.equal(found["state"][1][0], torch.arange(2))
    assert all(name.startswith("optimizer/") for name in tensors)
    with pytest.raises(
        CheckpointError, match="`optimizer/lambda` must be numbers, text, lists, dicts or tensors, got fun"
    ):
        encoded({"lambda": lambda: 0}, {}, "optimizer")


DAMAGES = [
    {"!": "tensor", "of": "elsewhere"}, {"!": "tensor", "of": []}, {"!": "module", "of": "os"}, {"!": "tuple", "of": 3},
    {"!": "float", "of": "huge"}, {"!": "dict", "of": [[[], 1]]}, {"!": [], "of": 1}, {"!": "dict"},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_training_state_that_is_not_to_be_trusted(tmp_path, damage):
    model = mlp()
    save(model, tmp_path, step=3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["training"]["step"] = [damage]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    before = fingerprint(model.state_dict())
    with pytest.raises(CheckpointError, match="`training` must be what `save` wrote"):
        load(model, tmp_path, step=None)
    assert fingerprint(model.state_dict()) == before


def everything(run):
    parts = {name: item.state_dict() for name, item in run.parts.items()}
    generators = random_state()
    return fingerprint([run.model.state_dict(), parts, run.apoptosis.state_dict(), generators["torch"]]), (
        generators["python"], run.apoptosis.groups, [module.extra_repr() for module in run.model.modules()],
    )  # fmt: skip


WRONG = {
    ("apoptosis", "wake"): None, ("apoptosis", "history"): [{}], ("apoptosis", "batches"): [[1]],
    ("apoptosis", "shapes", "0.weight"): ["x", 10], ("apoptosis", "widths"): 5, ("apoptosis", "widths", "0"): 33,
    ("training", "optimizer", "param_groups"): [], ("training", "scheduler"): 3, ("training", "ema"): {},
    ("training", "scaler"): {}, ("training", "random numbers"): None,
    ("training", "random numbers", 0, "python", "of", 1, "of"): [1], ("training", "random numbers", 0, "numpy"): 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder, run = tmp_path_factory.mktemp("saved"), Run()
    run.train(9)
    assert run.apoptosis.history
    save(run.model, folder, run.apoptosis, **run.parts, step=9)
    other = Run()
    other.train(3)
    return folder, other


@pytest.mark.parametrize("place", WRONG, ids=lambda place: "/".join(map(str, place)))
def test_a_run_that_can_not_be_resumed_is_left_as_it_was(place, saved, tmp_path):
    folder, run = saved
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    manifest = content = json.loads((folder / "manifest.json").read_text())
    for key in place[:-1]:
        content = content[key]
    content[place[-1]] = WRONG[place]
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    before = everything(run)
    with pytest.raises(ApoptosisError, match=r"must (be|name)"):
        run.resume(tmp_path)
    assert everything(run) == before


def test_what_was_not_saved_is_named(tmp_path):
    model, generator = mlp(), torch.get_rng_state()
    save(model, tmp_path, epoch=3, best=math.inf)
    torch.manual_seed(5)
    assert load(mlp(), tmp_path, epoch=None) == {"epoch": 3, "best": math.inf}
    assert torch.equal(torch.get_rng_state(), generator)
    with pytest.raises(CheckpointError) as raised:
        load(model, tmp_path, Apoptosis(model, example_inputs=X[:4]), optimizer=torch.optim.SGD(model.parameters()))
    assert "`apoptosis` must be None, as the checkpoint has none" in str(raised.value)
    assert "`optimizer` must be in the checkpoint, got only best, epoch" in str(raised.value)
