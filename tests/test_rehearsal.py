"""Sizes that a user's code holds: attributes that follow a removal, numbers that can't, scales that must not."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import planted
from torch import nn

from apoptorch import Apoptosis, load, save
from apoptorch.graph import trace
from apoptorch.integrations import narrow_on_load
from apoptorch.plan import Fold, FoldPlan, SizeAttribute
from apoptorch.rehearsal import rehearsed
from apoptorch.surgery import Surgery
from benchmarks.zoo.examine import HALVING, halved

ROOT = Path(__file__).parents[1]


class Attention(nn.Module):
    """By hand; the value channels of a head are counted by an attribute."""

    def __init__(self, width: int = 12, heads: int = 2, values: int = 6, scale: str = "fixed"):
        super().__init__()
        self.heads, self.value_size, self.scale = heads, values, scale
        self.factor = float(values) ** -0.5
        self.first = nn.Linear(5, width)
        self.query, self.key = nn.Linear(width, width), nn.Linear(width, width)
        self.value, self.out = nn.Linear(width, heads * values), nn.Linear(heads * values, 3)

    def forward(self, x):
        x = self.first(x)
        b, t, _ = x.shape
        q, k = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key))
        v = self.value(x).view(b, t, self.heads, self.value_size).transpose(1, 2)
        factor = self.factor if self.scale == "fixed" else self.value_size**-0.5
        weights = (q @ k.transpose(-1, -2) * factor).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, self.heads * self.value_size))


def built(**settings):
    torch.manual_seed(0)
    return Attention(**settings).double(), torch.randn(24, 4, 5, dtype=torch.float64)


def found(model, x):
    return {group.name: group for group in rehearsed(model, trace(model, (x,), {})[0], (x,), {})}


def test_an_attribute_that_counts_a_heads_channels_follows():
    model, x = built()
    before = copy.deepcopy(vars(model))
    group = found(model, x)["value"]
    assert group.prunable
    assert group.sizes == (SizeAttribute("", "value_size", 1, 2),)
    assert (model.value_size, model.factor, vars(model).keys()) == (6, 6**-0.5, before.keys())
    outcome, _ = planted(model, (x,))
    assert outcome.problems == []
    assert "value" in outcome.planted
    assert (model.value_size, model.factor) == (outcome.left["value"] // 2, 6**-0.5)


def test_it_comes_back_from_disk_with_and_without_apoptosis(tmp_path):
    assert halved(lambda: built()[0], (built()[1],), {})["halved_problems"] == []
    model, x = built()
    apoptosis = Apoptosis(model, example_inputs=x, policy=HALVING)
    apoptosis.apoptose(x)
    assert model.value_size == 3
    save(model, tmp_path, apoptosis)
    other, _ = built()
    load(other, tmp_path)
    third, _ = built()
    resumed = Apoptosis(third, example_inputs=x)
    load(third, tmp_path, resumed)
    assert (other.value_size, third.value_size) == (3, 3)
    assert resumed.apoptose(x).reason or third.value_size <= 3
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def one_less(group):
    keep = group.leading(group.width - group.blocks)
    return FoldPlan(group.name, keep, (Fold(torch.eye(group.width, dtype=torch.float64)[:, keep]),))


def test_followers_have_it_too_and_undone_is_undone():
    model, x = built()
    follower, before = copy.deepcopy(model), copy.deepcopy(vars(model))
    groups = list(found(model, x).values())
    with Surgery(model, followers=[follower]) as surgery:
        surgery.fold_all_(groups, [one_less(group) for group in groups if group.name == "value"])
        assert (model.value_size, follower.value_size) == (5, 5)
        assert follower(x).shape == model(x).shape
        surgery.undo_()
    assert vars(model).keys() == before.keys()
    assert (model.value_size, follower.value_size) == (6, 6)


def test_a_scale_that_follows_the_attribute_pins():
    model, x = built(scale="by size")
    group = found(model, x)["value"]
    assert not group.prunable
    assert "a number that follows their size" in (group.reason or "")
    assert (group.sizes, model.value_size) == ((), 6)


class Numbered(nn.Module):
    """A size that is no attribute."""

    def __init__(self, compute) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 12), nn.Linear(5, 12), nn.Linear(12, 3)
        self.compute = compute

    def forward(self, x):
        return self.last(self.compute(self.first(x).tanh(), self.second(x).tanh()))


@pytest.mark.parametrize(
    ("compute", "told"),
    [
        (lambda a, b: a.view(-1, 12) + b, "fails with fewer of them"),
        (lambda a, b: b + torch.cat([b, a, a], -1)[..., 12 : 12 + a.shape[-1]], "takes other channels"),
    ],
    ids=["view", "slice"],
)
def test_a_number_in_the_code_pins(compute, told):
    """The slice fails nowhere; with 11 channels it begins with the second of them."""
    torch.manual_seed(0)
    groups = found(Numbered(compute).double(), torch.randn(7, 5, dtype=torch.float64))
    assert not any(group.prunable for group in groups.values())
    assert any(told in (group.reason or "") for group in groups.values())


class Through(nn.Linear):
    """All of these pass one line of code."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias).tanh()


