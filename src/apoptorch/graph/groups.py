"""What a tracer found -> channel groups: channels with the same owners form one."""

import math
from collections import Counter
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor

from ..plan import ChannelGroup, Consumer, CostTerm, Slot
from .experts import by_expert, whole
from .nodes import attribute
from .tracer import Record, Tracer

Array = Int64[Tensor, "..."]


class _Assembly:
    """n_c channels; `channel_of` a label; `group_of` a channel."""

    def __init__(self, tracer: Tracer):
        self.tracer = tracer
        total = len(tracer.channels.parent)
        roots = tracer.channels.find(torch.arange(total))
        _, self.channel_of = torch.unique(roots, return_inverse=True)
        self.count = int(self.channel_of.max()) + 1 if total else 0
        self.channels = {key: self.of(record.labels) for key, record in tracer.records.items()}
        self.group_of = self._groups()
        self.size = torch.bincount(self.group_of, minlength=1)

    def of(self, labels: Array) -> Array:
        """Channels of labels, -1 where there is none."""
        if not len(self.channel_of):
            return labels
        return torch.where(labels >= 0, self.channel_of[labels.clamp(min=0)], -1)

    def _groups(self) -> Array:
        """Channels that the same slots hold, equally often, are interchangeable. Numbered as they first appear."""
        generator = torch.Generator().manual_seed(0)
        signature = torch.zeros(self.count, dtype=torch.int64)
        for channels in self.channels.values():
            code = torch.randint(2**62, (), generator=generator)
            held = channels[channels >= 0]
            signature.scatter_add_(0, held, code.expand(len(held)))
        return _numbered(signature)

    def present(self, labels: Array) -> list[int]:
        channels = self.of(labels.flatten())
        return torch.unique(self.group_of[channels[channels >= 0]]).tolist()


def _numbered(values: Array) -> Array:
    """0, 1, 2, ... for equal values, in the order of their first place."""
    _, inverse = torch.unique(values, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1 if len(inverse) else 0,), len(values))
    first.scatter_reduce_(0, inverse, torch.arange(len(values)), "amin")
    return first.argsort().argsort()[inverse]


def assemble(tracer: Tracer) -> tuple[list[ChannelGroup], list[CostTerm]]:
    """The channel groups in the model's order, and the forward cost of each op that has one."""
    parts = _Assembly(tracer)
    count = len(parts.size) if parts.count else 0
    reasons: list[dict[str, None]] = [{} for _ in range(count)]
    blocks, order = _blocks(parts, reasons)
    slots: list[dict[str, list]] = [{"producer": [], "passthrough": [], "consumer": []} for _ in range(count)]
    holds: list[list[Record]] = [[] for _ in range(count)]
    busy = {record.tensor for record in tracer.records.values() if record.role == "passthrough"}
    for key, record in tracer.records.items():
        for index, slot in _slots(record, parts.channels[key], parts, order):
            holds[index].append(record)
            item = Consumer(slot, _bias(tracer, record, busy)) if record.role == "consumer" else slot
            slots[index][record.role].append(item)
    _collect_reasons(parts, reasons, holds)
    general = {index for labels in tracer.general for index in parts.present(labels)}
    heads = {index for labels in tracer.whole for index in parts.present(labels)}
    multiples = [1] * count
    for labels, multiple in tracer.multiples:
        for index in parts.present(labels):
            multiples[index] = math.lcm(multiples[index], multiple)
    lines: list[set[str]] = [set() for _ in range(count)]
    for labels, code in tracer.passes.values():
        for index in parts.present(labels):
            lines[index] |= code
    gates: list[list[tuple[str, int | None]]] = [[] for _ in range(count)]
    for labels, reason, chosen in tracer.gates:
        for index in parts.present(labels):
            gates[index].append((reason, chosen))
    pairs: list[list[tuple[set[str], set[str]]]] = [[] for _ in range(count)]
    for labels, one, other in tracer.pairs:
        for index in parts.present(labels):
            pairs[index].append((one, other))
    weights: list[set[str]] = [set() for _ in range(count)]
    for labels, weight in tracer.makers:
        for index in parts.present(labels):
            weights[index].add(weight)
    names = _names(parts, holds, heads)
    made: dict[int, ChannelGroup] = {}
    for index in range(count):
        own, width = slots[index], int(parts.size[index])
        if pairs[index]:
            _pair(own, pairs[index], reasons[index])
        if not own["producer"] and not own["consumer"]:
            continue  # per-channel parameters of what is no channel
        if not own["producer"]:
            own["producer"], own["passthrough"] = own["passthrough"][:1], own["passthrough"][1:]
        gate = None
        if gates[index] and not reasons[index] and blocks[index] == 1 and index not in general:
            gate = whole(tracer, own, [chosen for _, chosen in gates[index]], width)
        if gate is None:
            reasons[index] |= dict.fromkeys(reason for reason, _ in gates[index])
        if not own["consumer"]:
            reasons[index]["no layer reads its channels"] = None
        neuron = "general" if index in general else _neuron(holds[index], own["producer"], weights[index])
        neuron = neuron if gate is None else "experts"
        entries = _entries(own["consumer"], width, blocks[index], reasons[index]) if index in heads else 1
        made[index] = ChannelGroup(
            names[index], width, width, neuron, tuple(own["producer"]), tuple(own["passthrough"]),
            tuple(own["consumer"]), any(r.max_pooled for r in holds[index] if r.role == "consumer"),
            not reasons[index], _told(list(reasons[index])), blocks[index], entries,
            multiple=multiples[index], gate=gate, lines=tuple(sorted(lines[index] - {""})),
        )  # fmt: skip
    divided = by_expert(tracer, _named_experts(made), parts.present)
    return list(divided.values()), _costs(parts, divided)


