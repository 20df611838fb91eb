"""Neuron apoptosis in Lightning: `Trainer(callbacks=[ApoptosisCallback()])`."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import nn

from apoptorch.apoptosis import Apoptosis
from apoptorch.batches import LossFn
from apoptorch.errors import ArgumentError
from apoptorch.policy import Policy

from .narrowing import narrow_on_load

TARGETS = ("labels", "label", "targets", "target", "y")
LOSSES = ("loss_fn", "criterion", "loss")


class ApoptosisCallback(Callback):
    """Removes redundant neurons of the LightningModule while it trains.

    It works after every optimizer step, also with gradient accumulation and mixed precision. Its state is part of
    Lightning's checkpoints, and training resumes at the widths that were reached, also in a further fit. Copies that
    Lightning's weight averaging keeps shrink alike.

    Args:
        loss_fn: `loss_fn(output, targets)` -> mean loss; None: the module's attribute loss_fn, criterion or loss, if
            it has one, else budgets are relative changes of the output.
        batch: `batch(batch) -> (inputs, targets)`, inputs a tensor, a tuple or a dict of keyword arguments.
            None: a pair is (inputs, targets), a dict's "labels" or "targets" are the targets and the rest keywords.
        policy: as for `apoptorch.Apoptosis`, like the rest.
        protect: names of modules whose outputs keep their width.
        followers: modules that shrink alike.

    Attributes:
        apoptosis: the `apoptorch.Apoptosis`, from the first training batch on.
    """

    def __init__(
        self, loss_fn: LossFn | None = None, *, batch: Callable[[Any], tuple[Any, Any]] | None = None,
        policy: str | Policy = "normal", protect: Sequence[str] = (), followers: Sequence[nn.Module] = (),
    ):  # fmt: skip
        self.loss_fn, self.batch = loss_fn, batch or inputs_and_targets
        self.arguments: dict[str, Any] = {"policy": policy, "protect": protect}
        self.followers = list(followers)
        self.apoptosis: Apoptosis | None = None
        self._saved: dict[str, Any] | None = None
        self._global_step = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before a checkpoint is read: the module takes narrow ones."""
        if self.apoptosis is not None and stage == "fit":  # a further one, which makes optimizers of its own
            self._saved = self.apoptosis.state_dict() if self.apoptosis.model is pl_module else None
            self.apoptosis = None
        narrow_on_load(pl_module, self.followers)
        for average in _averages(trainer):  # one that is made later copies the module with its hooks
            narrow_on_load(average)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        """At the first batch: look at the model."""
        if self.apoptosis is not None:
            return
        model: Any = pl_module if trainer.world_size == 1 else trainer.strategy.model  # within DDP
        steps = trainer.estimated_stepping_batches
        self.apoptosis = Apoptosis(
            model, list(trainer.optimizers), example_inputs=self.batch(batch)[0],
            loss_fn=self.loss_fn or _loss_of(pl_module), total_steps=int(steps) if 0 < steps < float("inf") else None,
            followers=[*self.followers, *_averages(trainer)], **self.arguments,
        )  # fmt: skip
        if self._saved is not None:
            self.apoptosis.load_state_dict(self._saved)
            self._saved = None
        self._global_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """After every optimizer step."""
        if self.apoptosis is None or trainer.global_step == self._global_step:
            return  # gradients accumulate
        self._global_step = trainer.global_step
        inputs, targets = self.batch(batch)
        if isinstance(inputs, dict):
            self.apoptosis.step(targets=targets, **inputs)
        else:
            self.apoptosis.step(*(inputs if isinstance(inputs, tuple) else (inputs,)), targets=targets)

    def state_dict(self) -> dict[str, Any]:
        """A part of Lightning's checkpoint."""
        return self._saved or {} if self.apoptosis is None else self.apoptosis.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until the first batch, when there is a model to resume."""
        self._saved = state_dict or None


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """Splits the batches that data loaders usually give.

    Raises:
        ArgumentError: the batch has another form.
    """
    if isinstance(batch, dict):
        name = next((name for name in TARGETS if name in batch), None)
        return {key: value for key, value in batch.items() if key != name}, batch[name] if name else None
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    if hasattr(batch, "shape"):
        return batch, None
    raise ArgumentError([
        f"`batch` must be given for batches that are no tensor, pair or dict, got {type(batch).__name__}. Pass "
        "ApoptosisCallback(batch=...), a function that returns (inputs, targets)."
    ])  # fmt: skip


def _averages(trainer: pl.Trainer) -> list[nn.Module]:
    """The copies of the module that Lightning's weight averaging has made by now."""
    made = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    return [average.module for average in made if average is not None]


def _loss_of(module: nn.Module) -> LossFn | None:
    name = next((name for name in LOSSES if callable(getattr(module, name, None))), None)
    return getattr(module, name) if name else None
