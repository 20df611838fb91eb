"""What is checked at the door. Every check yields its problems; all of them are reported together."""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten, tree_leaves

from .batches import Batch, LossFn
from .calibrate import calibrating
from .distributed import ALONE, Ranks
from .errors import ArgumentError, SurgeryError
from .graph import preserved
from .policy import POLICIES, Policy
from .sharding import is_sharded
from .surgery import Surgery


def uncompiled(model: nn.Module) -> nn.Module:
    """The module itself, without torch.compile around it.

    Raises:
        ArgumentError: the model is wrapped for distributed training in a way that is not followed here.
    """
    model = getattr(model, "_orig_mod", model)
    wrapper = type(model).__name__
    if wrapper in ("DistributedDataParallel", "FullyShardedDataParallel", "DataParallel") or wrapper.startswith("FSDP"):
        raise ArgumentError([
            f"`model` must not be wrapped by {wrapper} here: Apoptosis follows DistributedDataParallel "
            "and fully_shard, shrink takes the module inside. Pass model.module, or train with DistributedDataParallel."
        ])  # fmt: skip
    return model


def checked(problems: Iterable[str]) -> None:
    """Raises one ArgumentError with all problems, if there are any."""
    if found := list(problems):
        raise ArgumentError(found)


def model_problems(model: Any, ranks: Ranks = ALONE) -> Iterator[str]:
    if not isinstance(model, nn.Module):
        yield f"`model` must be a torch.nn.Module, got {type(model).__name__}. Pass the network itself."
        return
    parameters = list(model.named_parameters())
    if not parameters:
        yield f"`model` must have parameters, got {type(model).__name__} without any. Initialise lazy modules first."
        return
    home = parameters[0][1].device
    for name, parameter in parameters:
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            yield f"`model` must be initialised, got a lazy parameter ({name}). Run one forward pass first."
            continue
        where = f"({name}, shape {tuple(parameter.shape)})"
        if parameter.device != home:
            yield f"`model` must be on one device, got {parameter.device} besides {home} {where}. Use model.to()."
        elif is_sharded(parameter) and ranks.sharded is None:
            yield f"`model` must not be sharded here, or by fully_shard on the model itself, got a DTensor {where}."
        elif not parameter.is_floating_point():
            yield f"`model` must have floating-point parameters, got {parameter.dtype} {where}. Make it a buffer."
        elif parameter.device.type == "meta":
            yield f"`model` must hold values, got a parameter on the meta device {where}. Materialise it first."


def optimizer_problems(model: nn.Module, optimizers: Sequence[Any], followers: Sequence[nn.Module]) -> Iterator[str]:
    known = {id(p) for module in (model, *followers) for p in module.parameters()}
    for i, optimizer in enumerate(optimizers):
        if not isinstance(optimizer, Optimizer):
            yield f"`optimizer` must be one Optimizer or several, got {type(optimizer).__name__} (number {i})."
            continue
        if hasattr(optimizer, "consolidate_state_dict"):
            yield (
                f"`optimizer` must not shard its state over ranks, got {type(optimizer).__name__} (number {i}). "
                "Use the optimizer that it wraps."
            )
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        if not any(id(p) in known for p in owned):
            yield (
                f"`optimizer` must own parameters of `model`, got {type(optimizer).__name__} (number {i}) with "
                f"{len(owned)} parameters, none of them the model's. Build it from model.parameters()."
            )


def follower_problems(model: nn.Module, followers: Any) -> Iterator[str]:
    if not isinstance(followers, list | tuple):
        yield f"`followers` must be a list or tuple of modules, got {type(followers).__name__}. Write followers=(ema,)."
        return
    for i, follower in enumerate(followers):
        if not isinstance(follower, nn.Module):
            yield f"`followers` must be modules, got {type(follower).__name__} (number {i}). Pass an EMA copy, say."
            return
    try:
        Surgery(model, (), followers)
    except SurgeryError as error:
        yield str(error)


def name_problems(model: nn.Module, protect: Any) -> Iterator[str]:
    if not isinstance(protect, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in protect):
        yield f"`protect` must be a sequence of module names, got {protect!r}. Write protect=('encoder.0',)."
        return
    modules = dict(model.named_modules())
    for name in protect:
        if name not in modules or not name:
            near = [other for other in modules if other and (name in other or other.rpartition(".")[2] == name)]
            yield (
                f"`protect` must name modules of the model, got {name!r}. "
                + (f"Did you mean {', '.join(map(repr, near[:3]))}?" if near else "See model.named_modules().")
            )
        elif not [*modules[name].parameters(), *modules[name].buffers()]:
            yield (
                f"`protect` must name modules that have parameters, got {name!r} ({type(modules[name]).__name__}). "
                "Name the layer whose channels it passes on."
            )


