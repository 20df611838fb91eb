"""Apoptosis as in the paper of 2016: during training, neurons that the weights alone show to be alike are merged.

Criteria are the closed forms (`apoptorch.redundancy.search_weights`): dead, constant, parallel, close and reflected
neurons. No data is looked at. An event may change what a group sends on by `share` of its own worst case, for inputs
of unit variance; events come when policy "normal" would have them.
"""

import math
from typing import Any

import torch
from comparison import Run
from torch import Tensor

from apoptorch import Policy
from apoptorch.neurons import neuron
from apoptorch.plan import ChannelGroup
from apoptorch.redundancy import search_weights

from .channels import Channels, columns, rows

SHARE = 0.05


def event_steps(total_steps: int) -> list[int]:
    """When the policy looks for redundancy, were it always to find some."""
    policy = Policy()
    at, steps = max(policy.first_step, round(policy.start * total_steps)), []
    while at <= policy.stop * total_steps:
        steps.append(at)
        at = math.ceil(at * policy.gap)
    return steps


class WeightsOnly(Channels):
    def __init__(self, share: float = SHARE):
        self.share = share

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.at = set(event_steps(run.total_steps))

    def step(self, x: Tensor, y: Tensor) -> Any:
        self.steps += 1
        if self.steps not in self.at:
            return None
        keep, coeffs = {}, {}
        for name, group in self.groups.items():
            keep[name], coeffs[name] = self._fold(group)
        return self.remove_(keep, coeffs)

    def _fold(self, group: ChannelGroup) -> tuple[Tensor, Tensor]:
        weights, outgoing = rows(self.run.model, group), columns(self.run.model, group).norm(dim=1)
        norm = math.sqrt(weights.shape[1] - 1)
        worst = float((outgoing * (weights[:, :-1].norm(dim=1) * norm + weights[:, -1].abs())).sum())
        search = search_weights(
            weights, neuron(group.neuron), outgoing, input_norm=norm, bound=self.share * worst, floor=8,
            constant=False, max_pooled=group.max_pooled,
        )  # fmt: skip
        width = group.width - len(search.removed)
        fold = search.fold(min(group.width, 8 * math.ceil(width / 8)))
        return fold.keep, fold.coeffs.to(torch.float64)
