"""Dense training and training with apoptosis, measured alike: what the examples and the benchmarks share."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
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


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    """Multilayer perceptron from widths[0] inputs to widths[-1] outputs."""
    layers: list[nn.Module] = [nn.Flatten()]
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), activation()]
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
        with self.stopped():
            if self._flops_at != (size := parameters(model)):
                self._flops, self._flops_at = step_flops(model, self.task, self.data), size
            self.train_flops += self._flops
            self.steps += 1

    def evaluate(self, model: nn.Module) -> float:
        """The metric on the test set, in eval mode, as a new point of the curve."""
        with self.stopped(), torch.no_grad():
            training = model.training
            output = torch.cat([model.eval()(part) for part in self.data.test_x.split(2048)])
            model.train(training)
            self.curve.append((self._wall_s, self.task.metric(output, self.data.test_y)))
        return self.curve[-1][1]

    def summary(self, model: nn.Module) -> dict[str, Any]:
        """The finished run in JSON types; `metric` is the last one evaluated."""
        with self.stopped():
            return {
                "wall_s": self._wall_s,
                "cpu_s": self._cpu_s,
                "train_flops": self.train_flops,
                "parameters": parameters(model),
                "metric": self.curve[-1][1],
                "widths": widths(model),
                "curve": self.curve,
            }

    def _start(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """What happens within is not counted."""
        self._wall_s += time.perf_counter() - self._since[0]
        self._cpu_s += time.process_time() - self._since[1]
        yield
        self._start()


@dataclass
class Run:
    """One training run, as its contender sees it."""

    task: Task
    data: Split
    model: nn.Module
    optimizer: Optimizer
    total_steps: int
    meter: Meter


class Contender:
    """What becomes of a network while it trains: here nothing, it stays dense. One object serves one run.

    Subclasses change model and optimizer in place; what they do counts, but within `meter.stopped()`.
    """

    def begin(self, run: Run) -> None:
        """Once, before the first step."""

    def gradients(self) -> None:
        """At each step, once the gradients are there and before the optimizer uses them."""

    def step(self, x: Tensor, y: Tensor) -> Any:
        """At each step, after the optimizer's, with the batch just trained on: not None if this was an event."""

    @property
    def history(self) -> Sequence[Any]:
        """apoptorch's events, where there are any."""
        return ()

    def facts(self) -> dict[str, Any]:
        """What else the summary of the run should hold, in JSON types."""
        return {}


class Apoptosis(Contender):
    """apoptorch, with nothing set but the policy."""

    def __init__(self, policy: str = "normal"):
        self.policy = policy

    def begin(self, run: Run) -> None:
        self.apoptosis = apoptorch.Apoptosis(
            run.model, run.optimizer, example_inputs=run.data.train_x[: run.task.batch], loss_fn=run.task.loss_fn,
            total_steps=run.total_steps, policy=self.policy,
        )  # fmt: skip

    def step(self, x: Tensor, y: Tensor) -> Any:
        return self.apoptosis.step(x, targets=y)

    @property
    def history(self) -> Sequence[Any]:
        return self.apoptosis.history

    def facts(self) -> dict[str, Any]:
        kept = (
            "step",
            "widths_before",
            "widths_after",
            "parameters_after",
            "rolled_back",
            "seconds",
            "predicted",
            "measured",
        )
        return {"events": [{key: event.to_json()[key] for key in kept} for event in self.history]}


def train(
    task: Task,
    data: Split,
    contender: Contender,
    seed: int = 0,
    evaluations: int = 1,
    on_step: Callable[[nn.Module, float, Meter], None] = lambda model, loss, meter: None,
) -> tuple[dict[str, Any], nn.Module]:
    """Train `task` with a contender: whichever it is, same seed, same weights, same order of batches.

    evaluations: how often the metric is taken per epoch. on_step(model, loss, meter) counts as training time.
    Returns the summary and the trained model. The summary also has `contender_s`, all seconds spent in the contender;
    `event_s` and `event_cpu_s`, those of its events; `idle_share`, the median call of its `step` that was no event
    over the median training step; `trajectory`, step, parameters and widths after each event; and its `facts`.
    """
    per_epoch = len(data.train_x) // task.batch
    evaluate_at = {round(per_epoch * (i + 1) / evaluations) for i in range(task.epochs * evaluations)}
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    training, other, calls, events, trajectory = _Clock(), _Clock(), _Clock(), _Clock(), []
    meter = Meter(task, data)
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    scheduler = CosineAnnealingLR(optimizer, task.epochs * per_epoch)
    other.time(contender.begin, Run(task, data, model, optimizer, task.epochs * per_epoch, meter))
    for x, y in (batch for _ in range(task.epochs) for batch in batches(data, task.batch, order)):
        loss = training.time(_backward, task, model, optimizer, x, y)
        other.time(contender.gradients)
        training.time(_update, optimizer, scheduler)
        event = calls.time(contender.step, x, y)
        meter.step(model)
        if event is not None:
            events.seconds.append(calls.seconds.pop())
            trajectory.append((meter.steps, parameters(model), widths(model)))
        if meter.steps in evaluate_at:
            meter.evaluate(model)
        on_step(model, loss, meter)
    halves = [wall for wall, _ in training.seconds]  # of each step: up to the gradients, and the optimizer's
    steps = [sum(pair) for pair in zip(halves[::2], halves[1::2], strict=True)]
    return {
        **meter.summary(model),
        "contender_s": sum(wall for clock in (other, calls, events) for wall, _ in clock.seconds),
        "event_s": sum(wall for wall, _ in events.seconds),
        "event_cpu_s": sum(cpu for _, cpu in events.seconds),
        "idle_share": median(wall for wall, _ in calls.seconds) / median(steps),
        "trajectory": trajectory,
        **contender.facts(),
    }, model


def _backward(task: Task, model: nn.Module, optimizer: Optimizer, x: Tensor, y: Tensor) -> float:
    loss = task.loss_fn(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    return loss.item()


def _update(optimizer: Optimizer, scheduler: CosineAnnealingLR) -> None:
    optimizer.step()
    scheduler.step()


def warm_up(task: Task, data: Split) -> None:
    """A few untimed dense steps, lest threads, allocator and torch's late imports count against the first run."""
    few = 10 * task.batch
    train(
        replace(task, epochs=1),
        data._replace(train_x=data.train_x[:few], train_y=data.train_y[:few]),
        Contender(),
    )


def ratio(dense: dict[str, Any], apoptosis: dict[str, Any]) -> dict[str, float]:
    """dense / apoptosis for seconds, FLOPs and parameters; for the metric the difference, apoptosis - dense."""
    costs = {key: dense[key] / apoptosis[key] for key in ("wall_s", "train_flops", "parameters")}
    return {**costs, "metric": apoptosis["metric"] - dense["metric"]}


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


class _Clock:
    """(wall, CPU) seconds of each call."""

    def __init__(self) -> None:
        self.seconds: list[tuple[float, float]] = []

    def time(self, call: Callable[..., Any], *arguments: Any) -> Any:
        cpu, wall = time.process_time(), time.perf_counter()  # the slower clock is read outside the other's time
        result = call(*arguments)
        self.seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
        return result
