"""Which channels are redundant, and what replaces them: from activations (`moments`) or from weights. Pure."""

from .moments import Selection, fold, select, unexplained
from .weights import WeightFold, WeightSearch, fold_from_weights, search_weights

__all__ = [
    "Selection",
    "WeightFold",
    "WeightSearch",
    "fold",
    "fold_from_weights",
    "search_weights",
    "select",
    "unexplained",
]
