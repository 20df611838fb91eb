"""One rule per family of ATen ops. A rule never guesses: what it doesn't know, it pins."""

from . import attention, elementwise, layers, norms, pooling, recurrent, routing, shapes  # registers the rules
from .elementwise import CONSTANT_OPS, POINTWISE, neuron_name

__all__ = [
    "CONSTANT_OPS",
    "POINTWISE",
    "attention",
    "elementwise",
    "layers",
    "neuron_name",
    "norms",
    "pooling",
    "recurrent",
    "routing",
    "shapes",
]