class Halves(nn.Module):
    """Twenty layers; a number divides what the third of them makes."""

    def __init__(self) -> None:
        super().__init__()
        self.begin, self.end = (nn.Sequential(*(Through(8, 8) for _ in range(count))) for count in (3, 14))
        self.left, self.right, self.last = Through(4, 8), Through(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        left, right = self.begin(x).split(4, -1)
        return self.last(self.end(self.left(left) + self.right(right)))


def test_of_many_that_pass_a_failing_line_those_are_pinned_that_make_it_fail():
    """Of the first half, none may go: the parts would be of 4 and 3 channels. The second half may be smaller."""
    torch.manual_seed(0)
    model, x = Halves().double(), torch.randn(36, 8, dtype=torch.float64)
    groups = found(model, x)
    pinned = {name for name, group in groups.items() if not group.prunable}
    (left,) = pinned - {"last"}
    assert groups[left].producers[0].tensor == "begin.2.weight"
    assert groups[left].consumers[0].weight.tensor == "left.weight"
    assert "fails with fewer of them" in (groups[left].reason or "")
    assert len(groups) == 20
    outcome, _ = planted(model, (x,), most=3)
    assert outcome.problems == []


FRESH = """
import sys, torch
from apoptorch import load
from apoptorch.integrations import narrow_on_load
from test_rehearsal import built
folder = sys.argv[1]
x = torch.load(f"{folder}/x.pt", weights_only=True)
for read in (
    lambda model: narrow_on_load(model).load_state_dict(torch.load(f"{folder}/state.pt", weights_only=True)),
    lambda model: load(model, f"{folder}/saved"),
):
    model, _ = built()
    read(model)
    print(model.value_size, model.value.out_features, model.out.in_features, model.state_dict()._metadata[""])
    assert torch.equal(model.eval()(x), torch.load(f"{folder}/y.pt", weights_only=True))
"""


def test_a_fresh_process_finds_the_attributes_that_followed(tmp_path):
    model, x = built()
    Apoptosis(model, example_inputs=(x,), policy=HALVING).apoptose(x)
    assert model.value_size == 3
    torch.save(model.state_dict(), tmp_path / "state.pt")
    save(model, tmp_path / "saved")
    torch.save(x, tmp_path / "x.pt")
    torch.save(model.eval()(x).detach(), tmp_path / "y.pt")
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), str(ROOT)])
    shown = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path], check=True, env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True,
    ).stdout  # fmt: skip
    metadata = {"version": 1, "apoptosis_sizes": {"value_size": 3}}
    assert shown.splitlines() == [f"3 6 6 {metadata}"] * 2


