"""A traced model, and all that must shrink with it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.optim import Optimizer

from .budget import flops
from .distributed import ALONE, Ranks
from .plan import ChannelGroup, CostTerm


@dataclass
class Network:
    """A traced model and all that must shrink with it. `groups` follows the removals."""

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    followers: tuple[nn.Module, ...]
    groups: list[ChannelGroup]
    costs: list[CostTerm]
    ranks: Ranks = ALONE

    @property
    def widths(self) -> dict[str, int]:
        return {group.name: group.width for group in self.groups}

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def flops(self) -> float:
        """Forward FLOPs of the example inputs at the present widths."""
        return flops(self.costs, self.widths)

    def narrowed(self, groups: list[ChannelGroup]) -> "Network":
        """The network once surgery has left these groups: a token takes as many experts as before."""
        before = {group.name: group.experts for group in self.groups}
        more: dict[str | None, float] = {group.name: before[group.name] / group.experts for group in groups}
        costs = [
            replace(term, flops=term.flops * max(more.get(term.out_group, 1), more.get(term.in_group, 1)))
            if term.routed else term
            for term in self.costs
        ]  # fmt: skip
        return replace(self, groups=groups, costs=costs)

    def prunable(self, floor: int) -> list[ChannelGroup]:
        return [group for group in self.groups if group.prunable and group.width > group.least(floor)]

    def open_costs(self, groups: Sequence[ChannelGroup]) -> list[CostTerm]:
        """Shares of the full network's cost (half FLOPs, half parameters) as functions of the widths of `groups`."""
        names, widths, terms = {group.name for group in groups}, self.widths, []
        full = {group.name: group.full_width for group in self.groups}
        parameters = flops([replace(term, flops=term.parameters) for term in self.costs], full)
        for term in self.costs:
            sides = [term.out_group, term.in_group]
            share = term.flops / flops(self.costs, full) + term.parameters / parameters
            fixed = math.prod(widths[side] for side in sides if side and side not in names)
            out_group, in_group = (side if side in names else None for side in sides)
            terms.append(CostTerm(share / 2 * fixed, out_group, in_group))
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        for group in (group for group in groups if group.gate is not None):  # what they hold, whoever takes them
            held = sum(sizes.get(consumer.weight.tensor, 0) for consumer in group.consumers)
            terms.append(CostTerm(held / group.width / parameters / 2, group.name, None))
        return terms
