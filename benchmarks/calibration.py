"""Compare what events predict and certify with what they do, one JSON line per event in results/calibration.jsonl.

A run that the file already holds for the same commit is skipped, so an interrupted one goes on.

Small networks train on small real data sets. At several points of a run, removals of many sizes are tried on copies of
the network, and one is carried out for good, so that later ones meet a network that has shrunk. Each is measured on all
of the training data, which is the population that the calibration batches are drawn from, and on fresh data.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from comparison import mlp, sgd
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from apoptorch.batches import Batch, LossFn
from apoptorch.bounds import standard_error
from apoptorch.evaluation import Evaluation, evaluate
from apoptorch.graph import trace
from apoptorch.network import Network
from apoptorch.plan import Event
from apoptorch.policy import POLICIES
from apoptorch.removal import judge, remove_
from benchmarks.core import RESULTS as CORE
from benchmarks.core import conditions

RESULTS = CORE.parent / "calibration.jsonl"
POINTS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # shares of the run
BUDGETS = (0.003, 0.006, 0.0125, 0.025, 0.05)  # asked increase of the loss, as a share of it
PRICES = (0.015, 0.0425, 0.15)  # of the three named policies
NORMAL = replace(POLICIES["normal"], multiple=4, floor=4, rebalance=False)
UNGUARDED = replace(NORMAL, guard=float("inf"))  # the guard's verdict is recorded, not obeyed

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Recipe:
    """A training run; `size` inputs to train on, as many fresh ones."""

    model: Callable[[], nn.Module]
    optimizer: Callable[..., Optimizer]
    loss_fn: LossFn
    data: Callable[[], Data]
    size: int = 8192
    batch: int = 128
    steps: int = 400


class Residual(nn.Module):
    """Two blocks x + f(x) between a first and a last linear layer."""

    def __init__(self, inputs: int, width: int, outputs: int):
        super().__init__()
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 256), nn.GELU(), nn.Linear(256, width)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


def tanh_mlp() -> nn.Sequential:
    return nn.Sequential(*(nn.Tanh() if isinstance(m, nn.ReLU) else m for m in mlp(196, 256, 256, 10)))


def cnn() -> nn.Sequential:
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((1, 24), (24, 48)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 9, 128), nn.ReLU(), nn.Linear(128, 10))


def images() -> Data:
    """Fashion-MNIST, average-pooled to 14x14."""
    import datasets

    data = datasets.fashion_mnist()
    return F.avg_pool2d(data.train_x, 2), data.train_y


def digits() -> Data:
    import datasets

    data = datasets.digits()
    return torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y])


def collisions() -> Data:
    import datasets

    data = datasets.higgs()
    return data.train_x, data.train_y


def masses() -> Data:
    """A regression: the last of the 28 features of a collision, a reconstructed mass, from its 21 measured ones."""
    x, _ = collisions()
    return x[:, :21], x[:, 27:]


adamw = partial(AdamW, lr=1e-3)
RECIPES = {
    "digits, ReLU": Recipe(lambda: mlp(64, 256, 256, 10), sgd, F.cross_entropy, digits, size=896, batch=32),
    "images, ReLU": Recipe(lambda: mlp(196, 256, 256, 10), sgd, F.cross_entropy, images),
    "images, tanh": Recipe(tanh_mlp, adamw, F.cross_entropy, images),
    "images, CNN with batch norm": Recipe(cnn, sgd, F.cross_entropy, images, size=4096, steps=200),
    "images, residual GELU": Recipe(lambda: Residual(196, 64, 10), adamw, F.cross_entropy, images),
    "collisions, ReLU": Recipe(
        lambda: mlp(28, 256, 256, 256, 1), adamw, F.binary_cross_entropy_with_logits, collisions
    ),
    "masses, ReLU, regression": Recipe(lambda: mlp(21, 256, 256, 1), adamw, F.mse_loss, masses),
}


def run(name: str, seed: int) -> Iterator[dict]:
    """Train once; yields the events of every point."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    model, generator = recipe.model(), torch.Generator().manual_seed(seed)
    optimizer = recipe.optimizer(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    x, y = recipe.data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, fresh = ((x[part], y[part]) for part in (order[: recipe.size], order[recipe.size :][: recipe.size]))
    groups, costs = trace(model, (x[: recipe.batch],), {})
    network = Network(model, (optimizer,), (), groups, costs)
    recent: list[Batch] = []
    wanted, first_loss = NORMAL.samples * 3 // 2 // recipe.batch, float("nan")
    points = {round(share * recipe.steps) for share in POINTS}
    for step in range(1, recipe.steps + 1):
        index = torch.randint(recipe.size, (recipe.batch,), generator=generator)
        batch = Batch((train[0][index],), {}, train[1][index])
        loss = recipe.loss_fn(model(*batch.args), batch.targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        first_loss = loss.item() if step == 1 else first_loss
        recent = [*recent, batch][-wanted:]
        if step in points:
            yield from _point(network, recent, recipe, (train, fresh), step, first_loss)


def _point(
    network: Network, recent: list[Batch], recipe: Recipe, populations: tuple[Data, Data], step: int, first_loss: float
) -> Iterator[dict]:
    """The events tried at one step, and one that stays."""
    plan_on, held_out = recent[0::3] + recent[1::3], recent[2::3]
    before = [_everything(network.model, data, recipe.loss_fn) for data in populations]
    for kind, sizes in (("budget", BUDGETS), ("price", PRICES)):
        for size in sizes:
            trial = Network(copy.deepcopy(network.model), (), (), list(network.groups), network.costs)
            budget, price = (size * before[0].loss, float("inf")) if kind == "budget" else (None, size)
            event = remove_(
                trial, plan_on, held_out, recipe.loss_fn, UNGUARDED, budget, price=price, first_loss=first_loss,
                step=step,
            )  # fmt: skip
            if event.certificate is not None:
                after = [_everything(trial.model, data, recipe.loss_fn) for data in populations]
                yield {"step": step, kind: size, **_compared(event, before, after, first_loss)}
    remove_(network, plan_on, held_out, recipe.loss_fn, NORMAL, price=NORMAL.price, first_loss=first_loss, step=step)


def _everything(model: nn.Module, data: Data, loss_fn: LossFn) -> Evaluation:
    return evaluate(
        model, [Batch((x,), {}, y) for x, y in zip(*(part.split(1024) for part in data), strict=True)], loss_fn
    )


def _compared(event: Event, before: list[Evaluation], after: list[Evaluation], first_loss: float) -> dict:
    """What the event says, and what it did to the training data and to fresh data."""
    certificate = event.certificate
    assert certificate is not None
    level = max(abs(certificate.loss_before), (first_loss - certificate.loss_before) / 4)
    predicted = event.predicted or 0.0  # the guard's own, damped, isn't recorded: this one is no more lenient
    result = {
        "accepted": judge(certificate, NORMAL, predicted, level, cautious=predicted) is None,
        "widths_before": list(event.widths_before.values()), "widths_after": list(event.widths_after.values()),
        "predicted": event.predicted, "first_order": sum(change.first_order or 0.0 for change in event.changes),
        "samples": certificate.samples, "held_out": event.measured, "error": certificate.error,
        "loss_upper": certificate.loss_upper, "clip": certificate.clip, "changed_upper": certificate.changed_upper,
        "confidence": certificate.confidence, "loss": before[0].loss,
    }  # fmt: skip
    for where, one, other in zip(("train", "fresh"), before, after, strict=True):
        changes = other.units - one.units
        result[f"{where}_increase"], result[f"{where}_error"] = float(changes.mean()), standard_error(changes)
        result[f"{where}_clipped"] = float(changes.clamp(-certificate.clip, certificate.clip).mean())
        if one.predictions is not None and other.predictions is not None:
            result[f"{where}_changed"] = float((one.predictions != other.predictions).double().mean())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args()
    torch.set_num_threads(1)
    about = conditions()
    lines = map(json.loads, RESULTS.read_text().splitlines() if RESULTS.exists() else ())
    done = {(line["recipe"], line["seed"]) for line in lines if line["commit"] == about["commit"]}
    for seed in args.seeds:
        for name in (name for name in args.recipes if (name, seed) not in done):
            events = [{"recipe": name, "seed": seed, **event, **about} for event in run(name, seed)]
            with RESULTS.open("a") as file:
                file.writelines(json.dumps(event) + "\n" for event in events)
            print(f"{name}, seed {seed}: {len(events)} events", flush=True)


if __name__ == "__main__":
    main()
