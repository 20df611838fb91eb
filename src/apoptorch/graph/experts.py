"""Experts whose weights lie in one parameter: each one's hidden units go on their own.

The rules give hidden unit i of all experts one label. The units of one expert can be permuted and folded without those
of the others wherever the same expert makes and reads what is read: in a loop over `weights[e]`, in a product over all
experts at once, in a product of sorted rows with the same ends. That is shown here op by op, from what reads the units
back to what made them; where it can't be, unit i of all experts stays one channel.
"""

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from ..plan import ChannelGroup, Consumer, Slot
from .labels import Array, segments
from .nodes import argument, arguments, nodes_of, op_name, shape, stack_of
from .rules.attention import TRANSPOSES, changed, transposed
from .rules.elementwise import CONSTANT_OPS, IDENTITY, JOINS, POINTWISE
from .rules.shapes import RESHAPES
from .tracer import Choice, Tracer

WIDEST = 4096  # hidden units of all experts, as the memory of their moments grows with the square
_ELEMENTWISE = {*POINTWISE, *IDENTITY, *CONSTANT_OPS, *JOINS} - {"prelu"}
_DIVIDES = {"chunk": 2, "split": 2, "split_with_sizes": 2, "tensor_split": 2, "slice": 1, "narrow": 1, "glu": 1}
Present = Callable[[Array], list[int]]


def by_expert(tracer: Tracer, groups: dict[int, ChannelGroup], present: Present) -> dict[int, ChannelGroup]:
    """The same groups; those have a block for each expert whose channels can go by expert."""
    if not tracer.products:
        return groups
    narrow = [group for group in groups.values() if group.prunable and group.gate is None]
    taken = {(slot.tensor, slot.dim) for group in narrow for slot in group.slots}
    found = {}
    for index, group in groups.items():
        dims = _Experts(tracer, group, lambda labels, own=index: own in present(labels)).dims()
        free = dims is not None and not taken & set(dims.items())
        found[index] = _divided(tracer, group, dims) if dims and free else group
    return found


def _divided(tracer: Tracer, group: ChannelGroup, dims: dict[str, int]) -> ChannelGroup:
    """The group with a block for each entry of these dimensions."""
    sizes = {name: shape(node) for node, name in tracer.tensors.items() if name in dims}
    counts = {sizes[name][dim] for name, dim in dims.items()}
    blocks = counts.pop()
    if counts or blocks == 1 or blocks * group.width > WIDEST:
        return group

    def divided(slot: Slot) -> Slot:
        size = sizes[slot.tensor][slot.dim]
        positions = slot.index(group.width).flatten() + torch.arange(blocks)[:, None] * size
        plain = torch.equal(positions.flatten(), torch.arange(positions.numel()))
        given = None if plain else tuple(positions.flatten().tolist())
        return replace(slot, positions=given, split=(dims[slot.tensor], blocks))

    return replace(
        group, width=blocks * group.width, full_width=blocks * group.full_width, blocks=blocks,
        producers=tuple(divided(slot) for slot in group.producers),
        consumers=tuple(replace(each, weight=divided(each.weight)) for each in group.consumers),
    )  # fmt: skip


def whole(tracer: Tracer, own: dict[str, list], chosen: Sequence[int | None], width: int) -> int | None:
    """How many experts each token takes (0: all), if these channels are whole experts: one linear layer makes nothing
    but what a softmax turns into their weights, and all else that has one entry for each is what they consist of. Its
    products are then what reads them, as the makers of the second ones of pairs are. None if they are no experts."""
    stacks = {name for product in tracer.products.values() for name in product.tensors}
    layers = set().union(*tracer.uses.values()) - stacks
    routers = [slot for slot in own["producer"] if slot.tensor in layers]
    biases = {bias for bias, weights in tracer.uses.items() if weights & {slot.tensor for slot in routers}}
    rest = [slot for slot in own["producer"] if slot.tensor not in layers | biases]
    vectors = {name for node, name in tracer.tensors.items() if len(shape(node)) < 2}  # might shift the router's output
    stacked = rest and all(slot.tensor in stacks for slot in rest) and len(routers) == 1 and not own["consumer"]
    stacked = stacked and all(slot.inner == 1 and slot.tensor not in vectors for slot in (*rest, *own["passthrough"]))
    numbers = [number for number in chosen if number is not None]
    if not stacked or len(numbers) < len(chosen) or max(numbers) > width:
        return None
    own["consumer"] = [Consumer(slot, paired=True) for slot in rest]
    own["producer"] = [*routers, *(slot for slot in own["producer"] if slot.tensor in biases)]
    return max(numbers)


