"""What apoptosis does with one model: traced, halved, trained, saved and loaded; as plain data."""

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from apoptorch import Apoptosis, Policy, load, save
from apoptorch.discovery import discovered
from apoptorch.graph import trace
from apoptorch.graph.capture import capture
from apoptorch.plan import ChannelGroup, Slot
from apoptorch.surgery import named_tensors
from tests.planted import entries, loss, makers, opened, outputs, write_

_PLACE = re.compile(r"/[^ \"]*/(?=site-packages/|benchmarks/)(site-packages/)?")  # where this machine keeps a file
HALVING = Policy(price=1e30, steepest=2.0, room=0, tolerance=1e30, guard=1e30, multiple=1, floor=1, rebalance=False)


def traced(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """CPU seconds of a trace, nodes of the graph, and the shares of the parameters in its groups."""
    capture(nn.Linear(2, 2), (torch.ones(1, 2),), {})  # torch imports what it needs
    args = tuple(args)
    with _counted() as nodes:
        start = time.process_time()
        trace(model, args, kwargs)
        seconds = time.process_time() - start
    groups, _ = discovered(model, args, kwargs)
    prunable = [group for group in groups if group.prunable]
    open_, all_ = coverage(model, prunable), coverage(model, groups)
    reasons: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        if group.reason:
            reasons.setdefault(_PLACE.sub("", group.reason), []).append(group)
    shares = {reason: coverage(model, [*prunable, *pinned]) - open_ for reason, pinned in reasons.items()}
    return {
        "trace_s": seconds, "nodes": nodes[0], "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(groups), "prunable_groups": len(prunable), "prunable": open_, "pinned": all_ - open_,
        "reasons": sorted(shares.items(), key=lambda item: -item[1])[:5],
    }  # fmt: skip


@contextmanager
def _counted() -> Iterator[list[int]]:
    """How many nodes the graphs have that torch.export gives."""
    export, nodes = torch.export.export, list[int]()

    def counting(*args: Any, **kwargs: Any) -> torch.export.ExportedProgram:
        program = export(*args, **kwargs)
        nodes.append(len(program.graph.nodes))
        return program

    with patch("torch.export.export", counting):
        yield nodes


def coverage(model: nn.Module, groups: Sequence[ChannelGroup]) -> float:
    """Share of the model's parameters that lie in a channel of one of these groups."""
    tensors = named_tensors(model)
    masks: dict[str, Tensor] = {}
    for group in groups:
        for slot in (*makers(group), *(consumer.weight for consumer in group.consumers)):
            for name in _written(tensors, slot):
                mask = masks.setdefault(name, torch.zeros(tensors[name].shape, dtype=torch.bool))
                rows = opened(mask, slot) if name == slot.tensor else mask
                rows[entries(slot, group) if name == slot.tensor else ...] = True
                if name == slot.tensor:
                    write_(mask, slot, rows)
    named = dict(model.named_parameters())
    return sum(int(mask.sum()) for name, mask in masks.items() if name in named) / sum(
        p.numel() for p in named.values()
    )


def _written(tensors: dict[str, Tensor], slot: Slot) -> list[str]:
    """The tensor itself, or those from which a parametrization computes it."""
    if slot.tensor in tensors:
        return [slot.tensor]
    path, _, attribute = slot.tensor.rpartition(".")
    return [name for name in tensors if name.startswith(f"{path}.parametrizations.{attribute}.")]


def halved(build: Callable[[], nn.Module], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Halves every prunable group, trains two steps, saves, loads into a fresh model; in words what went wrong."""
    model, problems = build(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    apoptosis = Apoptosis(model, optimizer, example_inputs=kwargs or tuple(args), policy=HALVING)
    descend_(model, optimizer, args, kwargs)  # so that there is a state to narrow
    before = outputs(model, args, kwargs)
    event = apoptosis.apoptose(*args, **kwargs)
    wide = [group for group in apoptosis.groups if group.prunable and group.full_width > 1]
    problems += [f"undone: {event.reason}"] if event.rolled_back else []
    problems += [
        f"{group.name} was to be halved, but went from {group.full_width} to {group.width}"
        for group in wide
        if group.width > (group.full_width + 1) // 2
    ]
    for _ in range(2):
        descend_(model, optimizer, args, kwargs)
    after = outputs(model, args, kwargs)
    problems += [] if len(after) == len(before) else [f"{len(before)} numbers of output became {len(after)}"]
    problems += [] if bool(after.isfinite().all()) else ["the outputs are not finite after two steps"]
    with tempfile.TemporaryDirectory() as path:
        save(model, path, apoptosis)
        fresh = build()
        load(fresh, path)
    same = bool(torch.equal(outputs(fresh, args, kwargs), after))
    problems += [] if same else ["the loaded model computes something else"]
    return {"parameters_halved": event.parameters_after, "halved_problems": problems}


def descend_(model: nn.Module, optimizer: torch.optim.Optimizer, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """One step of training in the model's own mode."""
    optimizer.zero_grad()
    loss(model(*args, **kwargs)).backward()
    optimizer.step()
