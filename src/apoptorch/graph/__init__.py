"""Model -> channel groups: torch.export captures, `tracer` walks, `rules` knows the ops."""

from typing import Any

from torch import nn

from ..plan import ChannelGroup, CostTerm
from . import rules as rules  # registers the rules
from .capture import capture, preserved
from .tracer import Tracer

__all__ = ["preserved", "trace"]


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[ChannelGroup], list[CostTerm]]:
    """The model's channel groups, in its own order, and its forward FLOPs for these inputs as cost terms.

    Raises:
        ExportError: torch.export can't capture the model.
    """
    return Tracer(model, capture(model, args, kwargs)).run()
