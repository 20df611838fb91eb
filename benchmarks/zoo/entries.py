"""What a zoo model is: how to build it, and inputs for it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[tuple[Tensor, ...], dict[str, Tensor]]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        source: the package that it comes from, or "hand-written".
        build: makes it, with random weights.
        inputs: positional and keyword arguments for a batch of that size.
        note: how it differs from the original, where it does.
    """

    source: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Inputs]
    note: str = ""


def images(size: int, channels: int = 3) -> Callable[[int], Inputs]:
    """Square images of `size` pixels."""
    return lambda batch: ((torch.randn(batch, channels, size, size),), {})


def named(**makers: Callable[[int], Tensor]) -> Callable[[int], Inputs]:
    """Keyword arguments, each made for a batch size."""
    return lambda batch: ((), {name: make(batch) for name, make in makers.items()})


def numbers(*shape: int) -> Callable[[int], Tensor]:
    return lambda batch: torch.randn(batch, *shape)


def ids(length: int, vocabulary: int) -> Callable[[int], Tensor]:
    """Token ids; 0 to 3 are left to special tokens."""
    return lambda batch: torch.randint(4, vocabulary, (batch, length))


def in_precision(inputs: Any, dtype: torch.dtype) -> Any:
    """The same inputs with floating-point tensors in `dtype`."""
    return torch.utils._pytree.tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )
