"""What every loader returns."""

from typing import NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Training and test data: features [n, ...], targets [n, 1] float32 (two classes) or [n, ...] int64.

    Features are standardised float32, or int64 characters. Large sets lie in a file that is read as it is indexed.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def validation(data: Split, share: float = 0.1) -> Split:
    """The training data alone, `share` of it (chosen with seed 0) held out in the place of the test data."""
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))
    held_out, rest = order.split([round(share * len(order)), len(order) - round(share * len(order))])
    return Split(data.train_x[rest], data.train_y[rest], data.train_x[held_out], data.train_y[held_out])
