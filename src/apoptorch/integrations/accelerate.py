"""Neuron apoptosis in a loop that Hugging Face accelerate runs."""

from typing import Any

from accelerate import Accelerator
from torch import nn

from apoptorch.apoptosis import Apoptosis
from apoptorch.plan import Event

from .narrowing import narrow_on_load, plain_forward


class AcceleratedApoptosis:
    """`apoptorch.Apoptosis` for what `accelerator.prepare` returned, with the same `step`.

    It waits while gradients accumulate, plans outside autocast, and is part of `accelerator.save_state` and
    `load_state`, which load narrow checkpoints into the full-size model.

    Args:
        accelerator: the `Accelerator`.
        model: as prepared.
        optimizer: as prepared; one, several or none.
        arguments: as for `apoptorch.Apoptosis`; total_steps counts optimizer steps, not batches.

    Attributes:
        apoptosis: the `apoptorch.Apoptosis`.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module, optimizer: Any = None, **arguments: Any):
        self.accelerator, self._model = accelerator, accelerator.unwrap_model(model)
        several = optimizer if isinstance(optimizer, list | tuple) else [] if optimizer is None else [optimizer]
        optimizers = [getattr(item, "optimizer", item) for item in several]
        with plain_forward(self._model):
            self.apoptosis = Apoptosis(model, optimizers, **arguments)
        narrow_on_load(self._model, arguments.get("followers", ()))
        accelerator.register_for_checkpointing(self)

    def step(self, *inputs: Any, targets: Any = None, **kwinputs: Any) -> Event | None:
        """Call after every `optimizer.step()`, accumulating or not; see `Apoptosis.step`."""
        if not self.accelerator.sync_gradients:
            return None
        with plain_forward(self._model):
            return self.apoptosis.step(*inputs, targets=targets, **kwinputs)

    def state_dict(self) -> dict[str, Any]:
        """For `accelerator.save_state`."""
        return self.apoptosis.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """For `accelerator.load_state`."""
        self.apoptosis.load_state_dict(state)
