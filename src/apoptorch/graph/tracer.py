"""Follows channels through an ATen graph: which parameter rows make them, which columns read them."""

import math
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind
from torch.fx import Node

from ..plan import ChannelGroup, Consumer, CostTerm, Slot

Rule = Callable[["Tracer", Node], None]
RULES: dict[str, Rule] = {}
VIEWS = (
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t", "alias", "detach",
)  # fmt: skip


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers one function for ATen ops by name, without overload and trailing underscore ("relu")."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass(frozen=True)
class Axis:
    """One tensor dimension that holds a group's channels, `inner` consecutive entries each.

    `neuron` is the non-linearity met since the producer ("linear" before any, "general" after two). `padded`: zeros
    stand beside the channels at the border, so that a consumer can't take a constant exactly.
    """

    group: int
    inner: int = 1
    neuron: str = "linear"
    max_pooled: bool = False
    padded: bool = False


Flow = dict[int, Axis]  # tensor dimension -> the channels that lie along it


@dataclass
class _Draft:
    """A group while it is being traced."""

    width: int
    name: str = ""
    producers: list[Slot] = field(default_factory=list)
    passthrough: list[Slot] = field(default_factory=list)
    consumers: list[Consumer] = field(default_factory=list)
    weights: set[str] = field(default_factory=set)  # those of the producers
    neurons: set[str] = field(default_factory=set)
    max_pooled: bool = False
    reasons: list[str] = field(default_factory=list)


