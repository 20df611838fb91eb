"""Dense training and training with apoptosis, measured alike: what the examples and the benchmarks share."""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from datasets import Split
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.flop_counter import FlopCounterMode

import apoptorch


@dataclass(frozen=True)
class Task:
    """A training recipe; the learning rate falls to 0 along a cosine.

    model() and optimizer(parameters) make them; loss_fn(output, targets) is a mean over the batch;
    metric(output, targets): higher is better.
    """

    model: Callable[[], nn.Module]
    optimizer: Callable[..., Optimizer]
    loss_fn: Callable[[Tensor, Tensor], Tensor]
    metric: Callable[[Tensor, Tensor], float]
    batch: int
    epochs: int


def mlp(*widths: int) -> nn.Sequential:
    """ReLU multilayer perceptron from widths[0] inputs to widths[-1] outputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sgd(parameters: Iterator[nn.Parameter]) -> Optimizer:
    """SGD as usual for images: Nesterov momentum 0.9, weight decay 5e-4, learning rate 0.05."""
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)


def batches(data: Split, size: int, order: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of shuffled full batches of the training data."""
    for index in torch.randperm(len(data.train_x), generator=order).split(size):
        if len(index) == size:
            yield data.train_x[index], data.train_y[index]


def accuracy(output: Tensor, targets: Tensor) -> float:
    """Share of the rows of output [n, classes] whose largest entry is at targets [n]."""
    return (output.argmax(1) == targets).double().mean().item()


def auc(output: Tensor, targets: Tensor) -> float:
    """Area under the ROC curve of scores [n, 1] against targets [n, 1] in {0, 1}; ties count half."""
    _, place, counts = output.flatten().unique(return_inverse=True, return_counts=True)
    rank = counts.cumsum(0).double() - (counts - 1) / 2
    positive = targets.flatten() > 0.5
    n = int(positive.sum())
    return (rank[place][positive].sum().item() - n * (n + 1) / 2) / (n * (len(place) - n))


def widths(model: nn.Module) -> list[int]:
    """Output width of every linear layer and convolution but the last."""
    layers = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [m.weight.shape[0] for m in model.modules() if isinstance(m, layers)][:-1]


def step_flops(model: nn.Module, task: Task, data: Split) -> int:
    """FLOPs of one forward and backward pass at the model's present shapes, counted on a copy without storage."""
    shadow = copy.deepcopy(model).to("meta")
    x, y = data.train_x[: task.batch].to("meta"), data.train_y[: task.batch].to("meta")
    with FlopCounterMode(display=False) as counter:
        task.loss_fn(shadow(x), y).backward()
    return counter.get_total_flops()


class Meter:
    """Wall and CPU seconds, training FLOPs and test metric of one run, from construction on, less the measuring."""

    def __init__(self, task: Task, data: Split):
        self.task, self.data = task, data
        self.steps, self.train_flops, self.curve = 0, 0, []  # curve: (wall seconds, metric)
        self._wall_s, self._cpu_s, self._flops, self._flops_at = 0.0, 0.0, 0, None
        self._start()

    @property
    def wall_s(self) -> float:
        """Wall seconds so far."""
        return self._wall_s + time.perf_counter() - self._since[0]

    def step(self, model: nn.Module) -> None:
        """Count one training step at the model's present shapes."""
        with self._stopped():
            if self._flops_at != (size := _parameters(model)):
                self._flops, self._flops_at = step_flops(model, self.task, self.data), size
            self.train_flops += self._flops
            self.steps += 1

    def evaluate(self, model: nn.Module) -> float:
        """The metric on the test set, in eval mode, as a new point of the curve."""
        with self._stopped(), torch.no_grad():
            training = model.training
            output = torch.cat([model.eval()(part) for part in self.data.test_x.split(2048)])
            model.train(training)
            self.curve.append((self._wall_s, self.task.metric(output, self.data.test_y)))
        return self.curve[-1][1]

    def summary(self, model: nn.Module) -> dict[str, Any]:
        """The finished run in JSON types; `metric` is the last one evaluated."""
        with self._stopped():
            return {
                "wall_s": self._wall_s,
                "cpu_s": self._cpu_s,
                "train_flops": self.train_flops,
                "parameters": _parameters(model),
                "metric": self.curve[-1][1],
                "widths": widths(model),
                "curve": self.curve,
            }

    def _start(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    @contextmanager
    def _stopped(self) -> Iterator[None]:
        self._wall_s += time.perf_counter() - self._since[0]
        self._cpu_s += time.process_time() - self._since[1]
        yield
        self._start()


def train(
    task: Task,
    data: Split,
    contender: str,
    seed: int = 0,
    evaluations: int = 1,
    on_step: Callable[[nn.Module, float, Meter], None] = lambda model, loss, meter: None,
) -> tuple[dict[str, Any], list]:
    """Train `task` as `contender`, "dense" or "apoptosis": same seed, same weights, same order of batches.

    evaluations: how often the metric is taken per epoch. on_step(model, loss, meter) counts as training time.
    Returns the summary and the history. With apoptosis the summary also has `apoptosis_s`, all seconds spent in
    apoptorch, `event_s`, those of the events, and `idle_share`, the median call of `step` that returned None over
    the median training step.
    """
    per_epoch = len(data.train_x) // task.batch
    evaluate_at = {round(per_epoch * (i + 1) / evaluations) for i in range(task.epochs * evaluations)}
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    training, calls, idle, apoptosis = [], [], [], None
    meter = Meter(task, data)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, task.epochs * per_epoch)
    if contender == "apoptosis":
        with _timed(calls):
            apoptosis = _apoptosis(task, data, model, optimizer, task.epochs * per_epoch)
    for x, y in (batch for _ in range(task.epochs) for batch in batches(data, task.batch, order)):
        with _timed(training):
            loss = task.loss_fn(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        if apoptosis is not None:
            before = time.perf_counter()
            event = apoptosis.step(x, targets=y)
            calls.append(time.perf_counter() - before)
            idle += [calls[-1]] if event is None else []
        meter.step(model)
        if meter.steps in evaluate_at:
            meter.evaluate(model)
        on_step(model, loss.item(), meter)
    summary, history = meter.summary(model), [] if apoptosis is None else list(apoptosis.history)
    if apoptosis is not None:
        summary["apoptosis_s"] = sum(calls)
        summary["event_s"] = sum(event.seconds for event in history)
        summary["idle_share"] = median(idle) / median(training)
    return summary, history


def warm_up(task: Task, data: Split) -> None:
    """A few untimed dense steps, lest threads, allocator and torch's late imports count against the first run."""
    few = 10 * task.batch
    train(
        replace(task, epochs=1),
        data._replace(train_x=data.train_x[:few], train_y=data.train_y[:few]),
        "dense",
    )


def ratio(dense: dict[str, Any], apoptosis: dict[str, Any]) -> dict[str, float]:
    """dense / apoptosis for seconds, FLOPs and parameters; for the metric the difference, apoptosis - dense."""
    costs = {key: dense[key] / apoptosis[key] for key in ("wall_s", "train_flops", "parameters")}
    return {**costs, "metric": apoptosis["metric"] - dense["metric"]}


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _apoptosis(task: Task, data: Split, model: nn.Module, optimizer: Optimizer, steps: int):
    x = data.train_x[: task.batch]
    return apoptorch.Apoptosis(model, optimizer, example_inputs=x, loss_fn=task.loss_fn, total_steps=steps)


@contextmanager
def _timed(seconds: list[float]) -> Iterator[None]:
    before = time.perf_counter()
    yield
    seconds.append(time.perf_counter() - before)
