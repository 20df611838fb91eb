"""Random-width search: what a user might do with the time that apoptosis takes."""

import random
from collections.abc import Mapping
from typing import Any

import torch
from comparison import Contender, Task, train
from datasets import Split, validation
from torch import nn

from benchmarks.contenders.channels import Narrow


def random_widths(widths: Mapping[str, int], draw: random.Random) -> dict[str, int]:
    """Each width times a random factor of 1/2 to 2, in multiples of 8."""
    return {name: max(8, 8 * round(width * 2 ** draw.uniform(-1, 1) / 8)) for name, width in widths.items()}


def search(
    task: Task, data: Split, widths: Mapping[str, int], seconds: float, seed: int, evaluations: int
) -> tuple[dict[str, Any], nn.Module]:
    """Train networks of random widths on nine tenths of the training data while the time lasts; at least one.

    Returns the summary and the model of the one that is best on the last tenth, with its metric on the test data; its
    seconds and FLOPs are those of all.
    """
    draw, held_out = random.Random(seed), validation(data)
    runs: list[tuple[dict[str, Any], nn.Module]] = []
    spent = 0.0
    while not runs or spent + runs[-1][0]["wall_s"] <= seconds:
        contender = Narrow(random_widths(widths, draw)) if widths else Contender()
        runs.append(train(task, held_out, contender, seed, evaluations))
        spent += runs[-1][0]["wall_s"]
    best, model = max(runs, key=lambda run: run[0]["metric"])
    with torch.no_grad():
        output = torch.cat([model.eval()(part) for part in data.test_x.split(2048)])
    costs = {key: sum(run[key] for run, _ in runs) for key in ("wall_s", "cpu_s", "train_flops", "contender_s")}
    metric = task.metric(output, data.test_y)
    return best | costs | {"metric": metric, "curve": [(spent, metric)], "tried": len(runs)}, model
