"""Model -> channel groups: torch.export captures, `tracer` walks, `rules` knows the ops."""

from collections.abc import Collection
from typing import Any

from torch import nn

from ..plan import ChannelGroup, CostTerm
from . import rules as rules  # registers the rules
from .capture import capture, preserved, rehearsing
from .chain import Link, chain
from .groups import assemble
from .heads import with_whole_heads
from .nodes import attribute
from .tracer import Tracer

__all__ = [
    "Link",
    "Tracer",
    "assemble",
    "attribute",
    "preserved",
    "rehearsing",
    "trace",
    "trace_chain",
    "traced",
    "with_whole_heads",
]


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[ChannelGroup], list[CostTerm]]:
    """The model's channel groups, in its own order, and its forward FLOPs for these inputs as cost terms.

    Raises:
        ExportError: torch.export can't capture the model.
    """
    return assemble(traced(model, args, kwargs))


def traced(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], heads: Collection[str] = ()) -> Tracer:
    """The tracer that has walked the model's graph; of the tensors `heads`, whole heads are channels.

    Raises:
        ExportError: torch.export can't capture the model.
    """
    tracer = Tracer(model, capture(model, args, kwargs)).run()
    return with_whole_heads(tracer, heads) if heads else tracer


def trace_chain(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Link] | str:
    """The ops of the model in eval mode from its input to its output; in words why, if they are no chain.

    Raises:
        ExportError: torch.export can't capture the model in eval mode.
    """
    tracer = Tracer(model, capture(model, args, kwargs, modes=(False,)))
    tracer.run()
    return chain(tracer)
