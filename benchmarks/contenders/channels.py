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


def by_channel(model: nn.Module, slot: Slot, width: int) -> Tensor:
    """[width, d]: what each channel has in the slot's tensor."""
    tensor = named_tensors(model)[slot.tensor].detach().movedim(slot.dim, 0)
    return tensor[slot.index(width)].flatten(1)


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


def selection(group: ChannelGroup, keep: Tensor, coeffs: Tensor | None = None) -> FoldPlan:
    """These channels stay (sorted); coeffs [n, k]: how they stand in for all, by default for themselves only."""
    matrix = torch.eye(group.width, dtype=torch.float64)[:, keep] if coeffs is None else coeffs.double()
    return FoldPlan(group.name, keep, (Fold(matrix),) * len(group.consumers))


class Channels(Contender):
    """A contender that removes channels of `groups`; survivors and their momentum stay as they are."""

    def begin(self, run: Run) -> None:
        self.run, self.steps = run, 0
        with run.meter.stopped():
            self._every = list(groups_of(run.model, run.data.train_x[: run.task.batch]).values())
        self.groups = {group.name: group for group in self._every if _plain(group)}

    def remove_(self, keep: Mapping[str, Tensor], coeffs: Mapping[str, Tensor] | None = None) -> dict[str, int] | None:
        """Keep these channels of the named groups, see `selection`. Returns all widths, None if nothing went."""
        keep = {name: kept for name, kept in keep.items() if len(kept) < self.groups[name].width}
        plans = [selection(self.groups[name], kept, coeffs and coeffs[name]) for name, kept in keep.items()]
        with Surgery(self.run.model, [self.run.optimizer]) as surgery:
            self._every = surgery.fold_all_(self._every, plans)
        self.groups = {group.name: group for group in self._every if group.name in self.groups}
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
            groups = list(groups_of(run.model, run.data.train_x[: run.task.batch]).values())
            wanted = {group: self.widths.get(group.name, group.width) for group in groups}
            plans = [selection(group, group.leading(k)) for group, k in wanted.items() if k < group.width]
            with Surgery(run.model, [run.optimizer]) as surgery:
                surgery.fold_all_(groups, plans)
            for module in run.model.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()  # pyright: ignore


def _plain(group: ChannelGroup) -> bool:
    """No heads, experts or convolution groups: methods that know nothing of them leave such channels alone."""
    slots = [*group.producers, *group.passthrough, *(consumer.weight for consumer in group.consumers)]
    return group.blocks == 1 and all(slot.split is None for slot in slots)


def removals(record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    """The events of a run with apoptosis that were not undone."""
    return [event for event in record["events"] if not event["rolled_back"]]


def final_widths(record: Mapping[str, Any]) -> dict[str, int]:
    """Every group's width at the end of a run with apoptosis; empty if nothing was removed."""
    events = removals(record)
    return events[-1]["widths_after"] if events else {}
