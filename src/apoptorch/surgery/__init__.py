"""Apply fold plans to a model, its optimizers' state, its followers and its modules' attributes, with undo."""

from apoptorch.surgery.places import narrowed, sizes_of
from apoptorch.surgery.tensors import attributes, layout, named_tensors
from apoptorch.surgery.transaction import Surgery, narrow_

__all__ = ["Surgery", "attributes", "layout", "named_tensors", "narrow_", "narrowed", "sizes_of"]
