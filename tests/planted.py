"""The planted-redundancy check, for any model: what is exactly redundant goes, and nothing else changes.

In every prunable group most channels become copies of a few: the same rows in all that makes them and all that they
pass through. Three things then follow without any tolerance of taste. An `apoptose` with next to no budget removes
all copies. The outputs in eval mode stay. And a step of plain gradient descent on the small model is that of the full
one with its copies tied:

    A class C of equal channels a_i has the parameters w_i = w and v_i, and the function depends on w and on the sum of
    the v_i. Removal leaves w and v = sum_i v_i. The gradients of the small model are, by the chain rule,
    dL/dw = sum_{i in C} dL/dw_i and dL/dv = dL/dv_i for any one i, since all a_i are equal.
    So the full model follows the small one if each w_i moves by the class's summed gradient, and of the v_i only
    one moves.

Positively homogeneous channels may be parallel instead of equal: w_i = c_i w with c_i > 0. The outputs stay, but the
step depends on which of them survives, and is not compared.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from apoptorch import Apoptosis, Policy
from apoptorch.batches import Batch, split
from apoptorch.neurons import neuron
from apoptorch.plan import ChannelGroup, Event, Slot
from apoptorch.surgery import named_tensors

POLICY = Policy(multiple=1, floor=1, rebalance=False)
BUDGET = {torch.float32: 1e-9, torch.float64: 1e-12}  # relative mean squared change of the output
OUTPUT, STEP = 1e-4, 1e-3  # what outputs may differ by, relative to their norm, and to the step's change of them


@dataclass(frozen=True)
class Classes:
    """The equal channels of a group: `source[i]` is the channel that i is a copy of (i itself if it is none)."""

    source: list[int]

    @property
    def distinct(self) -> list[int]:
        return [i for i, source in enumerate(self.source) if i == source]

    @property
    def copies(self) -> list[int]:
        return [i for i, source in enumerate(self.source) if i != source]


@dataclass(frozen=True)
class Outcome:
    """What the check found.

    Attributes:
        planted: for each group the width that must be left at most.
        left: for each of them the width that was left.
        output: relative change of the outputs in eval mode; where more than the copies went, on the inputs that were
            planned on (a neuron that is dead on all of these may be alive on another).
        step: difference of the outputs after one training step, against the tied full model, relative to what the
            step changed; None if not compared: where more than the copies was redundant, among others.
        event: the removal.
    """

    planted: dict[str, int]
    left: dict[str, int]
    output: float
    step: float | None
    event: Event

    @property
    def problems(self) -> list[str]:
        """In words what went wrong; nothing if all is as it must be."""
        found = [f"undone: {self.event.reason}"] if self.event.rolled_back else []
        found += [
            f"{name} keeps {self.left[name]} channels, of which only {distinct} differ"
            for name, distinct in self.planted.items()
            if self.left[name] > distinct
        ]
        if not self.output <= OUTPUT:
            found.append(f"the outputs changed by {self.output:.2g} of their norm")
        if self.step is not None and not self.step <= STEP:
            found.append(f"a training step is off that of the tied full model by {self.step:.2g} of itself")
        return found


def planted(
    model: nn.Module, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None, *, parallel: bool = False,
    most: int = 24, seed: int = 0,
) -> tuple[Outcome, Apoptosis]:  # fmt: skip
    """Plants copies in every prunable group of `model` (in place), removes them, and measures what changed.

    Args:
        model: best in float64, where rounding hides nothing and nothing looks redundant that isn't.
        args, kwargs: one batch, positional or by keyword, of at least 3 x `most` inputs.
        parallel: where a positive scale is folded exactly, copies are scaled by 1/2 to 2.
        most: distinct channels left in a group, at most; else half of them.
    """
    kwargs = kwargs or {}
    apoptosis = Apoptosis(model, example_inputs=kwargs or tuple(args), policy=POLICY)
    groups = [group for group in apoptosis.groups if group.prunable and group.width > 1 and group.gate is None]
    generator = torch.Generator().manual_seed(seed)
    classes = {group.name: _draw(group, most, generator) for group in groups}
    for group in groups:
        plant_(model, group, classes[group.name])
    if parallel:
        for group in groups:
            scale_(model, group, classes[group.name], generator)
    settle_(model, args, kwargs)
    full, before = copy.deepcopy(model), outputs(model, args, kwargs)
    event = apoptosis.apoptose(*args, **kwargs, budget=BUDGET[next(model.parameters()).dtype])
    left, step = {group.name: group.width for group in apoptosis.groups}, None
    exact = all(left[group.name] == len(classes[group.name].distinct) for group in groups)
    seen = Batch(tuple(args), kwargs) if exact else split(Batch(tuple(args), kwargs))[0]
    expected, found = (outputs(each, seen.args, seen.kwargs) for each in (full, model))
    output = float((found - expected).norm() / expected.norm())
    if groups and exact and not parallel and not _computed(full, groups):
        rate = descend_(full, args, kwargs, lambda: tie_gradients_(full, groups, classes))
        descend_(model, args, kwargs, lambda: None, rate)
        reference = outputs(full, args, kwargs)
        step = float((outputs(model, args, kwargs) - reference).norm() / (reference - before).norm())
    return Outcome({name: len(c.distinct) for name, c in classes.items()}, left, output, step, event), apoptosis


def opened(tensor: Tensor, slot: Slot) -> Tensor:
    """A copy of the tensor with all positions of the slot along dimension 0."""
    return slot.opened(tensor).movedim(slot.dim, 0).clone()


def write_(tensor: Tensor, slot: Slot, rows: Tensor) -> None:
    """Puts back what `opened` gave."""
    tensor.copy_(slot.closed(rows.movedim(0, slot.dim)))


def entries(slot: Slot, group: ChannelGroup, channels: Sequence[int] | None = None) -> Tensor:
    """Where these channels (None: all) lie along `slot.dim`, one channel after the other."""
    index = slot.index(group.width)
    return (index if channels is None else index[torch.tensor(channels, dtype=torch.int64)]).flatten()


@torch.no_grad()
def plant_(model: nn.Module, group: ChannelGroup, classes: Classes) -> None:
    """Makes the channels of each class equal: in what makes them, and in what they pass through."""
    tensors = named_tensors(model)
    for slot in makers(group):
        rows = opened(tensors[slot.tensor], slot)
        rows[entries(slot, group)] = rows[entries(slot, group, classes.source)]
        write_(tensors[slot.tensor], slot, rows)


@torch.no_grad()
def settle_(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    """Batch norms' running statistics become those of the inputs that are planned on, exactly: what is redundant
    besides the copies, as calibration sees it with these, need not be so with others."""
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in modes if modes[module] and isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for module in modes:
        module.training = module in norms
    hooks = [norm.register_forward_hook(_note_statistics) for norm in norms]
    seen = split(Batch(tuple(args), kwargs))[0]
    model(*seen.args, **seen.kwargs)
    for hook in hooks:
        hook.remove()
    for module, mode in modes.items():
        module.training = mode


def _note_statistics(norm: Any, args: tuple[Tensor], _: Tensor) -> None:
    """Of a batch as the norm itself uses them: the variance without Bessel's correction."""
    if norm.track_running_stats:
        channels = args[0].transpose(0, 1).flatten(1)
        norm.running_mean.copy_(channels.mean(1))
        norm.running_var.copy_(channels.var(1, correction=0))


