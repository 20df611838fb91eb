"""What `explain` says: one sentence for every cause, and each cause met in a real run or made by hand."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from apoptorch import Apoptosis, Policy
from apoptorch.explain import Outlook, explained
from apoptorch.plan import ChannelGroup, Event, GroupChange

FREE = ChannelGroup("free", 64, 64, "relu", ())
BEFORE = Outlook(looked=None, next_look=30, unpaid=False, floor=8)


def event(step, after, reason=None):
    change = GroupChange("free", 64, after, 0.02, None, 0.1)
    widths = {"free": 64 if reason else after}
    return Event(
        step, (change,), {"free": 64}, widths, 100, 50, 1.0, 0.5, 0.1, 0.1, 0.02, 0.5, None, None, reason is not None,
        reason,
    )  # fmt: skip


def sentence(group=FREE, history=(), outlook=BEFORE):
    (text,) = explained([group], history, outlook).values()
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("reason", "advice"),
    [
        ("protected by protect=('a',)", "take it out of `protect`"),
        ("no layer reads its channels", "the model's output"),
        ("aten.cumsum (a) has no rule", "without this op"),
        ("forward() fails with fewer of them: RuntimeError", "x.shape[1]"),
        ("a.weight both makes and reads these channels (a shared module)", "a layer of its own"),
    ],
)
def test_a_pinned_group_gives_its_reason_and_what_to_try(reason, advice):
    text = sentence(replace(FREE, prunable=False, reason=reason))
    assert text.startswith("keeps its 64 channels: ")
    assert reason in text
    assert advice in text


def test_a_group_that_shrank_says_when_and_at_what_price():
    text = sentence(replace(FREE, width=16), [event(40, 32), event(90, 16), event(95, 8, "it hurt")])
    assert text.startswith("64 -> 16 channels")
    assert "step 90" in text
    assert "0.02" in text


def test_a_group_that_shrank_in_a_run_that_is_not_on_record_says_so_much():
    assert sentence(replace(FREE, width=16)) == "64 -> 16 channels"


@pytest.mark.parametrize(
    ("history", "outlook", "words"),
    [
        ([event(40, 8, "the loss rose by 3")], BEFORE, ("step 40", "undone", "the loss rose by 3", "conservative")),
        ([], replace(BEFORE, floor=64), ("no group gets narrower than 64", "Policy(floor")),
        ([], replace(BEFORE, looked=event(40, 64)), ("nothing was redundant at this price", "aggressive")),
        ([], replace(BEFORE, looked=replace(event(40, 64), notes={"free": "it has 9 directions"})), ("9 directions",)),
        ([], BEFORE, ("next look at step 30",)),
        ([], replace(BEFORE, unpaid=True), ("would not pay for itself", "next look at step 30", "Policy(payback=0)")),
        ([], replace(BEFORE, next_look=None), ("no look is left", "apoptorch.shrink after training")),
    ],
)
def test_every_obstacle_has_its_sentence(history, outlook, words):
    text = sentence(history=history, outlook=outlook)
    assert text.startswith("64 -> 64 channels: ")
    for word in words:
        assert word in text


def test_a_look_that_would_not_pay_is_told_while_another_is_to_come():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    policy = Policy(payback=1e9, first_step=10, samples=64)
    x, y = torch.randn(256, 10), torch.randint(3, (256,))
    loss_fn = nn.functional.cross_entropy
    apoptosis = Apoptosis(model, optimizer, example_inputs=x, loss_fn=loss_fn, total_steps=100, policy=policy)
    apoptosis._work = lambda: 1.0  # a network slow enough to be looked at, on any machine
    apoptosis._wake = apoptosis._next_wake()
    for _ in range(12):
        loss = loss_fn(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        apoptosis.step(x, targets=y)
    assert apoptosis.history == []
    lines = apoptosis.explain().splitlines()
    assert "at the last look it would not pay for itself" in lines[0]
    assert "next look at step" in lines[0]
