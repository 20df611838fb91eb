"""Model -> channel groups: torch.export captures, `tracer` walks, `rules` knows the ops."""

from typing import Any

from torch import nn

from ..plan import ChannelGroup, CostTerm
from . import rules as rules  # registers the rules
from .capture import capture, preserved
from .chain import Link, chain
from .groups import assemble
from .tracer import Tracer, attribute

__all__ = ["Link", "assemble", "attribute", "preserved", "trace", "trace_chain", "traced"]


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[ChannelGroup], list[CostTerm]]:
    """The model's channel groups, in its own order, and its forward FLOPs for these inputs as cost terms.

    Raises:
        ExportError: torch.export can't capture the model.
    """
    return assemble(traced(model, args, kwargs))


def traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tracer:
    """The tracer that has walked the model's graph.

    Raises:
        ExportError: torch.export can't capture the model.
    """
    return Tracer(model, capture(model, args, kwargs)).run()


def trace_chain(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Link] | str:
    """The ops of the model in eval mode from its input to its output; in words why, if they are no chain.

    Raises:
        ExportError: torch.export can't capture the model in eval mode.
    """
    tracer = Tracer(model, capture(model, args, kwargs, modes=(False,)))
    tracer.run()
    return chain(tracer)
