"""Neuron apoptosis in Hugging Face transformers: `Trainer(..., callbacks=[ApoptosisCallback()])`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_model
from torch import nn
from transformers.modeling_utils import PreTrainedModel
from transformers.trainer_callback import ExportableState, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from apoptorch.apoptosis import Apoptosis
from apoptorch.batches import LossFn
from apoptorch.errors import ArgumentError
from apoptorch.policy import Policy
from apoptorch.surgery import Surgery, following

from .narrowing import narrow_on_load, plain_forward

Model = TypeVar("Model", bound=PreTrainedModel)
Bound = TypeVar("Bound")


class ApoptosisCallback(TrainerCallback, ExportableState):
    """Removes redundant neurons of the model that `transformers.Trainer` trains.

    The batches are those that the model itself is called with. Its state is part of the trainer's checkpoints, and
    training resumes at the widths that were reached; a calibration set half gathered is gathered anew. On several
    processes, `bind` it to the trainer.

    Args:
        loss_fn: `loss_fn(output, labels)` -> mean loss, for models that don't compute it; None: the model's own loss.
        policy: as for `apoptorch.Apoptosis`, like the rest.
        protect: names of modules whose outputs keep their width.
        followers: modules that shrink alike.

    Attributes:
        apoptosis: the `apoptorch.Apoptosis`, from the first training batch on.
    """

    def __init__(
        self, loss_fn: LossFn | None = None, *, policy: str | Policy = "normal", protect: Sequence[str] = (),
        followers: Sequence[nn.Module] = (),
    ):  # fmt: skip
        self.loss_fn = loss_fn
        self.arguments: dict[str, Any] = {"policy": policy, "protect": protect, "followers": followers}
        self.apoptosis: Apoptosis | None = None
        self._batch: dict[str, Any] = {}
        self._optimizer, self._total_steps, self._saved = None, None, None
        self._trainer: Any = None

    def bind(self, trainer: Bound) -> Bound:
        """`trainer = callback.bind(Trainer(..., callbacks=[callback]))`: needed on several processes, since a Trainer
        doesn't hand its wrapper around the model to callbacks."""
        self._trainer = trainer
        return trainer

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before a checkpoint is read: the model takes narrow ones."""
        narrow_on_load(kwargs["model"], self.arguments["followers"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch what the model is called with."""
        if args.world_size > 1 and self._trainer is None:
            raise ArgumentError([
                f"`callback` must be bound to the Trainer on several processes, got {args.world_size} of them. Write "
                "trainer = callback.bind(Trainer(..., callbacks=[callback]))."
            ])  # fmt: skip
        self._model = kwargs["model"]
        self._called = self._model if self._trainer is None else self._trainer.model_wrapped
        self.apoptosis, self._total_steps = None, state.max_steps
        optimizer = kwargs["optimizer"]
        self._optimizer = getattr(optimizer, "optimizer", optimizer)
        states: Any = state.stateful_callbacks or {}
        saved = states.get(type(self).__name__) if state.global_step else None
        self._saved = saved["attributes"]["apoptosis"] if isinstance(saved, dict) else None
        if isinstance(saved, dict):
            _resize(self._model, saved["attributes"].get("sizes", {}))
        self._hook = self._called.register_forward_pre_hook(self._seen, with_kwargs=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After every optimizer step."""
        if self.apoptosis is not None:
            batch = dict(self._batch)
            targets = batch.pop("labels", None) if self.loss_fn else None
            with plain_forward(self._model):
                event = self.apoptosis.step(targets=targets, **batch)
            if event is not None:
                self._model.config.apoptosis_sizes = following(self._model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop watching."""
        self._hook.remove()

    def state(self) -> dict[str, Any]:
        """A part of the trainer's checkpoint, as JSON."""
        state = None if self.apoptosis is None else {**self.apoptosis.state_dict(), "batches": []}
        sizes = {} if self.apoptosis is None else following(self._model)
        return {"args": {}, "attributes": {"apoptosis": state, "sizes": sizes}}

    def _seen(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not model.training or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if args:
            raise ArgumentError(["`model` must be called by keyword, as Trainer does, got positional arguments."])
        self._batch = {k: v for k, v in kwargs.items() if v is not None and k != "num_items_in_batch"}
        if self.apoptosis is None:
            self._begin()

    def _begin(self) -> None:
        example = {k: v for k, v in self._batch.items() if k != "labels" or self.loss_fn is None}
        self._hook.remove()  # what follows calls the model, too
        with torch.autocast(self._model.device.type, enabled=False), plain_forward(self._model):
            self.apoptosis = Apoptosis(
                self._called, self._optimizer, example_inputs=example, loss_fn=self.loss_fn or _own_loss,
                total_steps=self._total_steps, **self.arguments,
            )  # fmt: skip
            if self._saved is not None:
                self.apoptosis.load_state_dict(self._saved)
        self._hook = self._called.register_forward_pre_hook(self._seen, with_kwargs=True)


def load_pretrained(model_class: type[Model], path: str | Path) -> Model:
    """What `save_pretrained`, or a checkpoint of Trainer, holds of a narrowed model: built from its configuration at
    full size, narrowed and filled. `model_class`: such as BertForSequenceClassification.

    Raises:
        ArgumentError: there is no model.safetensors in `path`.
    """
    file = Path(path) / "model.safetensors"
    if not file.is_file():
        raise ArgumentError([f"`path` must be a directory with model.safetensors, got {path}. Save the model there."])
    model = model_class(model_class.config_class.from_pretrained(path))  # type: ignore[union-attr]
    load_model(narrow_on_load(model), file)
    _resize(model, getattr(model.config, "apoptosis_sizes", {}))
    return model.eval()


def _resize(model: nn.Module, sizes: Any) -> None:
    """Safetensors hold none of the integer attributes that were narrowed: a checkpoint's JSON does."""
    with Surgery(model) as surgery:
        surgery.resize_(sizes)


def _own_loss(output: Any, labels: Any) -> torch.Tensor:
    return output["loss"]