def test_a_state_dict_s_sizes_are_checked_and_undone_with_the_rest():
    model, _ = built()
    with Surgery(model) as surgery:
        surgery.resize_({"": {"value_size": 4}})
        assert model.state_dict()._metadata[""]["apoptosis_sizes"] == {"value_size": 4}
        surgery.undo_()
    state = model.state_dict()
    assert state._metadata[""] == {"version": 1}
    state._metadata[""]["apoptosis_sizes"] = {"value_size": 7}
    with pytest.raises(RuntimeError, match="`value_size` must be an integer of at least 7, got 6"):
        narrow_on_load(model).load_state_dict(state)


class Remembering(nn.Module):
    """Keeps what it computed once, but not while it is compiled, as the advice for such caches goes."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.known = nn.Linear(5, 12), nn.Linear(12, 3), {}

    def forward(self, x):
        factor = torch.arange(1.0, 4.0)
        if not torch.compiler.is_compiling():
            factor = self.known.setdefault(3, factor)
        return self.last(self.first(x).tanh()) * factor


def test_what_forward_keeps_holds_no_tensor_without_data():
    model, x = Remembering(), torch.randn(7, 5)
    assert rehearsed(model, trace(model, (x,), {})[0], (x,), {})[0].prunable
    assert not model.known
    assert type(model(x)) is torch.Tensor


def test_matrices_that_forward_transposes_are_layers():
    class Turned(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    torch.manual_seed(0)
    model = nn.Sequential(Turned(5, 40), nn.GELU(), Turned(40, 3)).double()
    outcome, apoptosis = planted(model, (torch.randn(48, 5, dtype=torch.float64),), most=8)
    assert outcome.problems == []
    assert [group.width for group in apoptosis.groups if group.prunable] == [8]
    assert (model[0].out_features, model[2].weight.shape) == (8, (3, 8))


def test_a_transposed_matrix_that_another_op_reads_stays():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)

        def forward(self, x):
            turned = self.last.weight.T
            return self.first(x).tanh() @ turned + turned.sum()

    model, x = Turned(), torch.randn(48, 5)
    event = Apoptosis(model, example_inputs=x, policy=HALVING).apoptose(x)
    assert (event.changes, model.first.out_features) == ((), 12)


class Auxiliary(nn.Module):
    """As GoogLeNet: in training mode a second head reads the hidden neurons too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 12), nn.Linear(12, 3)
        self.side, self.end = nn.Linear(12, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.first(x).relu()
        return (self.last(hidden), self.end(self.side(hidden).relu())) if self.training else self.last(hidden)


def test_what_only_training_reads_keeps_its_width():
    """No calibration sees the auxiliary head's neurons; those that it shares with the other head go as ever."""
    torch.manual_seed(0)
    model, x = Auxiliary().double(), torch.randn(48, 5, dtype=torch.float64)
    outcome, apoptosis = planted(model, (x,), most=8)
    assert outcome.problems == []
    assert outcome.left["first"] == 6
    (side,) = [group for group in apoptosis.groups if group.name == "side"]
    assert not side.prunable
    assert "training mode only" in side.reason
    assert model.side.weight.shape == (8, 6)
    model.train()(x)[1].sum().backward()


class Rescaled(nn.Module):
    """As RWKV: in eval mode a weight is half as large, which forward() sees to when the mode has changed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.halved = nn.Linear(5, 12), nn.Linear(12, 3), False

    def forward(self, x):
        if self.halved == self.training:
            with torch.no_grad():
                self.last.weight.mul_(2.0 if self.training else 0.5)
            self.halved = not self.training
        return self.last(self.first(x).tanh() * (1.0 if self.training else 2.0))


def test_what_forward_notes_without_data_is_forgotten():
    """Else the weight would stay as it is, and the flag say that it is half as large."""
    torch.manual_seed(0)
    model, x = Rescaled().double(), torch.randn(48, 5, dtype=torch.float64)
    expected = model(x)
    group = found(model, x)["first"]
    assert group.prunable
    assert not model.halved
    assert torch.equal(model(x), expected)
    assert planted(model, (x,), most=8)[0].problems == []
