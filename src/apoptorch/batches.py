"""Batches of training data, as models are called with them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Batch:
    """Arguments of one call of the model, and the targets that go with them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any = None

    @cached_property
    def size(self) -> int:
        """Number of inputs: the first dimension of the first tensor."""
        return next(
            (len(leaf) for leaf in tree_leaves((self.args, self.kwargs)) if torch.is_tensor(leaf) and leaf.ndim), 0
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> "Batch":
        """The same batch with `function` applied to every tensor."""
        tensors = tree_map(
            lambda leaf: function(leaf) if torch.is_tensor(leaf) else leaf, (self.args, self.kwargs, self.targets)
        )
        return Batch(*tensors)


def merged(batches: Sequence[Batch], size: int = 256) -> list[Batch]:
    """The same inputs in fewer batches of at least `size`, where all tensors are batched and alike in shape."""
    result: list[Batch] = []
    for batch in batches:
        if result and result[-1].size < size and (both := joined(result[-1], batch)) is not None:
            result[-1] = both
        else:
            result.append(batch)
    return result


def joined(a: Batch, b: Batch) -> Batch | None:
    """The inputs of both as one batch; None where a tensor isn't batched, or differs in the shape of an input."""
    one, spec = tree_flatten((a.args, a.kwargs, a.targets))
    other, same = tree_flatten((b.args, b.kwargs, b.targets))
    for x, y in zip(one, other, strict=False):
        alike = torch.is_tensor(x) and torch.is_tensor(y) and x.ndim and x.shape[1:] == y.shape[1:]
        if not alike or len(x) != a.size or len(y) != b.size:
            return None
    if spec != same:
        return None
    return Batch(*tree_unflatten([torch.cat(pair) for pair in zip(one, other, strict=True)], spec))


def split(batch: Batch) -> tuple[Batch, Batch]:
    """Three quarters to plan on and a quarter to judge on; the same batch twice if it can't be divided."""
    size = batch.size
    leaves = [leaf for leaf in tree_leaves((batch.args, batch.kwargs, batch.targets)) if isinstance(leaf, Tensor)]
    if size < 8 or any(leaf.ndim == 0 or len(leaf) != size for leaf in leaves):
        return batch, batch
    cut = size - max(1, size // 4)
    return batch.map(lambda tensor: tensor[:cut]), batch.map(lambda tensor: tensor[cut:])