class _Experts:
    """One group, of which `holds` tells what holds its channels."""

    def __init__(self, tracer: Tracer, group: ChannelGroup, holds: Callable[[Array], bool]):
        self.tracer, self.group, self.holds = tracer, group, holds
        self.made: dict[str, int] = {}
        self.seen: dict[tuple[Node, Choice], bool] = {}

    def dims(self) -> dict[str, int] | None:
        """The dimension of each of the group's tensors that counts experts; None if the units don't go by expert."""
        group = self.group
        plain = group.prunable and group.blocks == group.entries == 1 and not group.passthrough and not group.paired
        if not plain or any(consumer.bias for consumer in group.consumers):
            return None
        self.made = {slot.tensor: self.counting(slot, made=True) for slot in group.producers}
        read = {each.weight.tensor: self.counting(each.weight, made=False) for each in group.consumers}
        dims = {**self.made, **read}
        if min(dims.values()) < 0 or any(slot.split for slot in group.slots) or len(dims) < len(group.slots):
            return None
        return dims if all(self.reads_what_it_made(name, dim) for name, dim in read.items()) else None

    def counting(self, slot: Slot, *, made: bool) -> int:
        """The dimension of a tensor by which all that use it choose experts; -1 if there is none."""
        found: set[int] | None = None
        for user in _users(self.tracer, slot.tensor):
            product = self.tracer.products.get(user)
            if product is None or slot.tensor not in product.tensors:
                return -1
            dims = {d for d, (read_by, made_by) in product.experts.items() if (made_by if made else read_by)}
            found = dims if found is None else found & dims
        return min((found or set()) - {slot.dim}, default=-1)

    def reads_what_it_made(self, name: str, dim: int) -> bool:
        products = [self.tracer.products[user] for user in _users(self.tracer, name)]
        choices = [(product.source, choice) for product in products if (choice := product.experts[dim][0])]
        if not all(self.same(source, choice) for source, choice in choices):
            return False
        choosing = [by for _, (by, _) in choices if isinstance(by, Node)]
        passed = [node for node, _ in self.seen]
        return not any(changed(node, passed) for node in passed) and not any(changed(by, []) for by in choosing)

    def same(self, node: Node, choice: Choice) -> bool:
        """Was what a node holds of the group made by the experts of `choice`, which read it?"""
        if (node, choice) not in self.seen:
            self.seen[node, choice] = not self.holds_any(node) or self.made_by(node, choice)
        return self.seen[node, choice]

    def made_by(self, node: Node, choice: Choice) -> bool:
        product = self.tracer.products.get(node)
        name = next((name for name in product.tensors if name in self.made), None) if product else None
        if product and name:
            return product.experts[self.made[name]][1] == choice and not self.holds_any(product.source)
        inputs = _inputs(node, choice[1])
        return inputs is not None and all(self.same(each, (choice[0], dim)) for each, dim in inputs)

    def holds_any(self, node: Node) -> bool:
        return any(self.holds(each.labels) for each in self.tracer.known(node))


def _users(tracer: Tracer, name: str) -> Iterator[Node]:
    """The ops that use a parameter, other than to transpose it or to take one of its parts."""
    pending = [node for node, own in tracer.tensors.items() if own == name]
    while pending:
        for user in pending.pop().users:
            if op_name(user) in (*TRANSPOSES, "unbind") or stack_of(user) is not None:
                pending.append(user)
            else:
                yield user


def _inputs(node: Node, dim: int | None) -> list[tuple[Node, int | None]] | None:
    """What an op reads, and the dimension there of what lies along `dim` of its output (None: along none); None if
    the op might mix or move what lies there."""
    if dim is None:
        return [(each, None) for each in node.all_input_nodes]
    name = op_name(node)
    if name in _ELEMENTWISE:
        return [(each, dim - len(shape(node)) + len(shape(each))) for each in nodes_of(node)]
    x = arguments(node)[0]
    old, new = shape(x), shape(node)
    if node.target is operator.getitem:
        return [(x, dim)]
    if name in _DIVIDES:
        divided = argument(node, _DIVIDES[name], "dim", -1 if name == "glu" else 0) % len(old)
        return None if divided == dim else [(x, dim)]
    if name in (*RESHAPES, "unsqueeze", "squeeze") and 0 not in old:
        found = [before for before, after in segments(old, new) if dim in after and len(before) == len(after) == 1]
        return [(x, before[0]) for before in found] or None
    if name in TRANSPOSES:
        return [(x, transposed(node)[dim])]
    return None
