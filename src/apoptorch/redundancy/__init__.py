"""Which channels are redundant, and what replaces them: from activations (`moments`) or from weights. Pure."""

from .blocks import MOST_USED, directions_blocks, fold_blocks, overfit, select_blocks
from .moments import (
    Selection,
    directions,
    first_order,
    first_order_curve,
    fold,
    others,
    select,
    select_whole,
    unexplained,
)
from .weights import WeightFold, WeightSearch, fold_from_weights, search_weights

__all__ = [
    "MOST_USED",
    "Selection",
    "WeightFold",
    "WeightSearch",
    "directions",
    "directions_blocks",
    "first_order",
    "first_order_curve",
    "fold",
    "fold_blocks",
    "fold_from_weights",
    "others",
    "overfit",
    "search_weights",
    "select",
    "select_blocks",
    "select_whole",
    "unexplained",
]
