"""What the peers share: channel groups as tensors, and their removal with momentum, but without apoptosis's search.

Finding the groups is not part of a peer's method and is not counted; removing channels is.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comparison import Contender, Run
from torch import Tensor, nn

import apoptorch
from apoptorch.plan import ChannelGroup, Fold, FoldPlan, Slot
from apoptorch.surgery import Surgery, named_tensors

CALIBRATION = 2048  # training inputs that a peer may look at in an event


def groups_of(model: nn.Module, example: Tensor) -> dict[str, ChannelGroup]:
    """The model's prunable groups by name."""
    found = apoptorch.Apoptosis(model, example_inputs=example).groups
    return {group.name: group for group in found if group.prunable}


def index(slot: Slot, width: int) -> Tensor:
    """[width, inner]: where each channel lies in the slot's dimension."""
    if hasattr(slot, "index"):
        return slot.index(width)  # pyright: ignore
    return torch.arange(width * slot.inner).view(width, slot.inner)


def by_channel(model: nn.Module, slot: Slot, width: int) -> Tensor:
    """[width, d]: what each channel has in the slot's tensor."""
    tensor = named_tensors(model)[slot.tensor].detach().movedim(slot.dim, 0)
    return tensor[index(slot, width)].flatten(1)


def matrices(model: nn.Module, group: ChannelGroup) -> list[Slot]:
    """The producers that are weights, not biases."""
    return [slot for slot in group.producers if named_tensors(model)[slot.tensor].ndim > 1]


def rows(model: nn.Module, group: ChannelGroup) -> Tensor:
    """[width, d + 1]: incoming weights and bias of each neuron, batch norm's running statistics folded in."""
    slots = matrices(model, group)
    biases = [slot for slot in group.producers if slot not in slots]
    weight = torch.cat([by_channel(model, slot, group.width) for slot in slots], 1)
    bias = sum((by_channel(model, slot, group.width) for slot in biases), weight.new_zeros(group.width, 1))
    named = named_tensors(model)
    for name in {slot.tensor.rsplit(".", 1)[0] for slot in group.passthrough if slot.tensor.endswith("running_var")}:
        std = (named[f"{name}.running_var"] + model.get_submodule(name).eps).sqrt()[:, None]
        gain = named[f"{name}.weight"].detach()[:, None] / std
        weight, bias = weight * gain, (bias - named[f"{name}.running_mean"][:, None]) * gain
        bias = bias + named[f"{name}.bias"].detach()[:, None]
    return torch.cat([weight, bias], 1)


def columns(model: nn.Module, group: ChannelGroup) -> Tensor:
    """[width, d]: outgoing weights of each neuron, all consumers together."""
    return torch.cat([by_channel(model, consumer.weight, group.width) for consumer in group.consumers], 1)


class Channels(Contender):
    """A contender that removes channels of `groups`; survivors and their momentum stay as they are."""

    def begin(self, run: Run) -> None:
        self.run, self.steps = run, 0
        with run.meter.stopped():
            found = groups_of(run.model, run.data.train_x[: run.task.batch])
        self.groups = {name: group for name, group in found.items() if getattr(group, "blocks", 1) == 1}

    def remove_(self, keep: Mapping[str, Tensor], coeffs: Mapping[str, Tensor] | None = None) -> dict[str, int] | None:
        """Keep these channels (sorted) of the named groups; coeffs [n, k]: how survivors stand in for all."""
        keep = {name: kept for name, kept in keep.items() if len(kept) < self.groups[name].width}
        with Surgery(self.run.model, [self.run.optimizer]) as surgery:
            for name, kept in keep.items():
                group = self.groups[name]
                matrix = torch.eye(group.width, dtype=torch.float64)[:, kept] if coeffs is None else coeffs[name]
                plan = FoldPlan(name, kept, (Fold(matrix.double()),) * len(group.consumers))
                self.groups[name] = surgery.fold_(group, plan)
        return {name: group.width for name, group in self.groups.items()} if keep else None

    def calibration(self) -> tuple[Tensor, Tensor]:
        """Training inputs and targets, the same for every event of a step."""
        data = self.run.data
        chosen = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(self.steps))[:CALIBRATION]
        return data.train_x[chosen], data.train_y[chosen]


class Narrow(Contender):
    """A small network from the start: the groups' widths are given, and its weights are drawn for them."""

    def __init__(self, widths: Mapping[str, int]):
        self.widths = widths

    def begin(self, run: Run) -> None:
        with run.meter.stopped():
            groups = groups_of(run.model, run.data.train_x[: run.task.batch])
            with Surgery(run.model, [run.optimizer]) as surgery:
                for group in groups.values():
                    if (width := self.widths.get(group.name, group.width)) < group.width:
                        kept = group.leading(width) if hasattr(group, "leading") else torch.arange(width)  # pyright: ignore
                        coeffs = torch.eye(group.width, dtype=torch.float64)[:, kept]
                        surgery.fold_(group, FoldPlan(group.name, kept, (Fold(coeffs),) * len(group.consumers)))
            for module in run.model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # pyright: ignore


def removals(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The events of a run with apoptosis that were not undone."""
    return [event for event in record["events"] if not event["rolled_back"]]


def final_widths(record: Mapping[str, Any]) -> dict[str, int]:
    """Every group's width at the end of a run with apoptosis; empty if nothing was removed."""
    events = removals(record)
    return events[-1]["widths_after"] if events else {}