@torch.no_grad()
def scale_(model: nn.Module, group: ChannelGroup, classes: Classes, generator: torch.Generator) -> None:
    """Scales every copy by a positive number, where the group's neurons and parameters allow that exactly."""
    slots = group.passthrough or group.producers
    owners = {slot.tensor.rpartition(".")[0] for slot in slots}
    kinds = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm)
    owner = model.get_submodule(owners.pop()) if len(owners) == 1 else None
    if not isinstance(owner, kinds) or not neuron(group.neuron).homogeneous:
        return
    tensors = named_tensors(model)
    scale = 0.5 + 1.5 * torch.rand(group.width, generator=generator)
    scale[classes.distinct] = 1.0
    for slot in slots:
        if isinstance(tensor := tensors[slot.tensor], nn.Parameter):
            rows = opened(tensor, slot).movedim(0, -1)
            index = entries(slot, group)
            rows[..., index] *= scale.repeat_interleave(len(index) // group.width).to(tensor)
            write_(tensor, slot, rows.movedim(-1, 0))


@torch.no_grad()
def tie_gradients_(model: nn.Module, groups: Sequence[ChannelGroup], classes: dict[str, Classes]) -> None:
    """The gradients with which the full model takes the small one's step (see the top of this file)."""
    tensors = named_tensors(model)
    for group in groups:
        of = classes[group.name]
        for slot in makers(group):
            if (gradient := tensors[slot.tensor].grad) is not None:
                rows, index, source = opened(gradient, slot), entries(slot, group), entries(slot, group, of.source)
                sums = torch.zeros_like(rows).index_add_(0, source, rows[index])
                rows[index] = sums[source]
                write_(gradient, slot, rows)
        for slot in (consumer.weight for consumer in group.consumers):
            if (gradient := tensors[slot.tensor].grad) is not None:
                rows = opened(gradient, slot)
                rows[entries(slot, group, of.copies)] = 0.0
                write_(gradient, slot, rows)


def descend_(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], tie_: Callable[[], None], rate: float | None = None
) -> float:
    """One step of gradient descent, batch norm as in training and dropout off; returns its rate.

    Without a given rate it is small enough for the loss to stay about linear.
    """
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        module.training = modes[module] and isinstance(module, nn.modules.batchnorm._BatchNorm)
    model.zero_grad()
    loss(model(*args, **kwargs)).backward()
    for module, mode in modes.items():
        module.training = mode
    tie_()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if rate is None:
        rate = min(0.01, 0.03 / float(torch.stack([g.norm() for g in gradients]).norm()))
    torch.optim.SGD(model.parameters(), lr=rate).step()
    return rate


