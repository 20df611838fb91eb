"""Where the entries of a dimension go when channels are removed. Pure: knows groups, no tensors."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Int64
from torch import Tensor

from apoptorch.plan import ChannelGroup, Fold, FoldPlan, Slot

_Key = tuple[str, int, tuple[int, int] | None]


class Cut(NamedTuple):
    """How a removal cuts one slot: channels stand at `index`; the old entries `source` stay, in that order; what was at
    p before the removed places are gone is at place[p] then."""

    index: Int64[Tensor, "n inner"]
    source: Int64[Tensor, " left"]
    place: Int64[Tensor, " size"]
    lead: Int64[Tensor, " k"]


def cut_of(slot: Slot, group: ChannelGroup, keep: Int64[Tensor, " k"], size: int) -> Cut:
    """Forward code knows sizes only: survivors stand where the first channels (of their block) stood."""
    index, lead, keep = slot.index(group.width), group.leading(len(keep)), keep.cpu()
    stays = torch.ones(size, dtype=torch.bool)
    stays[index.flatten()] = False
    stays[index[lead].flatten()] = True
    source = torch.arange(size)
    source[index[lead].flatten()] = index[keep].flatten()
    return Cut(index, source[stays], stays.cumsum(0) - 1, lead)


def effective_slot(slot: Slot) -> Slot:
    """A consumer reads the effective weight, also where its slot names the original of a parametrization."""
    name = re.sub(r"(^|\.)parametrizations\.(\w+)\.original$", r"\1\2", slot.tensor)
    return replace(slot, tensor=name)


def slots_of(group: ChannelGroup) -> list[Slot]:
    return [*group.producers, *group.passthrough, *(effective_slot(consumer.weight) for consumer in group.consumers)]


def without(groups: Sequence[ChannelGroup], group: ChannelGroup, keep: Int64[Tensor, " k"]) -> list[ChannelGroup]:
    """All groups once `group` has only the channels `keep`: slots that share a dimension with it move, and whose blocks
    are its experts have fewer of them."""
    sizes: dict[_Key, int] = {_key(slot): 0 for slot in slots_of(group)}
    for owner in groups:
        for slot in slots_of(owner):
            if _key(slot) in sizes:
                sizes[_key(slot)] = max(sizes[_key(slot)], int(slot.index(owner.width).max()) + 1)
    places = {_key(slot): cut_of(slot, group, keep, sizes[_key(slot)]).place for slot in slots_of(group)}

    def move(slot: Slot, owner: ChannelGroup) -> Slot:
        place = places.get(_key(effective_slot(slot)))
        kept = owner.leading(len(keep) if owner is group else owner.width)
        return slot if place is None else slot.moved(place, owner.width, kept)

    experts = {(slot.tensor, slot.dim) for slot in group.slots if group.gate is not None}
    others = (owner.with_experts(len(keep)) if experts & _blocks(owner) else owner for owner in groups)
    return [
        replace(
            owner,
            width=len(keep) if owner is group else owner.width,
            producers=tuple(move(slot, owner) for slot in owner.producers),
            passthrough=tuple(move(slot, owner) for slot in owner.passthrough),
            consumers=tuple(replace(c, weight=move(c.weight, owner)) for c in owner.consumers),
        )
        for owner in others
    ]


def _blocks(group: ChannelGroup) -> set[tuple[str, int]]:
    """The dimensions of tensors that count the experts which its blocks are."""
    return {(slot.tensor, slot.split[0]) for slot in group.slots if slot.split and group.experts > 1}


def narrowed(groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> list[ChannelGroup]:
    """The groups at these widths: first those of whole experts, of which others have blocks."""
    now = list(groups)
    experts = {group.name for group in groups if group.gate is not None}
    for name, width in sorted(widths.items(), key=lambda item: item[0] not in experts):
        group = next(group for group in now if group.name == name)
        if width != group.width:
            now = without(now, group, group.leading(width))
    return now


def sizes_of(groups: Sequence[ChannelGroup], widths: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """What the attributes of modules that follow a group's width must be, by module and name."""
    found: dict[str, dict[str, int]] = {}
    for group in groups:
        for size in group.sizes:
            found.setdefault(size.module, {})[size.name] = size.value(widths[group.name])
    return found


def _key(slot: Slot) -> _Key:
    return slot.tensor, slot.dim, slot.split


def cuts(group: ChannelGroup, plan: FoldPlan) -> list[tuple[Slot, str | None, Fold | None]]:
    """Every slot of the group; a consumer's, by entry, with its bias and fold; all others are selected."""
    consumers = group.by_entry().consumers if plan.folds else ()
    folded = [(effective_slot(c.weight), c.bias, f) for c, f in zip(consumers, plan.folds, strict=True)]
    dropped = () if plan.folds else (effective_slot(c.weight) for c in group.consumers)
    return [*folded, *((slot, None, None) for slot in (*dropped, *group.producers, *group.passthrough))]
