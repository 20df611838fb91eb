"""Adaptive neuron apoptosis: redundant neurons are found, folded into the others and removed while a network trains."""

from .apoptosis import Apoptosis
from .checkpoint import load, save
from .errors import ApoptosisError, ArgumentError, CheckpointError, ExportError, SurgeryError
from .plan import Event
from .policy import Policy
from .shrink import shrink

__all__ = [
    "Apoptosis",
    "ApoptosisError",
    "ArgumentError",
    "CheckpointError",
    "Event",
    "ExportError",
    "Policy",
    "SurgeryError",
    "load",
    "save",
    "shrink",
]