def _named_experts(groups: dict[int, ChannelGroup]) -> dict[int, ChannelGroup]:
    """Those of whole experts bear the name of the module that holds them and their router."""
    names = [
        group.name if group.gate is None else _common([slot.tensor for slot in group.makers], "experts")
        for group in groups.values()
    ]
    return {index: replace(groups[index], name=name) for index, name in zip(groups, _distinct(names), strict=True)}


def _pair(own: dict[str, list], pairs: list[tuple[set[str], set[str]]], reasons: dict[str, None]) -> None:
    """What makes the second channels of each pair reads the first ones, where nothing else makes or reads either."""
    (one, other), makers = pairs[0], own["producer"]
    alone = len(pairs) == 1 and not own["consumer"] and not own["passthrough"] and not one & other
    if not alone or {slot.tensor for slot in makers} != one | other:
        reasons["they are multiplied in pairs, and one of a pair is made or read by others too"] = None
        return
    own["producer"] = [slot for slot in makers if slot.tensor in one]
    own["consumer"] = [Consumer(slot, paired=True) for slot in makers if slot.tensor in other]


def _entries(consumers: list[Consumer], width: int, blocks: int, reasons: dict[str, None]) -> int:
    """How many numbers of one head its consumers read; 1 if it can't go."""
    found = {consumer.weight.inner for consumer in consumers}
    if width == 1:
        reasons["it is a single head"] = None
    if blocks > 1:
        reasons["its heads lie in several parts, each of which needs as many"] = None
    if len(found) > 1:
        reasons["its heads are read in several sizes"] = None
    return found.pop() if len(found) == 1 and not reasons else 1


def _told(reasons: list[str], most: int = 4) -> str | None:
    rest = f" (and {len(reasons) - most} more reasons)" if len(reasons) > most else ""
    return "; ".join(reasons[:most]) + rest or None


def _blocks(parts: _Assembly, reasons: list[dict[str, None]]) -> tuple[list[int], Array]:
    """Number of blocks of every group, and each channel's place in its group: block by block."""
    generator = torch.Generator().manual_seed(1)
    block = torch.zeros(parts.count, dtype=torch.int64)
    for labels, where in parts.tracer.rows:
        channels = parts.of(labels)
        if labels.shape[1] > 1 and bool((channels == channels[:, :1]).all()):
            continue  # every row is one channel: they go row by row
        groups = torch.where(channels >= 0, parts.group_of[channels.clamp(min=0)], -1).sort(1).values
        if not bool((groups == groups[:1]).all()):
            for index in parts.present(labels):
                reasons[index][f"{where} needs as many of other channels too"] = None
            continue
        codes = torch.randint(2**62, (len(channels), 1), generator=generator).expand_as(channels)
        block.scatter_add_(0, channels[channels >= 0], codes[channels >= 0])
    places, counts = torch.zeros_like(block), []
    by_group = parts.group_of.argsort(stable=True).split(parts.size.tolist()) if parts.count else ()
    for index, members in enumerate(by_group):
        numbers = _numbered(block[members])
        sizes = torch.bincount(numbers)
        if len(torch.unique(sizes)) > 1:
            reasons[index]["its channels are split into unequal parts"] = None
            numbers, sizes = torch.zeros_like(numbers), sizes.sum()[None]
        counts.append(len(sizes))
        places[members[numbers.argsort(stable=True)]] = torch.arange(len(members))
        if len(sizes) > 1 and int(sizes[0]) == 1:
            reasons[index]["each of its channels is a part of its own"] = None
    return counts, places


def _slots(record: Record, channels: Array, parts: _Assembly, order: Array) -> list[tuple[int, Slot]]:
    """Where each group's channels lie in a record."""
    places = (channels >= 0).nonzero()[:, 0]
    held = channels[places]
    groups = parts.group_of[held]
    sorted_by = (groups * parts.count + order[held]).argsort(stable=True)
    places = places[sorted_by]
    found, result = torch.unique_consecutive(groups[sorted_by], return_counts=True), []
    for index, positions in zip(found[0].tolist(), places.split(found[1].tolist()), strict=True):
        inner = len(positions) // int(parts.size[index])
        plain = torch.equal(positions, torch.arange(len(positions)))
        given = None if plain else tuple(positions.tolist())
        result.append((index, Slot(record.tensor, record.dim, inner, given, record.split)))
    return result


