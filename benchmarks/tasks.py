"""The recipes that benchmarks/core.py measures. No recipe holds a setting of apoptorch."""

from functools import partial
from pathlib import Path

import datasets
import torch.nn.functional as F
from comparison import Task, accuracy, auc, mlp, sgd
from datasets import Split
from torch import nn
from torch.optim import AdamW

FULL_HIGGS = Path(__file__).parents[2] / "shared" / "data" / "higgs-sim"

image_task = partial(Task, optimizer=sgd, loss_fn=F.cross_entropy, metric=accuracy, batch=128, epochs=5)


def cnn() -> nn.Sequential:
    """Four 3x3 convolutions with batch norm on 14x14 images, then two linear layers."""
    layers: list[nn.Module] = []
    for fan_in, fan_out in ((1, 64), (64, 64), (64, 128), (128, 128)):
        layers += [nn.Conv2d(fan_in, fan_out, 3, padding=1, bias=False), nn.BatchNorm2d(fan_out), nn.ReLU()]
        if fan_in == fan_out:
            layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 3 * 3, 256), nn.ReLU(), nn.Linear(256, 10))


def small_images() -> Split:
    """Fashion-MNIST, average-pooled to 14x14."""
    data = datasets.fashion_mnist()
    return data._replace(train_x=F.avg_pool2d(data.train_x, 2), test_x=F.avg_pool2d(data.test_x, 2))


def higgs() -> Split:
    """The full higgs-sim set where it lies beside the repository, else the bundled sample."""
    return datasets.higgs(FULL_HIGGS if FULL_HIGGS.is_dir() else None)


TASKS = {
    "fashion-mlp": (image_task(lambda: mlp(784, 2048, 2048, 2048, 10)), datasets.fashion_mnist),
    "higgs": (
        Task(
            model=lambda: mlp(28, 512, 512, 512, 512, 1),
            optimizer=partial(AdamW, lr=3e-3),
            loss_fn=F.binary_cross_entropy_with_logits,
            metric=auc,
            batch=512,
            epochs=5,
        ),
        higgs,
    ),
    "cnn": (image_task(cnn), small_images),
    "digits": (image_task(lambda: mlp(64, 1024, 1024, 10), batch=32, epochs=30), datasets.digits),
    "tiny": (image_task(lambda: mlp(784, 32, 10)), datasets.fashion_mnist),
}
