"""What a model does on held-out batches: losses, predictions, outputs."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .batches import Batch, LossFn
from .calibrate import calibrating
from .distributed import ALONE, Ranks
from .errors import ArgumentError


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and that of each input, predicted classes (None if there are none) and outputs, flat or in rows of one
    input each.

    `units`: the loss of each input, or of each batch where the mean loss is not the mean of theirs.
    """

    samples: int
    loss: float
    units: Float64[Tensor, " m"]
    predictions: Int64[Tensor, " N"] | None
    outputs: tuple[Tensor, ...]


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Sequence[Batch], loss_fn: LossFn | None, ranks: Ranks = ALONE
) -> Evaluation:  # fmt: skip
    """Mean loss (NaN without `loss_fn`), predicted classes and outputs on these batches, in calibration mode.

    Ranks that share out the model must all have as many batches.
    """
    losses, units, predictions, outputs, samples = [], [], [], [], [batch.size for batch in batches]
    with calibrating(model):
        for batch in batches:
            with ranks.in_step("measuring the loss"):
                output = model(*batch.args, **batch.kwargs)
                losses.append(_mean_loss(loss_fn(output, batch.targets)) if loss_fn else math.nan)
                units.append(_input_losses(loss_fn, output, batch, losses[-1]) if loss_fn else None)
                leaves = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf) and leaf.is_floating_point()]
                predictions.append(_classes(leaves[0], batch.targets) if leaves else None)
                outputs.append(_rows(leaves, batch.size))
    loss = sum(x * n for x, n in zip(losses, samples, strict=True)) / max(1, sum(samples))
    classes = [p for p in predictions if p is not None]
    known = torch.cat(classes) if classes and len(classes) == len(batches) else None
    apart = [part for part in units if part is not None]
    single = torch.cat(apart) if apart and len(apart) == len(batches) else torch.tensor(losses, dtype=torch.float64)
    return Evaluation(sum(samples), loss, single, known, tuple(outputs))


def _rows(leaves: Sequence[Tensor], size: int) -> Tensor:
    """Outputs with a row for each input, or in one row if they don't count inputs."""
    rows = size if leaves and all(leaf.ndim and len(leaf) == size for leaf in leaves) else 1
    return torch.cat([leaf.reshape(rows, -1) for leaf in leaves], 1) if leaves else torch.zeros(0, 0)


def _input_losses(loss_fn: LossFn, output: Any, batch: Batch, mean: float) -> Float64[Tensor, " n"] | None:
    """The loss of each input alone; None where they have none, or where it is not their mean that `loss_fn` gives."""
    leaves, spec = tree_flatten((output, batch.targets))
    batched = [i for i, leaf in enumerate(leaves) if torch.is_tensor(leaf)]
    if not batched or any(leaves[i].ndim == 0 or len(leaves[i]) != batch.size for i in batched):
        return None

    def of_one(*parts: Tensor) -> Tensor:
        alone = [*leaves]
        for i, part in zip(batched, parts, strict=True):
            alone[i] = part[None]
        return torch.as_tensor(loss_fn(*tree_unflatten(alone, spec)))

    tensors = [leaves[i] for i in batched]
    for way in (torch.func.vmap(of_one, randomness="different"), lambda *all_: torch.stack([*map(of_one, *all_)])):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # vmap's, on losses that it runs one by one
                found = way(*tensors).double().flatten()
        except Exception:  # whatever a loss does that knows no batch of one
            continue
        fits = len(found) == batch.size and math.isclose(float(found.mean()), mean, rel_tol=1e-3, abs_tol=1e-6)
        return found.cpu() if fits else None
    return None


def pooled(own: Evaluation, ranks: Ranks) -> Evaluation:
    """The evaluation on the batches of all ranks; `outputs` stay this rank's."""
    if ranks.alone:
        return own
    found = ranks.gather(replace(own, outputs=()))
    samples, known = sum(part.samples for part in found), [p.predictions for p in found if p.predictions is not None]
    loss = sum(part.loss * part.samples for part in found) / samples if samples else math.nan
    units, classes = torch.cat([part.units for part in found]), torch.cat(known) if len(known) == len(found) else None
    return Evaluation(samples, loss, units, classes, own.outputs)


def _mean_loss(loss: Any) -> float:
    if isinstance(loss, int | float) or (torch.is_tensor(loss) and loss.numel() == 1):
        return float(loss)
    got = f"shape {tuple(loss.shape)}" if torch.is_tensor(loss) else type(loss).__name__
    raise ArgumentError([f"`loss_fn` must return the mean loss, one number, got {got}. Use reduction='mean'."])


def _classes(output: Tensor, targets: Any) -> Tensor | None:
    """Predicted classes where the targets say that there are any: argmax for labels, sign for 0/1 targets."""
    if not torch.is_tensor(targets):
        return None
    if not targets.is_floating_point() and output.ndim == targets.ndim + 1:
        along = 1 if output.shape[:1] + output.shape[2:] == targets.shape else -1
        return output.argmax(along).flatten()
    if output.numel() == targets.numel() and bool(((targets == 0) | (targets == 1)).all()):
        threshold = 0.5 if bool(((output >= 0) & (output <= 1)).all()) else 0.0
        return (output > threshold).long().flatten()
    return None


def relative_changes(before: Evaluation, after: Evaluation, ranks: Ranks = ALONE) -> Float64[Tensor, " m"]:
    """Squared change of each input's output, relative to the mean square of the outputs before, on all ranks."""
    squares = [before.outputs, [a - b for a, b in zip(after.outputs, before.outputs, strict=True)]]
    own = [torch.cat([x.double().square().sum(1) for x in rows]).cpu() for rows in squares]
    sizes, changes = (torch.cat(column) for column in zip(*ranks.gather(own), strict=True))
    return changes / (float(sizes.mean()) or 1.0)
