"""Follows channels through an ATen graph: which parameter rows make them, which columns read them."""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node

from .labels import Array, Channels, Field, along, compact, line
from .nodes import VIEWS, arguments, attribute, code, op_name, shape, stack_of, writes

Rule = Callable[["Tracer", Node], None]
Flow = tuple[Field, ...]  # the channels of one activation
Key = tuple[str, int, tuple[int, int] | None]  # tensor, dimension, split
RULES: dict[str, Rule] = {}
_ARITHMETIC = ("add", "sub", "rsub", "mul", "div", "pow", "floor_divide", "true_divide", "full", "scalar_tensor")
MOVE_NUMBERS = {*VIEWS, "to", "_to_copy", "contiguous", "clone", "long", "int"} - {"split", "chunk", "unbind"}
TAKE_NUMBERS = {"sort", "histc", "one_hot", "scatter", "_assert_tensor_metadata", "empty_like", "zeros_like"}
SHARES = "shares"  # neuron type: a softmax of what a layer makes
GATES = (SHARES, "gate")  # those of channels that are 0 wherever the expert of their number has no weight


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers one function for ATen ops by name, without overload and trailing underscore ("relu")."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


@dataclass
class Record:
    """Which channels the entries of a tensor's dimension belong to: `labels` has one for each position."""

    tensor: str
    dim: int
    split: tuple[int, int] | None
    labels: Array
    role: str = "passthrough"
    bias: str | None = None
    neurons: set[str] = field(default_factory=set)
    max_pooled: bool = False


@dataclass
class Cost:
    """2 x parameters x positions FLOPs at full width, shared by the channels of both sides."""

    flops: float
    parameters: float
    sides: tuple[Array | None, Array | None]
    routed: bool = False


Choice = tuple[Any, int | None]


@dataclass(frozen=True)
class Product:
    """What `source` is multiplied by are tensors that hold several experts' rows.

    Attributes:
        tensors: the weight; its bias, if that is stacked alike.
        experts: for each dimension of theirs that may count experts, how the experts are chosen where the product
            reads, and in what it makes: (what chooses, the dimension along which experts lie in an activation). One
            expert for all, `weight[3]`: (3, None). Each row its own: (the ends of each one's rows, 0). All of them in
            turn: (None, 0). None: not by expert.
    """

    source: Node
    tensors: tuple[str, ...]
    experts: dict[int, tuple[Choice | None, Choice | None]]