def op_name(node: Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    return node.target._schema.name.split("::")[-1].removesuffix("_")


def arguments(node: Node) -> tuple[Any, ...]:
    """Positional arguments, without fx's type of everything that they might be."""
    return node.args


def shape(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in node.meta["val"].shape)


def attribute(name: str) -> str:
    """A tensor's name as users know it: "0.weight" for "0.parametrizations.weight.original0"."""
    return re.sub(r"(^|\.)parametrizations\.(\w+)\..*", r"\1\2", name)


class Tracer:
    """Walks the graph once; each op's rule reads the flows of its inputs and writes that of its output."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram):
        self.model = model
        self.program = program
        self.flows: dict[Node, Flow | list[Flow]] = {}
        self.tensors: dict[Node, str] = {}  # node -> parameter or buffer, by its first name
        self.drafts: list[_Draft] = []
        self.parent: list[int] = []
        self.made_by: dict[tuple[str, int], int] = {}  # (tensor, dim) -> group
        self.claimed: set[str] = set()  # tensors that the op at hand uses in a way that its rule describes
        self.used_by: dict[str, list[str]] = {}  # tensor -> ops that use it in any other way
        self.uses: dict[str | None, set[str]] = {}  # bias -> weights of the layers that add it
        self.also_reads: dict[str, str] = {}  # weight -> op in which it reads what isn't a group's channels
        self.costs: list[tuple[float, float, int | None, int | None]] = []

    # -- the graph -------------------------------------------------------------------------------------------
    def run(self) -> tuple[list[ChannelGroup], list[CostTerm]]:
        """The channel groups in the model's order, and the forward cost of each op that has one."""
        first_name: dict[int, str] = {}
        model = self.model
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        for name, tensor in named:
            first_name.setdefault(id(tensor), name)
        by_name = {name: first_name[id(tensor)] for name, tensor in named}
        specs = {spec.arg.name: spec for spec in self.program.graph_signature.input_specs}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                spec = specs[node.name]
                if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in by_name:
                    self.tensors[node] = by_name[spec.target]
            elif node.op == "call_function":
                self.call(node)
            elif node.op == "output":
                for used in node.all_input_nodes:
                    self.pin_flow(self.flow(used), "its channels are the model's output")
        return self.finish()

    def call(self, node: Node) -> None:
        if node.target is operator.getitem:
            flows = self.flows.get(arguments(node)[0], {})
            self.flows[node] = flows[arguments(node)[1]] if isinstance(flows, list) else dict(flows)
            return
        inputs, self.claimed = node.all_input_nodes, set()
        if op_name(node) in RULES:
            RULES[op_name(node)](self, node)
        elif any(self.flow(used) for used in inputs):
            for used in inputs:
                self.pin_flow(self.flow(used), f"{self.where(node)} has no rule that says what becomes of the channels")
        if not self.parametrized(node):
            for used in inputs:  # a parameter used outside its layer's own op
                if (name := self.tensor(used)) is not None and attribute(name) not in self.claimed:
                    self.used_by.setdefault(attribute(name), []).append(self.where(node))
        if getattr(node.target, "__name__", "").partition(".")[0].endswith("_"):
            self.alias(arguments(node)[0])

    def alias(self, node: Any) -> None:
        """`node` was changed in place: if it is a view, those who read its base see other neurons than it seems."""
        while isinstance(node, Node) and node.op == "call_function" and op_name(node) in VIEWS:
            node = arguments(node)[0]
            if isinstance(node, Node) and len(node.users) > 1:
                for axis in self.flow(node).values():
                    self.draft(axis).neurons.add("general")

    def parametrized(self, node: Node) -> bool:
        """Is the op part of computing a parametrized attribute?"""
        return "parametrizations" in self.path(node).split(".")

    def tensor(self, node: Any) -> str | None:
        """Name of a parameter or buffer, or of the parametrized attribute that the node computes."""
        if node in self.tensors or not isinstance(node, Node) or not self.parametrized(node):
            return self.tensors.get(node)
        return attribute(f"{self.path(node)}.")

    def path(self, node: Node) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return stack[-1][0] if stack else ""

    def where(self, node: Node) -> str:
        """The op as a user knows it: name, module path, line of code."""
        lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
        line = next((f": {a.removeprefix('File ')}: {b}" for a, b in zip(lines[-2:], lines[-1:], strict=False)), "")
        return f"`aten.{op_name(node)}` in {self.path(node) or 'the model itself'}{line}"

    # -- flows -----------------------------------------------------------------------------------------------
    def flow(self, node: Any) -> Flow:
        """Channel dimensions of a node's output; for an op with several outputs, of all of them."""
        flows = self.flows.get(node, {}) if isinstance(node, Node) else {}
        return {i: axis for i, flow in enumerate(flows) for axis in flow.values()} if isinstance(flows, list) else flows

    def group(self, index: int) -> int:
        while self.parent[index] != index:
            index = self.parent[index]
        return index

    def draft(self, axis: Axis) -> _Draft:
        return self.drafts[self.group(axis.group)]

    def pin_flow(self, flow: Flow, reason: str) -> None:
        for axis in flow.values():
            self.pin(axis, reason)

    def pin(self, axis: Axis, reason: str) -> None:
        if reason not in self.draft(axis).reasons:
            self.draft(axis).reasons.append(reason)

    def unite(self, a: Axis, b: Axis, reason: str) -> Axis:
        """Both axes hold the same channels from now on (`reason` pins them if they can't)."""
        i, j = self.group(a.group), self.group(b.group)
        if i != j:
            first, second = self.drafts[i], self.drafts[j]
            for key in ("producers", "passthrough", "consumers", "reasons"):
                getattr(first, key).extend(item for item in getattr(second, key) if item not in getattr(first, key))
            first.weights |= second.weights
            first.neurons |= second.neurons
            first.max_pooled |= second.max_pooled
            self.parent[j] = i
            if first.width != second.width:
                self.pin(a, reason)
        if a.inner != b.inner:
            self.pin(a, reason)
        same = a.neuron == b.neuron == "linear"
        return Axis(
            a.group, a.inner, "linear" if same else "general", a.max_pooled or b.max_pooled, a.padded or b.padded
        )

    # -- what rules call -------------------------------------------------------------------------------------
    def produce(self, width: int, slots: Iterable[Slot], node: Node) -> Axis:
        """The axis made by these rows: a new group, or the one that already owns a slot (a shared module)."""
        slots = list(slots)
        known = self.made_by.get((slots[0].tensor, slots[0].dim))
        if known is None:
            self.drafts.append(_Draft(width, self.path(node) or slots[0].tensor.rpartition(".")[0]))
            self.parent.append(len(self.parent))
        axis = Axis(self.parent[-1] if known is None else known)
        for slot in slots:
            self.own(axis, slot)
        draft = self.draft(axis)
        draft.weights.add(slots[0].tensor)
        draft.producers.extend(slot for slot in slots if slot not in draft.producers)
        return axis

    def pass_through(self, axis: Axis, slots: Iterable[Slot]) -> None:
        for slot in slots:
            self.own(axis, slot)
            draft = self.draft(axis)
            draft.passthrough.extend([slot] if slot not in draft.passthrough else [])

    def own(self, axis: Axis, slot: Slot) -> None:
        """These entries belong to the axis's group; if another group has them already, the two are one."""
        self.claimed.add(attribute(slot.tensor))
        known = self.made_by.setdefault((slot.tensor, slot.dim), self.group(axis.group))
        self.unite(replace(axis, inner=1), Axis(known), f"{slot.tensor} serves unlike channels (a shared module)")

    def consume(self, axis: Axis, consumer: Consumer) -> None:
        key = (consumer.weight.tensor, consumer.weight.dim)
        self.claimed |= {attribute(name) for name in (consumer.weight.tensor, consumer.bias) if name}
        known = self.made_by.get(key)
        reason = f"{consumer.weight.tensor} reads these channels more than once and not alike (a shared module)"
        if known is not None:
            axis = self.unite(axis, Axis(known, consumer.weight.inner), reason)
        self.made_by[key] = self.group(axis.group)
        draft = self.draft(axis)
        draft.neurons.add(axis.neuron)
        draft.max_pooled |= axis.max_pooled
        same = [old for old in draft.consumers if old.weight.tensor == consumer.weight.tensor]
        if not same:
            draft.consumers.append(consumer)
        elif consumer not in same:
            self.pin(axis, reason)

    def cost(self, parameters: int, positions: int, out_axis: Axis | None, in_axis: Axis | None) -> None:
        """One multiplication and addition for every parameter at every position (at full width)."""
        sides = (axis and axis.group for axis in (out_axis, in_axis))
        self.costs.append((2.0 * parameters * positions, float(parameters), *sides))  # type: ignore[arg-type]

    # -- the result ------------------------------------------------------------------------------------------
    def finish(self) -> tuple[list[ChannelGroup], list[CostTerm]]:
        roots = [i for i in range(len(self.drafts)) if self.group(i) == i]
        self.find_conflicts(roots)
        self.drop_shared_biases(roots)
        names = self.names(roots)
        groups = []
        for i in roots:
            draft = self.drafts[i]
            plain = len(draft.weights) == 1 and not any("parametrizations" in name for name in draft.weights)
            neuron = next(iter(draft.neurons)) if plain and len(draft.neurons) == 1 else "general"
            groups.append(
                ChannelGroup(
                    names[i], draft.width, draft.width, neuron, tuple(draft.producers), tuple(draft.passthrough),
                    tuple(draft.consumers), draft.max_pooled, not draft.reasons, "; ".join(draft.reasons) or None,
                )
            )  # fmt: skip
        totals: dict[tuple[int | None, int | None], list[float]] = {}
        for *amounts, out_side, in_side in self.costs:
            key = tuple(None if side is None else self.group(side) for side in (out_side, in_side))  # type: ignore[arg-type]
            channels = math.prod(self.drafts[side].width for side in key if side is not None)
            old = totals.get(key, [0.0, 0.0])  # type: ignore[arg-type]
            totals[key] = [total + amount / channels for total, amount in zip(old, amounts, strict=True)]  # type: ignore[index]
        name_of = {None: None, **names}
        terms = [CostTerm(f, name_of[a], name_of[b], p) for (a, b), (f, p) in totals.items()]
        return groups, terms

    def names(self, roots: list[int]) -> dict[int, str]:
        """The module that makes a group's channels, or the tensor where that is not unique."""
        drafts = {i: self.drafts[i] for i in roots}
        taken = [draft.name for draft in drafts.values()] + [""]
        return {
            i: draft.name if taken.count(draft.name) == 1 else attribute(draft.producers[0].tensor)
            for i, draft in drafts.items()
        }

    def drop_shared_biases(self, roots: list[int]) -> None:
        """A bias that serves several layers, or elsewhere, can't take the constant part of one layer's fold."""
        busy = [slot.tensor for i in roots for slot in self.drafts[i].passthrough]
        for i in roots:
            self.drafts[i].consumers = [
                replace(c, bias=None) if c.bias in busy or len(self.uses.get(c.bias, ())) > 1 else c
                for c in self.drafts[i].consumers
            ]

    def find_conflicts(self, roots: list[int]) -> None:
        """Pins groups without consumers, with parameters in two roles, and with parameters used elsewhere."""
        sizes = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for i in roots:
            draft = self.drafts[i]
            made = [slot.tensor for slot in draft.producers + draft.passthrough]
            read = [consumer.weight.tensor for consumer in draft.consumers]
            names = made + read + [consumer.bias for consumer in draft.consumers if consumer.bias]
            if not read:
                draft.reasons.append("no layer reads its channels")
            for name in sorted(set(made) & set(read)):
                shared = "a shared module, a tied weight or a residual block"
                draft.reasons.append(f"{name} both makes and reads these channels ({shared})")
            for name in sorted({attribute(name) for name in names} & set(self.used_by)):
                draft.reasons.append(f"{name} is also used by {self.used_by[name][0]}")
            for name in sorted(set(read) & set(self.also_reads)):
                draft.reasons.append(f"{name} also reads other inputs, by {self.also_reads[name]} (a shared module)")
            for name in sorted(name for name in set(made) if name in sizes and not sizes[name].is_floating_point()):
                draft.reasons.append(f"{name} holds {sizes[name].dtype}, not floating-point numbers")
