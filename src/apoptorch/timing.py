"""What a FLOP costs on this machine."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from .batches import Batch
from .calibrate import calibrating, weight_of
from .plan import ChannelGroup, CostTerm


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@cache
def speeds(device: torch.device) -> tuple[float, float]:
    """FLOPs a second of a float32 matrix product, bytes a second of an addition; takes milliseconds, once."""
    size = 512 if device.type == "cpu" else 4096
    a = torch.ones(size, size, device=device)
    b = torch.ones(4 * size, size, device=device)
    seconds = []
    for work in (lambda: a @ a, lambda: b.add_(1.0)):
        times = []
        for _ in range(3):
            _synchronize(device)
            start = time.perf_counter()
            work()
            _synchronize(device)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    return 2.0 * size**3 / seconds[0], 8.0 * b.numel() / seconds[1]


def training_seconds(forward_flops: float, parameters: int, device: torch.device) -> float:
    """Least time of a training step: three forward passes' arithmetic; ten times over every parameter in memory

    (read in forward and backward, gradient written and read, momentum and weight read and written, weight decay).
    """
    arithmetic, memory = speeds(device)
    return 3 * forward_flops / arithmetic + 40 * parameters / memory


def forward_flops(model: nn.Module, batch: Batch) -> float:
    """FLOPs of a forward pass, counted op by op."""
    with calibrating(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*batch.args, **batch.kwargs)
    return float(counter.get_total_flops())


class _Stopwatch(TorchFunctionMode):
    """Times every op that reads a known weight."""

    def __init__(self, keys: dict[int, tuple[str | None, str | None]]):
        super().__init__()
        self.keys, self.seconds = keys, dict.fromkeys(keys.values(), 0.0)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        known = [self.keys[id(arg)] for arg in args if id(arg) in self.keys]
        device = next((arg.device for arg in args if isinstance(arg, Tensor)), torch.device("cpu"))
        if known:
            _synchronize(device)
        start = time.perf_counter()
        output = func(*args, **(kwargs or {}))
        for key in known[:1]:
            _synchronize(device)
            self.seconds[key] += time.perf_counter() - start
        return output


def milliseconds(
    model: nn.Module, groups: Sequence[ChannelGroup], costs: Sequence[CostTerm], batch: Batch
) -> list[CostTerm]:
    """The same cost terms in measured milliseconds (the best of five forward passes) instead of FLOPs."""
    widths = {group.name: group.width for group in groups}
    readers = {c.weight.tensor: group.name for group in groups for c in group.consumers if not c.paired}
    makers = {slot.tensor: group.name for group in groups for slot in group.makers}
    best: dict[tuple[str | None, str | None], float] = {}
    with calibrating(model), torch.no_grad():
        keys = {id(weight_of(model, name)): (makers.get(name), readers.get(name)) for name in {**readers, **makers}}
        for _ in range(5):
            with _Stopwatch(keys) as watch:
                model(*batch.args, **batch.kwargs)
            best = {key: min(best.get(key, math.inf), seconds) for key, seconds in watch.seconds.items()}
    terms = []
    for term in costs:
        channels = math.prod(widths[side] for side in (term.out_group, term.in_group) if side)
        spent = 1e3 * best.get((term.out_group, term.in_group), 0.0) / channels
        terms.append(replace(term, flops=spent))
    return terms