class Tracer:
    """Walks the graph once; each op's rule reads the flows of its inputs and writes that of its output."""

    def __init__(
        self, model: nn.Module, program: torch.export.ExportedProgram, merged: Mapping[Key, Array] | None = None
    ):
        self.model = model
        self.program = program
        self.merged = merged or {}  # for each position of a dimension, the number of its channel there
        self.whole: list[Array] = []  # channels that were made by merging
        self.heads: list[Array] = []  # labels [heads, entries] that are multiplied in pairs, head by head
        self.channels = Channels()
        self.flows: dict[Node, Flow | list[Flow]] = {}
        self.tensors: dict[Node, str] = {}  # node -> parameter or buffer, by its first name
        self.records: dict[Key, Record] = {}
        self.names: dict[int, str] = {}  # first label made by a layer -> module
        self.makers: list[tuple[Array, str]] = []  # channels and a weight that makes them
        self.pins: list[tuple[Array, str]] = []
        # channels that an op normalises over or chooses from: fatal unless they are experts; how many are chosen,
        # 0: all, None: not of what a layer makes
        self.gates: list[tuple[Array, str, int | None]] = []
        self.chosen: dict[Node, tuple[Array | None, ...]] = {}  # outputs that hold numbers of these channels
        self.general: list[Array] = []  # channels that no closed form describes
        self.pairs: list[tuple[Array, set[str], set[str]]] = []  # channels of two tensors each, and what makes both
        self.rows: list[tuple[Array, str]] = []  # labels [rows, entries]: as many must stay in every row
        self.multiples: list[tuple[Array, int]] = []  # channels, of which there must be a multiple of so many
        self.passes: dict[int, tuple[Array, set[str]]] = {}  # labels -> lines of code that they pass
        self.claimed: set[str] = set()  # tensors that the op at hand uses in a way that its rule describes
        self.used_by: dict[str, str] = {}  # tensor -> op that uses it in another way
        self.uses: dict[str | None, set[str]] = {}  # bias -> weights of the layers that add it
        self.also_reads: dict[str, str] = {}  # weight -> op in which it reads what isn't a group's channels
        self.costs: list[Cost] = []
        self.products: dict[Node, Product] = {}  # those with the tensors of experts

    # -- the graph -------------------------------------------------------------------------------------------
    def run(self) -> "Tracer":
        """Walks the whole graph."""
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
                    if used not in self.tensors:
                        self.pin_flow(self.flow(used), "its channels are the model's output")
        return self

    def numbers(self) -> list[tuple[str, tuple[float, ...]]]:
        """The numbers that ops compute with, in their order: what must not follow a size (a scale by its root)."""
        found = []
        for node in self.program.graph.nodes:
            kinds = (int, float) if op_name(node) in _ARITHMETIC else float
            direct = (*node.args, *node.kwargs.values())
            given = [float(x) for x in direct if isinstance(x, kinds) and not isinstance(x, bool)]
            if op_name(node) == "scaled_dot_product_attention" and node.kwargs.get("scale") is None:
                given.append(shape(arguments(node)[0])[-1] ** -0.5)
            found += [(op_name(node), tuple(given))] if given else []
        lifted = [x for x in self.program.constants.values() if isinstance(x, Tensor) and x.numel() == 1]
        return [*found, *(("constant", (float(x),)) for x in lifted)]

    def call(self, node: Node) -> None:
        if node.target is operator.getitem:
            flows = self.flows.get(arguments(node)[0], ())
            self.flows[node] = flows[arguments(node)[1]] if isinstance(flows, list) else flows
            if numbers := self.chosen.get(arguments(node)[0]):
                self.chosen[node] = numbers[arguments(node)[1] :][:1]
            return
        if self.parametrized(node):
            return
        self.claimed = set()
        if op_name(node) in RULES:
            RULES[op_name(node)](self, node)
        else:
            for used in node.all_input_nodes:
                flow = self.flow(used)
                self.pin_flow(flow, f"{self.where(node)} has no rule that says what becomes of the channels")
        self.follow_numbers(node)
        for used in node.all_input_nodes:  # a parameter used outside its layer's own op
            if (name := self.tensor(used)) is not None and attribute(name) not in self.claimed:
                self.used_by.setdefault(attribute(name), self.where(node))
        self.note_line(node)
        if writes(node) and arguments(node):
            self.flows[arguments(node)[0]] = self.flows.get(node, ())
            self.alias(arguments(node)[0])

    def follow_numbers(self, node: Node) -> None:
        """Numbers of channels are moved, or go into an op that has a rule for them."""
        for used in node.all_input_nodes:
            labels = self.chosen.get(used, (None,))[0]
            if labels is None or op_name(node) in TAKE_NUMBERS:
                continue
            if op_name(node) not in MOVE_NUMBERS or writes(node):
                self.pin(labels, f"{self.where(node)} has no rule for the numbers of chosen channels")
            self.chosen[node] = (labels,)

    def alias(self, node: Any) -> None:
        """`node` was changed in place: if it is a view, those who read its base see other neurons than it seems."""
        while isinstance(node, Node) and node.op == "call_function" and op_name(node) in VIEWS:
            node = arguments(node)[0]
            if isinstance(node, Node) and len(node.users) > 1:
                self.general += [each.labels.flatten() for each in self.flow(node)]

    def note_line(self, node: Node) -> None:
        line_of_code = code(node)[0]
        for each in (used for source in (node, *node.all_input_nodes) for used in self.known(source)):
            self.passes.setdefault(id(each.labels), (each.labels, set()))[1].add(line_of_code)

    def parametrized(self, node: Node) -> bool:
        """Is the op part of computing a parametrized attribute?"""
        return "parametrizations" in self.path(node).split(".")

    def tensor(self, node: Any) -> str | None:
        """Name of a parameter or buffer, or of the parametrized attribute that the node computes."""
        if node in self.tensors or not isinstance(node, Node) or not self.parametrized(node):
            return self.tensors.get(node)
        return attribute(f"{self.path(node)}.")

    def part(self, node: Any) -> tuple[str | None, int]:
        """The tensor that the node is, and 0; or that of which it is one of the stacked parts (weight[3]), and 1."""
        stack = stack_of(node)
        return (self.tensors[stack], 1) if stack in self.tensors else (self.tensor(node), 0)

    def path(self, node: Node) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return stack[-1][0] if stack else ""

    def where(self, node: Node) -> str:
        """The op as a user knows it: name, module path, line of code."""
        return f"`aten.{op_name(node)}` in {self.path(node) or 'the model itself'}{code(node)[1]}"

    # -- flows -----------------------------------------------------------------------------------------------
    def known(self, node: Any) -> Flow:
        """Channels of a node's output, of all its outputs if there are several; no parameter's."""
        flows = self.flows.get(node, ()) if isinstance(node, Node) else ()
        return tuple(each for flow in flows for each in flow) if isinstance(flows, list) else flows

    def flow(self, node: Any) -> Flow:
        """The same; the dimensions of a parameter or buffer hold channels of its own."""
        if node not in self.tensors:
            return self.known(node)
        value = node.meta["val"]
        self.claimed.add(attribute(self.tensors[node]))
        if not value.is_floating_point() and value.dtype != torch.bool:
            return ()
        sizes = shape(node)
        labels = [(d, self.record(self.tensors[node], d, size)) for d, size in enumerate(sizes) if size > 1]
        return tuple(Field(along(each, d, len(sizes))) for d, each in labels)

    def emit(self, node: Node, fields: Iterable[Field]) -> None:
        """The flow of a node with one output."""
        self.flows[node] = self.fields(fields)

    def fields(self, fields: Iterable[Field]) -> Flow:
        kept = []
        for each in fields:
            labels = compact(each.labels)
            if bool((labels >= 0).any()):
                kept.append(replace(each, labels=labels))
        return tuple(kept)

    def pin_flow(self, flow: Iterable[Field], reason: str) -> None:
        for each in flow:
            self.pin(each.labels, reason)

    def pin(self, labels: Array, reason: str) -> None:
        self.pins.append((labels.flatten(), reason))

    def unite(self, a: Array, b: Array, reason: str) -> None:
        """a[i] and b[i] are the same channel; where one of them is none, the other is pinned for this reason."""
        self.channels.unite(a, b)
        a, b = (x.flatten() for x in torch.broadcast_tensors(a, b))
        if bool((alone := (a < 0) != (b < 0)).any()):
            self.pin(torch.maximum(a, b)[alone], reason)

    def join(self, node: Node, fields: Iterable[Field]) -> list[Field]:
        """Fields of one activation that come together from several: those along the same dimensions are one."""
        result: list[Field] = []
        reason = f"{self.where(node)} joins unlike channels"
        for new in fields:
            for old in [old for old in result if set(old.dims) & set(new.dims)]:
                if not (set(old.dims) <= set(new.dims) or set(new.dims) <= set(old.dims)) or any(
                    a != b for a, b in zip(old.labels.shape, new.labels.shape, strict=True) if a > 1 and b > 1
                ):
                    self.pin_flow([old, new], reason)
                    continue
                self.unite(old.labels, new.labels, reason)
                result.remove(old)
                wider = old if len(old.dims) >= len(new.dims) else new
                same = "linear" if old.neuron == new.neuron == "linear" else "general"
                new = Field(wider.labels, same, old.max_pooled or new.max_pooled, old.padded or new.padded)
            result.append(new)
        return result

    def read(self, node: Node, dim: int, reader: Node) -> Field | None:
        """What lies along one dimension, as labels [size]: the other places of a field are the same channels."""
        found = [each for each in self.flow(node) if dim in each.dims]
        if len(found) != 1:
            self.pin_flow(found, f"{self.where(reader)} reads them mixed with other channels")
            return None
        rows = line(found[0].labels, dim)
        if len(rows) > 1:
            self.unite(rows[:1], rows[1:], f"{self.where(reader)} reads them together with others")
            found[0] = replace(found[0], neuron="general")
        return replace(found[0], labels=rows[0])

    # -- what rules call -------------------------------------------------------------------------------------
    def record(
        self, tensor: str, dim: int, labels: Array | int, role: str | None = None, split: tuple[int, int] | None = None
    ) -> Array:
        """These channels own the entries of a tensor's dimension (a number: as many new ones, if none do yet)."""
        self.claimed.add(attribute(tensor))
        known = self.records.get((tensor, dim, split))
        if known is None:
            labels = self.made((tensor, dim, split), labels) if isinstance(labels, int) else labels.flatten()
            known = self.records[tensor, dim, split] = Record(tensor, dim, split, labels)
        elif not isinstance(labels, int):
            if known.labels.numel() != labels.numel():
                self.pin(torch.cat([labels.flatten(), known.labels]), f"{tensor} serves unlike channels")
            else:
                self.unite(known.labels, labels.flatten(), f"{tensor} serves unlike channels (a shared module)")
        if role is not None:
            if {known.role, role} == {"producer", "consumer"}:
                shared = "a tied weight"
                self.pin(known.labels, f"{tensor} both makes and reads these channels ({shared})")
            known.role = role
        return known.labels

    def made(self, key: Key, count: int) -> Array:
        """New labels for a dimension; the same ones for positions that are known to be one channel."""
        channel = self.merged.get(key)
        if channel is None or len(channel) != count:
            return self.channels.new(count)
        sizes = torch.bincount(channel)
        labels = self.channels.new(len(sizes))
        self.whole.append(labels[sizes > 1])
        return labels[channel]

    def produce(self, width: int, slots: Sequence[tuple[str, int]], node: Node) -> Array:
        """The channels made by these rows (tensor, dim): new ones, or those that own them already (a shared module)."""
        new = (slots[0][0], slots[0][1], None) not in self.records
        labels = self.record(*slots[0], width, "producer")
        for tensor, dim in slots[1:]:
            self.record(tensor, dim, labels, "producer")
        self.makers.append((labels, slots[0][0]))
        if new and len(labels):
            self.names[int(labels[0])] = self.path(node) or slots[0][0].rpartition(".")[0]
        return labels

    def made_by_product(self, labels: Array, name: str | None = None) -> None:
        """These entries of a bare parameter (without `name`, of any) make channels, as a layer's rows do."""
        known = [r for r in self.records.values() if name in (None, r.tensor)]
        for record in [r for r in known if torch.equal(r.labels, labels.flatten())]:
            record.role = "producer" if record.role == "passthrough" else record.role
            self.makers.append((record.labels, record.tensor))
            self.names.setdefault(int(record.labels[0]), record.tensor)

    def pass_through(self, labels: Array, tensors: Iterable[str]) -> None:
        for tensor in tensors:
            self.record(tensor, 0, labels)

    def consume(
        self, tensor: str, dim: int, read: Field, bias: str | None, split: tuple[int, int] | None = None
    ) -> None:
        """The channels `read` are read by these columns."""
        new = (tensor, dim, split) not in self.records
        self.record(tensor, dim, read.labels, "consumer", split)
        record = self.records[tensor, dim, split]
        self.claimed |= {attribute(bias)} if bias else set()
        record.bias = bias if new or record.bias == bias else None
        record.neurons.add(read.neuron)
        record.max_pooled |= read.max_pooled

    def cost(
        self, parameters: int, positions: float, out_labels: Array | None, in_labels: Array | None,
        routed: bool = False,
    ) -> None:  # fmt: skip
        """One multiplication and addition for every parameter at every position (at full width)."""
        self.costs.append(Cost(2.0 * parameters * positions, float(parameters), (out_labels, in_labels), routed))