def _bias(tracer: Tracer, record: Record, busy: set[str]) -> str | None:
    """A bias that serves several layers, or elsewhere, can't take the constant part of one layer's fold."""
    return None if record.bias in busy or len(tracer.uses.get(record.bias, ())) > 1 else record.bias


def _collect_reasons(parts: _Assembly, reasons: list[dict[str, None]], holds: list[list[Record]]) -> None:
    """Pins of the rules, and parameters that are used elsewhere."""
    tracer = parts.tracer
    sizes = dict(tracer.model.named_parameters()) | dict(tracer.model.named_buffers())
    for labels, reason in tracer.pins:
        for index in parts.present(labels):
            reasons[index].setdefault(reason)
    for found, records in zip(reasons, holds, strict=True):
        for record in records:
            for name in filter(None, (record.tensor, record.bias)):
                if attribute(name) in tracer.used_by:
                    found[f"{attribute(name)} is also used by {tracer.used_by[attribute(name)]}"] = None
            if record.role == "consumer" and record.tensor in tracer.also_reads:
                where = tracer.also_reads[record.tensor]
                found[f"{record.tensor} also reads other inputs, by {where} (a shared module)"] = None
            tensor = sizes.get(record.tensor)
            if record.role != "consumer" and tensor is not None and not tensor.is_floating_point():
                found[f"{record.tensor} holds {tensor.dtype}, not floating-point numbers"] = None


def _neuron(records: list[Record], producers: list[Slot], weights: set[str]) -> str:
    """The neuron type, where one weight makes the channels, one row each."""
    neurons = {neuron for record in records if record.role == "consumer" for neuron in record.neurons}
    plain = len(weights) == 1 and all(slot.inner == 1 for slot in producers)
    return (
        next(iter(neurons)) if plain and len(neurons) == 1 and "parametrizations" not in "".join(weights) else "general"
    )


def _names(parts: _Assembly, holds: list[list[Record]], heads: set[int]) -> list[str]:
    """The module that makes a group's channels, or the tensor where that is not unique; that which has heads."""
    names, tensors = [""] * len(holds), [""] * len(holds)
    for label, name in parts.tracer.names.items():
        index = int(parts.group_of[parts.channel_of[label]])
        names[index] = names[index] or name
    for index in heads:
        names[index] = _common([r.tensor for r in holds[index] if r.role == "producer"])
    for index, records in enumerate(holds):
        makers = (
            [r for r in records if r.role == "producer"] or [r for r in records if r.role == "passthrough"] or records
        )
        tensors[index] = attribute(makers[0].tensor)
    taken = Counter([*names, ""])
    return _distinct([n if taken[n] == 1 else t for n, t in zip(names, tensors, strict=True)])


def _common(tensors: list[str], what: str = "heads") -> str:
    """The heads (or `what`) of the innermost module that holds these tensors."""
    paths = [tensor.split(".")[:-1] for tensor in tensors]
    same = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
    return ".".join([*same, what]) if tensors else ""


def _distinct(names: list[str]) -> list[str]:
    """Several groups of one tensor are told apart by their number."""
    seen: dict[str, int] = {}
    result, times = [], Counter(names)
    for name in names:
        number = seen[name] = seen.get(name, -1) + 1
        result.append(f"{name}[{number}]" if times[name] > 1 else name)
    return result


def _costs(parts: _Assembly, groups: dict[int, ChannelGroup]) -> list[CostTerm]:
    totals: dict[tuple[int | None, int | None, bool], list[float]] = {}
    names: dict[int | None, str] = {index: group.name for index, group in groups.items()}
    widths: dict[int | None, int] = {index: group.width for index, group in groups.items()}
    for cost in parts.tracer.costs:
        out_side, in_side = (_shares(parts, side, groups) for side in cost.sides)
        for a, share in out_side.items():
            for b, other in in_side.items():
                scale = share * other / widths.get(a, 1) / widths.get(b, 1)
                old = totals.setdefault((a, b, cost.routed), [0.0, 0.0])
                old[0] += cost.flops * scale
                old[1] += cost.parameters * scale
    return [CostTerm(f, names.get(a), names.get(b), p, routed) for (a, b, routed), (f, p) in totals.items()]


def _shares(parts: _Assembly, labels: Array | None, groups: dict[int, ChannelGroup]) -> dict[int | None, float]:
    """Which share of the entries each group has; None for those that are no group's."""
    if labels is None or not labels.numel():
        return {None: 1.0}
    channels = parts.of(labels.flatten())
    owners = torch.where(channels >= 0, parts.group_of[channels.clamp(min=0)], -1)
    found, counts = torch.unique(owners, return_counts=True)
    shares: dict[int | None, float] = {}
    for index, number in zip(found.tolist(), counts.tolist(), strict=True):
        key = index if index in groups else None
        shares[key] = shares.get(key, 0.0) + number / len(owners)
    return shares
