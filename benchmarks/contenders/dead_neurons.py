"""Dead-neuron pruning: Dufort-Labbe et al. 2024, "Maxwell's Demon at Work: Efficient Pruning by Leveraging Saturation
of Neurons" (DemP).

Training is made to kill neurons, and the dead ones are removed while it goes on: weights are decayed towards zero
(the scale of norm layers where there are any, else the incoming weights) with a strength that follows one cycle, up
over the first half of the run and down to zero; noise is added to the weights of living neurons only, so that none
is revived by it. A neuron is dead if it is zero for every one of 2,048 training inputs; what it is worth elsewhere
doesn't matter then, and its removal changes nothing on them.
"""

import math
from functools import partial
from typing import Any

import torch
from comparison import Run
from torch import Tensor, nn

from apoptorch.plan import ChannelGroup, Slot
from apoptorch.surgery import named_tensors

from .channels import Channels, matrices

PEAK = 0.02  # decay's largest coefficient; chosen here, as are the noise and the interval: theirs vary with the task
NOISE = 1e-3  # standard deviation, at the first learning rate
INTERVAL = 1 / 20  # of the run between removals
READERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class DeadNeurons(Channels):
    def __init__(self, peak: float = PEAK, noise: float = NOISE):
        self.peak, self.noise = peak, noise

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeadNeurons":
        return self  # hooks of a copied model hold it

    def begin(self, run: Run) -> None:
        super().begin(run)
        self.interval = max(1, round(INTERVAL * run.total_steps))
        self.first_lr = run.optimizer.param_groups[0]["lr"]
        self.random = torch.Generator().manual_seed(0)
        self.active: dict[str, Tensor] = {}
        for name, group in list(self.groups.items()):
            reader = run.model.get_submodule(group.consumers[0].weight.tensor.rpartition(".")[0])
            if isinstance(reader, READERS) and group.consumers[0].weight.dim == 1:
                reader.register_forward_pre_hook(partial(self._note, name))
            else:
                del self.groups[name]  # nothing says whether its neurons live

    def gradients(self) -> None:
        named, share = named_tensors(self.run.model), self.steps / self.run.total_steps
        strength = self.peak * (2 * share if share < 0.5 else (1 + math.cos(math.pi * (2 * share - 1))) / 2)
        for group in self.groups.values():
            for slot in self._decayed(group):
                tensor = named[slot.tensor]
                if tensor.grad is not None:
                    tensor.grad.add_(tensor.detach(), alpha=strength)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor) -> Any:
        self.steps += 1
        noise = self.noise * self.run.optimizer.param_groups[0]["lr"] / self.first_lr
        for name, group in self.groups.items():
            live = self.active[name] > 0
            for slot in matrices(self.run.model, group) if noise else ():
                tensor = named_tensors(self.run.model)[slot.tensor].data.movedim(slot.dim, 0)
                place = slot.index(group.width)[live].flatten()
                tensor[place] += noise * torch.randn(tensor[place].shape, generator=self.random)
        return self.remove_(self.living()) if self.steps % self.interval == 0 else None

    def living(self) -> dict[str, Tensor]:
        """What stays of each group; always one channel."""
        self.run.model.eval()(self.calibration()[0])
        self.run.model.train()
        keep = {}
        for name, active in self.active.items():
            alive = active > 0
            alive[active.argmax()] = True
            keep[name] = alive.nonzero()[:, 0]
        return keep

    def _decayed(self, group: ChannelGroup) -> list[Slot]:
        scales = [slot for slot in group.passthrough if slot.tensor.endswith(".weight")]
        return scales or matrices(self.run.model, group)

    def _note(self, name: str, reader: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Largest magnitude of each of the group's channels in what its first consumer reads."""
        x = inputs[0].detach().abs()
        flat = x if isinstance(reader, nn.Linear) else x.movedim(1, -1)
        largest = flat.reshape(-1, flat.shape[-1]).amax(0)
        group = self.groups[name]
        self.active[name] = largest[group.consumers[0].weight.index(group.width)].amax(1)
