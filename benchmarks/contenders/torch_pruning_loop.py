"""Torch-Pruning 1.6.1 (Fang et al. 2023, "DepGraph: Towards Any Structural Pruning") within the training loop.

At the steps of the run with apoptosis, the same number of parameters is left, by global ranking of the channels.
Torch-Pruning replaces every pruned Parameter by a new one, so an optimizer would go on with the old: the new ones are
put in their place here, with the state of the entries that stayed. Finding the ratio that leaves so many parameters
is not counted.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptorch.surgery import named_tensors

from .channels import Channels, matrices, removals

IMPORTANCE = {
    "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "taylor": lambda: tp.importance.GroupTaylorImportance(),
}


class TorchPruning(Channels):
    """importance: "magnitude", or "taylor" (gradient of the loss on 2,048 training inputs)."""

    def __init__(self, apoptosis: Mapping[str, Any], importance: str):
        self.targets = {event["step"]: event["parameters_after"] for event in removals(apoptosis)}
        self.importance = importance

    def step(self, x: Tensor, y: Tensor) -> Any:
        self.steps += 1
        if self.steps not in self.targets:
            return None
        if self.importance == "taylor":
            inputs, targets = self.calibration()
            self.run.optimizer.zero_grad()
            self.run.task.loss_fn(self.run.model.eval()(inputs), targets).backward()
            self.run.model.train()
        with self.run.meter.stopped():
            ratio = self._ratio(self.targets[self.steps])
        prune_(self._pruner(self.run.model, ratio), self.run.optimizer)
        return {"ratio": ratio}

    def _pruner(self, model: nn.Module, ratio: float) -> tp.BasePruner:
        named = named_tensors(self.run.model)
        open_ = {id(named[slot.tensor]) for group in self.groups.values() for slot in matrices(self.run.model, group)}
        layers = [
            name for name, m in self.run.model.named_modules() if isinstance(getattr(m, "weight", None), nn.Parameter)
        ]
        ignored = [name for name in layers if self._matrix(name) and id(named[f"{name}.weight"]) not in open_]
        return tp.BasePruner(
            model, self.run.data.train_x[:2], IMPORTANCE[self.importance](), global_pruning=True, pruning_ratio=ratio,
            ignored_layers=[model.get_submodule(name) for name in ignored], in_channel_groups={}, out_channel_groups={},
        )  # fmt: skip

    def _matrix(self, name: str) -> bool:
        return self.run.model.get_submodule(name).weight.ndim > 1  # pyright: ignore

    def _ratio(self, target: int) -> float:
        """The smallest share of channels, to 1/1024, whose removal leaves no more than `target` parameters."""
        low, high = 0.0, 1.0
        while high - low > 1 / 1024:
            middle = (low + high) / 2
            low, high = (middle, high) if self._left(middle) > target else (low, middle)
        return high

    def _left(self, ratio: float) -> int:
        trial = copy.deepcopy(self.run.model)
        for mine, own in zip(trial.parameters(), self.run.model.parameters(), strict=True):
            mine.grad = own.grad
        for group in self._pruner(trial, ratio).step(interactive=True):
            group.prune()
        return sum(parameter.numel() for parameter in trial.parameters())


def prune_(pruner: tp.BasePruner, optimizer: Optimizer) -> None:
    """One step of the pruner; the optimizer's parameters and their state follow."""
    for group in pruner.step(interactive=True):
        for dep, idxs in group:
            module, dim = dep.target.module, 0 if pruner.DG.is_out_channel_pruning_fn(dep.handler) else 1
            before = dict(module.named_parameters(recurse=False))
            dep(idxs)
            for name, new in module.named_parameters(recurse=False):
                if new is not before[name]:
                    _follow_(optimizer, before[name], new, dim, idxs)


def _follow_(optimizer: Optimizer, old: nn.Parameter, new: nn.Parameter, dim: int, gone: list[int]) -> None:
    kept = torch.ones(old.shape[dim], dtype=torch.bool)
    kept[list(gone)] = False
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    state = optimizer.state.pop(old, {})
    optimizer.state[new] = {
        key: value.movedim(dim, 0)[kept].movedim(0, dim).clone()
        if isinstance(value, Tensor) and value.shape == old.shape
        else value
        for key, value in state.items()
    }
