"""The tasks of the full benchmark. No task holds a setting of apoptorch.

`recipes.json` has what trains the dense network well: optimizer, learning rate, weight decay, batch, epochs, and how
many training examples there are (null: all). `tuned` says on how many settings `benchmarks.tune` chose them, null
that they are sensible values that were not yet tuned. Sizes are such that the dense network trains in one or two
minutes on two cores; those named imagenet are the full-size ones, for a GPU, with the data set's directory in the
environment variable APOPTORCH_IMAGENET.
"""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.nn.functional as F
from comparison import Task, accuracy, auc, mlp
from datasets import CHARACTERS, Split
from torch import Tensor, nn

from benchmarks import models
from benchmarks.tasks import higgs, small_images

RECIPES = Path(__file__).parent / "recipes.json"


@dataclass(frozen=True)
class Kind:
    """What is learned: the loss, the metric (higher is better), its name, and the margin of non-inferiority."""

    loss_fn: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], float]
    name: str
    margin: float


def next_character_loss(output: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [n, block, characters], in nats per character."""
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


BINARY = Kind(F.binary_cross_entropy_with_logits, auc, "AUC", 0.001)
CLASSES = Kind(F.cross_entropy, accuracy, "accuracy", 0.001)
TEXT = Kind(next_character_loss, lambda o, t: -next_character_loss(o, t).item(), "-nats per character", 0.01)


@dataclass(frozen=True)
class Benchmark:
    """A network, the data it learns from, and what it learns."""

    title: str
    model: Callable[[], nn.Module]
    load: Callable[[], Split]
    kind: Kind = CLASSES
    full_size: bool = False


def large_images() -> Split:
    """Fashion-MNIST, enlarged to 64x64."""
    data = datasets.fashion_mnist()
    enlarge = partial(F.interpolate, size=(64, 64), mode="bilinear")
    few = slice(0, 12_000)  # more would not be trained on, and are 1 GB
    return Split(enlarge(data.train_x[few]), data.train_y[few], enlarge(data.test_x[:4000]), data.test_y[:4000])


def imagenet() -> Split:
    """The data set at APOPTORCH_IMAGENET."""
    if "APOPTORCH_IMAGENET" not in os.environ:
        raise SystemExit(
            "APOPTORCH_IMAGENET must name a directory with train/CLASS and val/CLASS, got nothing. Set it."
        )
    return datasets.image_folder(os.environ["APOPTORCH_IMAGENET"])


BLOCK = 128
BENCHMARKS = {
    "higgs-relu": Benchmark("higgs-sim, MLP 28-300x5-1, ReLU", lambda: mlp(28, *[300] * 5, 1), higgs, BINARY),
    "higgs-tanh": Benchmark(
        "higgs-sim, MLP 28-300x5-1, tanh", lambda: mlp(28, *[300] * 5, 1, activation=nn.Tanh), higgs, BINARY
    ),
    "higgs-wide": Benchmark("higgs-sim, MLP 28-1024x4-1", lambda: mlp(28, *[1024] * 4, 1), higgs, BINARY),
    "fashion-mlp-2048": Benchmark(
        "Fashion-MNIST, MLP 784-2048x3-10", lambda: mlp(784, *[2048] * 3, 10), datasets.fashion_mnist
    ),
    "lenet-300-100": Benchmark("Fashion-MNIST, LeNet-300-100", lambda: mlp(784, 300, 100, 10), datasets.fashion_mnist),
    "lenet-5": Benchmark("Fashion-MNIST, LeNet-5", models.lenet5, datasets.fashion_mnist),
    "vgg-bn": Benchmark("Fashion-MNIST 14x14, VGG-like with batch norm", models.vgg, small_images),
    "resnet-20": Benchmark("Fashion-MNIST 14x14, ResNet-20", models.resnet20, small_images),
    "alexnet-64": Benchmark(
        "Fashion-MNIST at 64x64, AlexNet-shaped", lambda: models.alexnet(1, 32, 10, 2, 1024), large_images
    ),
    "googlenet-64": Benchmark(
        "Fashion-MNIST at 64x64, GoogLeNet-shaped", lambda: models.googlenet(1, 0.25, 10), large_images
    ),
    "char-transformer": Benchmark(
        "Python's standard library, character transformer 4 x 128",
        lambda: models.CharacterTransformer(len(CHARACTERS), BLOCK, 128, 4, 4),
        partial(datasets.text, block=BLOCK, characters=1_000_000),
        TEXT,
    ),
    "alexnet-imagenet": Benchmark("ImageNet, AlexNet", models.alexnet, imagenet, full_size=True),
    "googlenet-imagenet": Benchmark("ImageNet, GoogLeNet", models.googlenet, imagenet, full_size=True),
}


def recipe(name: str) -> dict[str, Any]:
    """The task's entry in `recipes.json`."""
    return json.loads(RECIPES.read_text())[name]


def optimizer(settings: dict[str, Any], parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum 0.9, or AdamW."""
    chosen = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
    if settings["optimizer"] == "sgd":
        return torch.optim.SGD(parameters, momentum=0.9, nesterov=True, **chosen)
    return torch.optim.AdamW(parameters, **chosen)


def task(name: str, settings: dict[str, Any] | None = None) -> Task:
    """How the task is trained, by its recipe or by other settings."""
    settings = settings or recipe(name)
    benchmark = BENCHMARKS[name]
    return Task(
        model=benchmark.model,
        optimizer=partial(optimizer, settings),
        loss_fn=benchmark.kind.loss_fn,
        metric=benchmark.kind.metric,
        batch=settings["batch"],
        epochs=settings["epochs"],
    )


def load(name: str, settings: dict[str, Any] | None = None) -> Split:
    """The task's data; its first so many training examples."""
    examples = (settings or recipe(name))["examples"]
    data = BENCHMARKS[name].load()
    return data._replace(train_x=data.train_x[:examples], train_y=data.train_y[:examples])
