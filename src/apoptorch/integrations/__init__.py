"""Apoptosis inside the trainers that people use: `lightning`, `transformers`, `accelerate`, each a file of its own."""

from .narrowing import narrow_on_load

__all__ = ["narrow_on_load"]
