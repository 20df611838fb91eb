"""Group lasso during training: Lym et al. 2019, "PruneTrain: Fast Neural Network Training by Dynamic Sparse Model
Reconfiguration".

The loss gains lambda times the sum of the norms of every channel's incoming and outgoing weights. lambda is set once,
at the first step, such that this term is `ratio` of the whole loss. Each `interval` of the run, channels whose
incoming and outgoing weights have all vanished are removed. The penalty is applied by its proximal step behind the
optimizer's, scaled as momentum scales a gradient: norms reach zero exactly, with any optimizer, also in a short run.
"""

from typing import Any

import torch
from comparison import Run
from torch import Tensor

from apoptorch.surgery import named_tensors

from .channels import Channels, columns, matrices, rows

RATIO = 0.25  # theirs
INTERVAL = 10 / 182  # theirs on CIFAR: 10 of 182 epochs
THRESHOLD = 1e-4  # theirs: weights below it count as vanished


class GroupLasso(Channels):
    def __init__(self, ratio: float = RATIO):
        self.ratio = ratio

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.interval = max(1, round(INTERVAL * run.total_steps))
        model, batch = run.model, run.task.batch
        with torch.no_grad():
            loss = float(run.task.loss_fn(model.eval()(run.data.train_x[:batch]), run.data.train_y[:batch]))
        model.train()
        self.strength = self.ratio / (1 - self.ratio) * loss / max(1e-12, float(sum(n.sum() for n in self.norms())))

    def norms(self) -> list[Tensor]:
        """Of each regularised slice: for every slot of every group [width]."""
        return [block.flatten(1).norm(dim=1) for block, *_ in self._blocks()]

    def gradients(self) -> None:
        settings = self.run.optimizer.param_groups[0]
        self.pace = settings["lr"] / (1 - settings.get("momentum", 0.0))

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> Any:
        self.steps += 1
        for block, tensor, place in self._blocks():
            norms = block.flatten(1).norm(dim=1).clamp(min=1e-12)
            shrunk = (1 - self.pace * self.strength / norms).clamp(min=0)
            tensor[place] = block * shrunk.view(-1, *[1] * (block.ndim - 1))
        return self.remove_(self.vanished()) if self.steps % self.interval == 0 else None

    def vanished(self) -> dict[str, Tensor]:
        """What stays of each group; always one channel."""
        keep = {}
        for name, group in self.groups.items():
            incoming = rows(self.run.model, group)[:, :-1].abs().amax(1)
            largest = torch.maximum(incoming, columns(self.run.model, group).abs().amax(1))
            alive = largest > THRESHOLD
            alive[largest.argmax()] = True
            keep[name] = alive.nonzero()[:, 0]
        return keep

    def _blocks(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """(slices [width, inner, ...], the tensor they are of with their dimension first, where they lie in it)."""
        named, found = named_tensors(self.run.model), []
        for group in self.groups.values():
            for slot in [*matrices(self.run.model, group), *(consumer.weight for consumer in group.consumers)]:
                tensor, place = named[slot.tensor].data.movedim(slot.dim, 0), slot.index(group.width)
                found.append((tensor[place], tensor, place))
        return found
