"""What the tests of the trainers share: data, a network, and a torchvision that imports (trainers look at it)."""

import importlib.util
import runpy
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from apoptorch import Policy

POLICY = Policy(
    payback=0, full_run=1, room=0, first_step=6, samples=48, gap=1.5, stop=1.0, price=5.0, tolerance=0.1, multiple=1,
    floor=4,
)  # fmt: skip


def prepare_torchvision():
    """Without its binary, torchvision's operators are declared; without torchvision there is nothing to do."""
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        from benchmarks.zoo.vision import stub_torchvision

        stub_torchvision()


def data(n=960, seed=0):
    x = torch.randn(n, 10, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, 0] > x[:, 1]).long()


def network(width=48):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))


def loss_fn(output, targets):
    return cross_entropy(output, targets)


def same(a, b):
    """Equal bit for bit, name by name."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run_example(name, capsys):
    """What an example prints; it must be short enough to read."""
    path = Path(__file__).parents[1] / "examples" / "trainers" / name
    assert len(path.read_text().splitlines()) <= 60
    runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out