def loss(output: Any) -> Tensor:
    """A loss that every output counts in."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack([(leaf - 1).square().mean() for leaf in leaves]).sum()


@torch.no_grad()
def outputs(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """All numbers that the model returns in eval mode, in one vector."""
    training = model.training
    leaves = tree_leaves(model.eval()(*args, **kwargs))
    model.train(training)
    return torch.cat([x.flatten().double() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()])


def _draw(group: ChannelGroup, most: int, generator: torch.Generator) -> Classes:
    """Random classes, the same number in every block; the distinct channels lie anywhere in it."""
    width = group.width // group.blocks
    distinct = min(math.ceil(width / 2), max(1, most // group.blocks))
    distinct = math.ceil(distinct / group.multiple) * group.multiple
    source = []
    for block in range(group.blocks):
        order = torch.randperm(width, generator=generator).tolist()
        place = {channel: i for i, channel in enumerate(order)}
        source += [block * width + order[place[channel] % distinct] for channel in range(width)]
    return Classes(source)


def makers(group: ChannelGroup) -> list[Slot]:
    """All that a channel is made of and passes through."""
    return [*group.producers, *group.passthrough]


def _computed(model: nn.Module, groups: Sequence[ChannelGroup]) -> bool:
    """Are weights computed from parameters (weight_norm), so that gradients don't lie where channels do?"""
    names = [slot.tensor for group in groups for slot in (*makers(group), *(c.weight for c in group.consumers))]
    return any("parametrizations" in name or name not in named_tensors(model) for name in names)
