"""Which channel groups a model has, of those that it could have.

Where the value channels of an attention layer can go one by one, they do. Where they can't (one number in the model's
code sizes queries, keys and values), whole heads are tried, and stay if the rehearsal shows that the model follows.
"""

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from .graph import Tracer, assemble, traced, with_whole_heads
from .plan import ChannelGroup, CostTerm
from .rehearsal import places_of, rehearsed
from .surgery import named_tensors
from .surgery.tensors import effective, target_of

Found = tuple[list[ChannelGroup], list[CostTerm]]


def discovered(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], protect: Sequence[str] = ()) -> Found:
    """The model's channel groups, those that can't be narrowed pinned; and what its ops cost.

    `protect`: names of modules whose outputs keep their width.

    Raises:
        ExportError: torch.export can't capture the model.
    """
    tracer = traced(model, args, kwargs)
    groups, costs = _assembled(tracer, protect)
    groups = rehearsed(model, groups, args, kwargs)
    heads = _heads(groups, _assembled(with_whole_heads(tracer, None), protect)[0])
    while heads:
        others, other_costs = _assembled(with_whole_heads(tracer, heads), protect)
        others = rehearsed(model, _settled(others, groups), args, kwargs, heads)
        kept = _heads(groups, others)
        if heads <= kept:
            known = {places_of(group) for group in others if group.prunable}
            lost = [group for group in groups if group.prunable and places_of(group) not in known]
            return (groups, costs) if lost else (others, other_costs)
        heads = heads & kept
    return groups, costs


def _assembled(tracer: Tracer, protect: Sequence[str]) -> Found:
    groups, costs = assemble(tracer)
    return [_protected(group, protect) for group in groups], costs


def _heads(plain: Sequence[ChannelGroup], found: Sequence[ChannelGroup]) -> frozenset[str]:
    """The tensors whose heads can go whole, and hold no channels that can go one by one."""
    taken = {place for group in plain if group.prunable for place in _dimensions(group)}
    free = [group for group in found if group.prunable and group.entries > 1 and not taken & _dimensions(group)]
    return frozenset(slot.tensor for group in free for slot in (*group.producers, *group.passthrough))


def _dimensions(group: ChannelGroup) -> set[tuple[str, int]]:
    return {(slot.tensor, slot.dim) for slot in group.slots}


def _settled(groups: Sequence[ChannelGroup], known: Collection[ChannelGroup]) -> list[ChannelGroup]:
    """What an earlier rehearsal found of the same groups."""
    by_places = {places_of(group): group for group in known}
    result = []
    for group in groups:
        same = by_places.get(places_of(group))
        if same is not None and group.prunable:
            group = replace(group, prunable=same.prunable, reason=same.reason, sizes=same.sizes)
        result.append(group)
    return result


def _protected(group: ChannelGroup, protect: Sequence[str]) -> ChannelGroup:
    owned = [slot.tensor for slot in (*group.makers, *group.passthrough)]
    for name in protect:
        if any(tensor.startswith(f"{name}.") for tensor in owned):
            reason = "; ".join(filter(None, (f"protected by protect=({name!r},)", group.reason)))
            return replace(group, prunable=False, reason=reason)
    return group


def positions(
    model: nn.Module, groups: Sequence[ChannelGroup], costs: Sequence[CostTerm], inputs: int
) -> dict[str, float]:
    """How often linear layers read each group in one of the inputs: its tokens, say. Convolutions count as 1, since
    neighbouring pixels are alike.
    """
    tensors, found = named_tensors(model), dict[str, float]()
    for group in groups:
        read_by = [target_of(model, tensors, consumer.weight.tensor) for consumer in group.consumers]
        linear = all(weight is not None and effective(weight).ndim == 2 for weight in read_by)
        read = [term.flops / (2 * term.parameters) for term in costs if term.in_group == group.name and term.parameters]
        found[group.name] = max(1.0, min(read) / max(1, inputs)) if linear and read else 1.0
    return found
