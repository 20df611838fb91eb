"""Apply fold plans to a model, its optimizers' state, its followers and its modules' attributes, with undo."""

from apoptorch.surgery.places import narrowed, sizes_of
from apoptorch.surgery.tensors import FOLLOWING, attributes, following, layout, named_tensors
from apoptorch.surgery.transaction import Surgery, narrow_

__all__ = [
    "FOLLOWING", "Surgery", "attributes", "following", "layout", "named_tensors", "narrow_", "narrowed", "sizes_of",
]  # fmt: skip
