"""What consumers read: seen in a forward pass by the weights that they read it with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .plan import Slot


@dataclass(frozen=True)
class Reader:
    """A group's consumer number `index`, with the weight that the forward pass uses."""

    group: str
    index: int
    slot: Slot
    width: int
    weight: Tensor


@dataclass(frozen=True)
class Reading:
    """One tensor that a consumer read, and what its layer made of it."""

    reader: Reader
    source: Tensor
    output: Tensor

    def channels(self, x: Tensor) -> Float[Tensor, "positions n"]:
        """The source (or its gradient) as samples and positions x n channels."""
        ndim = self.reader.weight.ndim
        entries = x.detach().movedim(-1 if ndim == 2 else (1 if x.ndim == ndim else 0), -1)
        slot, count = self.reader.slot, self.reader.width * self.reader.slot.inner
        if slot.positions is not None:
            entries = entries[..., torch.tensor(slot.positions, device=x.device)]
        return entries[..., :count].unflatten(-1, (-1, slot.inner)).transpose(-1, -2).flatten(0, -2)


_LAYERS = (
    F.linear, F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip


class Recorder(TorchFunctionMode):
    """Sees every op of a forward pass and keeps the inputs of those that read a known weight.

    `lost`: groups with a weight that another op used, so that what it read isn't known.
    """

    def __init__(self, readers: Mapping[int, Sequence[Reader]]):
        super().__init__()
        self.readers = readers
        self.readings: list[Reading] = []
        self.lost: set[str] = set()
        self.starts: dict[int, tuple[Tensor, Tensor]] = {}  # inputs that need no gradient, and their stand-ins that do

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = [reader for leaf in tree_leaves((args, kwargs)) for reader in self.readers.get(id(leaf), ())]
        if not known:
            return func(*args, **kwargs)
        if func not in _LAYERS:
            result = func(*args, **kwargs)
            if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
                self.lost |= {reader.group for reader in known}
            return result
        if not args:  # F.linear(input=x, ...)
            args, kwargs = (kwargs["input"],), {key: value for key, value in kwargs.items() if key != "input"}
        if not args[0].requires_grad:  # frozen layers below: let gradients start here
            _, start = self.starts.setdefault(id(args[0]), (args[0], args[0].detach().requires_grad_()))
            args = (start, *args[1:])
        output = func(*args, **kwargs)
        self.readings += [Reading(reader, args[0], output) for reader in known]
        return output