def as_call(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of one call: from a tensor, a tuple or list, or a dict of keywords."""
    if isinstance(example_inputs, dict):
        return (), dict(example_inputs)
    return (tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,)), {}


def call_problems(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
    """Does the model run on these inputs?"""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not tensors or any(t.numel() == 0 for t in tensors):
        return  # `data_problems` says so
    yield from batch_problems(model, Batch(args, kwargs), None, "example_inputs")


def batch_problems(model: nn.Module, batch: Batch, loss_fn: LossFn | None, name: str = "inputs") -> Iterator[str]:
    """Does the model run on this batch as it is measured, and the loss on what it returns?"""
    try:
        with calibrating(model), torch.no_grad():
            output = model(*batch.args, **batch.kwargs)
    except Exception as error:  # a forward pass raises whatever the user wrote
        yield (
            f"`{name}` must fit model.forward, got {_told((batch.args, batch.kwargs))}: {_text(error)}. "
            "Pass a tensor, a tuple of positional or a dict of keyword arguments, as in training."
        )
        return
    try:
        with torch.no_grad():
            loss_fn(output, batch.targets) if loss_fn is not None else None
    except Exception as error:  # nor is it known what a loss raises
        trained = _training_output(model, batch)
        other = trained not in (None, type(output).__name__)
        yield (
            f"`loss_fn` must take (output, targets) as the model is measured, which is in eval mode, got "
            f"{type(output).__name__} {_told(output)}{f', in training {trained},' if other else ''} and "
            f"{type(batch.targets).__name__} {_told(batch.targets)}: {_text(error)}. "
            + (
                "Write it for both, as criterion(getattr(output, 'logits', output), targets)."
                if other
                else "Pass the targets that belong to these inputs."
            )
        )


def _training_output(model: nn.Module, batch: Batch) -> str | None:
    """The type of what the model returns in training; None if it can't be said (batch norm of a single input)."""
    try:
        with preserved(model), torch.no_grad():
            return type(model.train()(*batch.args, **batch.kwargs)).__name__
    except Exception:  # as in `batch_problems`
        return None


def form(batch: Batch) -> tuple[Any, ...]:
    """What batches have in common that the same model takes: all but the number of inputs and the values."""
    leaves, spec = tree_flatten((batch.args, batch.kwargs, batch.targets))

    def told(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or leaf.ndim == 0:
            return type(leaf)
        return leaf.shape[1:], leaf.dtype, len(leaf) == batch.size or len(leaf)

    return (str(spec), *map(told, leaves))


def _told(value: Any) -> str:
    """The shapes in it."""
    return ", ".join(str(tuple(t.shape)) for t in tree_leaves(value) if isinstance(t, Tensor)) or "without tensors"


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def moment_problems(thread: int | None) -> Iterator[str]:
    """May the model be changed now: outside autocast and inference mode, by the thread that began?"""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            yield f"`step` must be called outside torch.autocast, got {device} autocast enabled. Leave the block first."
    if torch.is_inference_mode_enabled():
        yield "`step` must be called outside torch.inference_mode, which would break the next backward. Leave it first."
    if thread not in (None, threading.get_ident()):
        yield "`step` must be called by one thread, got a second one. Call it where the optimizer steps."


def data_problems(leaves: Iterable[Any], name: str = "inputs") -> Iterator[str]:
    """Calibration data must not be empty, NaN or infinite."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        yield f"`{name}` must hold at least one tensor, got none. Pass the batch that was trained on."
    for i, tensor in enumerate(tensors):
        where = f"(tensor {i}, shape {tuple(tensor.shape)})"
        if tensor.numel() == 0:
            yield f"`{name}` must not be empty, got shape {tuple(tensor.shape)} (tensor {i}). Pass a batch of data."
        elif tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            bad = int((~tensor.isfinite()).sum())
            yield f"`{name}` must be finite, got {bad} NaN or infinite values {where}. Leave such batches out."


def budget_problems(budget: float | None) -> Iterable[str]:
    if budget is not None and not (isinstance(budget, int | float) and budget >= 0 and math.isfinite(budget)):
        yield f"`budget` must be a finite number >= 0, got {budget!r}. Give the loss increase that is allowed."


def loss_problems(loss_fn: Any) -> Iterable[str]:
    if loss_fn is not None and not callable(loss_fn):
        yield f"`loss_fn` must be callable as loss_fn(output, targets), got {type(loss_fn).__name__}. Pass a function."


def setting_problems(loss_fn: Any, total_steps: Any, policy: Any) -> Iterable[str]:
    yield from loss_problems(loss_fn)
    if total_steps is not None and not (isinstance(total_steps, int) and total_steps > 0):
        yield f"`total_steps` must be a positive integer, got {total_steps!r}. Count the optimizer steps of the run."
    if not isinstance(policy, Policy) and not (isinstance(policy, str) and policy in POLICIES):
        yield f"`policy` must be one of {', '.join(map(repr, POLICIES))} or a Policy, got {policy!r}. Choose one."
