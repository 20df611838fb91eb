"""One rank of a run under torchrun: trains a task with DDP, dense or with apoptosis; the first rank writes a record.

The global batch is the task's, whatever the number of ranks: all runs of a seed see the same batches.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from comparison import Task, batches, parameters, step_flops
from datasets import Split
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import apoptorch
from apoptorch.timing import training_seconds
from benchmarks.scale.network import sent
from benchmarks.tasks import TASKS

WINDOWS = 24  # points of the curves of a run
SIZES = {1: 20, 2**20: 3}  # float32 numbers in an all-reduce that is timed, and how often


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--contender", choices=["dense", "apoptosis"], required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the task's")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    record = run(args.task, args.contender, args.seed, args.steps)
    if dist.get_rank() == 0:
        args.out.write_text(json.dumps(record))
    dist.destroy_process_group()


def run(name: str, contender: str, seed: int, steps: int | None) -> dict[str, Any]:
    """The record of one run, in JSON types."""
    task, load = TASKS[name]
    data, rank, world = load(), dist.get_rank(), dist.get_world_size()
    torch.manual_seed(seed)
    model = DistributedDataParallel(task.model())
    optimizer = task.optimizer(model.parameters())
    total = min(steps or 10**9, task.epochs * (len(data.train_x) // task.batch))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    record = {
        "parameter_s": training_seconds(0.0, 1, torch.device("cpu")),
        "ranks": world, "steps": total, "batch": task.batch, "dense_parameters": parameters(model),
        "all_reduce": [[4 * size, all_reduce_seconds(size, times)] for size, times in SIZES.items()],
    }  # fmt: skip
    dist.barrier()
    curve, events, start = [], [], time.perf_counter()
    apoptosis = (
        apoptorch.Apoptosis(
            model, optimizer, example_inputs=data.train_x[: task.batch // world], loss_fn=task.loss_fn,
            total_steps=total,
        )
        if contender == "apoptosis"
        else None
    )  # fmt: skip
    own = slice(rank * task.batch // world, (rank + 1) * task.batch // world)
    for i, (x, y) in enumerate(islice(epochs(task, data, seed), total)):
        if i * WINDOWS // total != (i - 1) * WINDOWS // total:
            curve.append([i, *progress(start), parameters(model), flops(model, task, data, world)])
        optimizer.zero_grad()
        task.loss_fn(model(x[own]), y[own]).backward()
        optimizer.step()
        schedule.step()
        if apoptosis is not None:
            before = sent()
            if apoptosis.step(x[own], targets=y[own]):
                events.append({"sent": sent() - before, **apoptosis.history[-1].to_json()})
    curve.append([total, *progress(start), parameters(model), flops(model, task, data, world)])
    with torch.no_grad():
        output = torch.cat([model.module.eval()(part) for part in data.test_x.split(2048)])
    return {
        **record, "total_s": curve[-1][1], "curve": windows(curve), "events": events,
        "metric": task.metric(output, data.test_y),
    }  # fmt: skip


def progress(start: float) -> tuple[float, int]:
    """Seconds since the start and bytes sent, with none left in the kernel's queues: all hosts answered after them."""
    for _ in range(2):  # a host leaves the second barrier when the others have had its message of the first
        dist.barrier()
    return time.perf_counter() - start, sent()


def windows(curve: list[list[float]]) -> list[dict[str, float]]:
    """Means per step between the points (step, seconds, bytes sent, parameters, FLOPs)."""
    result = []
    for one, other in pairwise(curve):
        steps = other[0] - one[0]
        result.append({
            "step": one[0], "step_s": (other[1] - one[1]) / steps, "sent": (other[2] - one[2]) / steps,
            "parameters": one[3], "parameters_after": other[3], "flops": one[4],
        })  # fmt: skip
    return result


def flops(model: DistributedDataParallel, task: Task, data: Split, world: int) -> float:
    """One rank's FLOPs of a training step."""
    return step_flops(model.module, task, data) / world


def epochs(task: Task, data: Split, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Global batches without end, the same on every rank."""
    order = torch.Generator().manual_seed(seed)
    while True:
        yield from batches(data, task.batch, order)


def all_reduce_seconds(size: int, times: int) -> float:
    """The least of so many all-reduces, of the slowest rank."""
    tensor, seconds = torch.zeros(size), []
    for _ in range(times + 1):  # connections are made by the first one
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - start)
    least = torch.tensor(min(seconds[1:]))
    dist.all_reduce(least, dist.ReduceOp.MAX)
    return least.item()


if __name__ == "__main__":
    main()
