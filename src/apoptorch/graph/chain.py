"""The model as one chain of ops, each with a Lipschitz constant, as closed-form bounds need it.

A link is a map F on the entries that belong to one input of the model, with Euclidean norms:
|F(x) - F(y)| <= gain |x - y| and |F(0)| <= offset. A layer's and a norm's follow from their tensors, which removals
change; those of all others are fixed here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export.graph_signature import InputKind
from torch.fx import Node

from ..neurons import Neuron, neuron
from .nodes import VIEWS, argument, op_name
from .rules import CONSTANT_OPS, POINTWISE, neuron_name
from .tracer import Tracer


@dataclass(frozen=True)
class Link:
    """One op of a chain.

    Attributes:
        kind: "layer" (linear, convolution, or two that read the same tensor), "norm" (batch norm in eval mode),
            "neuron" (elementwise), "gate" (one half of what it reads times the neuron of the other), "max_pool",
            "mean_pool", "padded_pool" (a mean over zeros beside the image too), "same" (the same entries, in another
            order) or "other".
        where: the op as a user knows it.
        size: entries of its output for one input.
        tensors: of a layer: weight, bias (and again those of the second one, that of the gate); of a norm: scale,
            shift, running mean and variance; of a PReLU: its slopes. None: there is none.
        channels: of a layer's or a norm's output, which has size / channels positions.
        overlap: at how many positions a layer reads one entry, at most.
        eps: of a norm.
        neuron: the elementwise function.
        gate_first: of a gate: the neuron reads the first half, not the second one.
        gain, offset: see above; a gate has none for inputs of every norm.
    """

    kind: str
    where: str
    size: int
    tensors: tuple[str | None, ...] = ()
    channels: int = 1
    overlap: int = 1
    eps: float = 0.0
    neuron: Neuron | None = None
    gate_first: bool = False
    gain: float = 1.0
    offset: float = 0.0


Known = dict[str, Any]  # what a link has beside `where` and `size`
_LINKS: dict[str, Callable[[Tracer, Node], Known | str]] = {}


def _link(
    *names: str,
) -> Callable[[Callable[[Tracer, Node], Known | str]], Callable[[Tracer, Node], Known | str]]:
    """Registers one function for ATen ops; it returns what the op's link has, or in words why there is none."""

    def register(function: Callable[[Tracer, Node], Known | str]) -> Callable[[Tracer, Node], Known | str]:
        _LINKS.update(dict.fromkeys(names, function))
        return function

    return register


def chain(tracer: Tracer) -> list[Link] | str:
    """The ops from the model's input to its output, in their order; or in words why they are no chain.

    `tracer` has walked the model's graph in eval mode. Dimension 0 of every tensor counts the inputs.
    """
    data, node = _data_nodes(tracer)
    if shared := [each for each in data if _writes_shared(each)]:
        return f"{tracer.where(shared[0])} changes in place what other ops read too"
    links: list[Link] = []
    while True:
        found = _gated(tracer, node, data) or _single(tracer, node, data)
        if isinstance(found, str):
            return f"{tracer.where(node)} {found}"
        links += found[0]
        node = found[1]
        if not _value(node).is_floating_point():
            return f"{tracer.where(node)} gives no floating-point numbers"
        if node.op == "placeholder":
            return links[::-1]


def _single(tracer: Tracer, node: Node, data: set[Node]) -> tuple[list[Link], Node] | str:
    """The link that the node is, if any, and what it reads; or in words why it is none."""
    call, sources = _call(tracer, node, data)
    if len(sources) != 1:
        return f"joins {len(sources)} tensors that depend on the input: no chain of layers"
    if node.op != "call_function":
        return [], sources[0]
    known = call or _LINKS.get(op_name(node), _unknown)(tracer, node)
    if isinstance(known, str):
        return known
    if _sizes(node)[:1] != _sizes(sources[0])[:1]:
        return "changes dimension 0, which must count the inputs of a batch"
    return [_made(tracer, node, known)], sources[0]


def _made(tracer: Tracer, node: Node, known: Known) -> Link:
    return Link(**{"where": tracer.where(node), "size": math.prod(_sizes(node)[1:]), **known})


def _gated(tracer: Tracer, node: Node, data: set[Node]) -> tuple[list[Link], Node] | None:
    """The links of a product a f(b), the last one first, and what they read; None if it is no such product.

    a and b are the halves of one tensor, or what two layers of one shape make of one tensor.
    """
    factors = node.all_input_nodes
    if op_name(node) != "mul" or len(factors) != 2 or any(each.op != "call_function" for each in factors):
        return None
    neurons = [_pointwise(tracer, each) if op_name(each) in POINTWISE else None for each in factors]
    known: Any = neurons[0] or neurons[1] or {"neuron": neuron("linear")}
    if all(neurons) or isinstance(known, str) or known["neuron"].function is None:
        return None
    made: list[Any] = [each.args[0] if f else each for each, f in zip(factors, neurons, strict=True)]
    value, gate = made[::-1] if neurons[0] else made
    if value is gate or op_name(value) != op_name(gate) or _sizes(value) != _sizes(gate):
        return None
    link: Known = {"kind": "gate", "neuron": known["neuron"]}
    source: Any = value.args[0]
    if not isinstance(source, Node) or source not in data or gate.args[0] is not source:
        return None
    if op_name(value) == "getitem":
        whole: Any = source.args[0]
        halves = sorted([value.args[1], gate.args[1]]) == [0, 1] and len(source.meta["val"]) == 2
        if not halves or op_name(source) not in _HALVES or _sizes(whole)[0] != _sizes(value)[0]:
            return None
        return [_made(tracer, node, {**link, "gate_first": value.args[1] == 1})], whole
    layer = _two_layers(tracer, value, gate)
    return None if layer is None else ([_made(tracer, node, link), _made(tracer, value, layer)], source)


_HALVES = ("chunk", "split", "split_with_sizes")


def _two_layers(tracer: Tracer, one: Node, other: Node) -> Known | None:
    """Two layers that read one tensor in the same way, as one layer."""
    rule = _LINKS.get(op_name(one), _unknown)
    if rule not in (_linear, _convolution):
        return None
    first, second = rule(tracer, one), rule(tracer, other)
    how = [(each.args[3:], each.kwargs, _sizes(each.args[1])) for each in (one, other)]  # type: ignore[arg-type]
    if how[0] != how[1] or isinstance(first, str) or isinstance(second, str):
        return None
    return {
        **first, "tensors": first["tensors"] + second["tensors"], "channels": 2 * first["channels"],
        "size": 2 * math.prod(_sizes(one)[1:]),
    }  # fmt: skip


def _data_nodes(tracer: Tracer) -> tuple[set[Node], Node]:
    """What depends on the model's inputs, and the output node."""
    kinds = {spec.arg.name: spec.kind for spec in tracer.program.graph_signature.input_specs}
    data = set[Node]()
    nodes = list(tracer.program.graph.nodes)
    for node in nodes:
        given = node.op == "placeholder" and kinds[node.name] == InputKind.USER_INPUT
        if (given and isinstance(_value(node), Tensor)) or any(used in data for used in node.all_input_nodes):
            data.add(node)
    return data, nodes[-1]


def _call(tracer: Tracer, node: Node, data: set[Node]) -> tuple[Known | None, list[Node]]:
    """What the node reads of `data`; for the last op of a module that is one neuron in several ops, the module's."""
    composite = {nn.Softsign: "softsign", nn.Tanhshrink: "tanhshrink"}
    name = composite.get(type(tracer.model.get_submodule(tracer.path(node)))) if node.op == "call_function" else None
    inside, sources = [node], dict[Node, None]()
    for each in inside:
        for used in each.all_input_nodes:
            if used in data and name and _call_key(used) == _call_key(node):
                inside.append(used)
            elif used in data:
                sources[used] = None
    return _elementwise(neuron(name), node) if name else None, list(sources)


def _call_key(node: Node) -> str:
    """Which call of which module the op belongs to."""
    return list(node.meta.get("nn_module_stack") or [""])[-1]


def _writes_shared(node: Node) -> bool:
    """Does an in-place op write to memory that an op may read under the name of an older node, a view or its base?"""
    changed = node.args[0] if isinstance(node.target, OpOverload) and node.target._schema.name.endswith("_") else None
    while isinstance(changed, Node):
        if len(changed.users) > 1:
            return True
        changed = changed.args[0] if op_name(changed) in VIEWS else None
    return False


def _value(node: Node) -> Any:
    """The node's tensor, the first one of several."""
    value = node.meta.get("val")
    return value[0] if isinstance(value, list | tuple) else value


def _sizes(node: Node) -> tuple[int, ...]:
    return tuple(int(size) for size in _value(node).shape)


def _unknown(tracer: Tracer, node: Node) -> str:
    return "has no closed form"


def _elementwise(known: Neuron, node: Node, kind: str = "neuron") -> Known:
    zero = (
        0.0
        if known.homogeneous or known.function is None
        else float(known.function(torch.zeros((), dtype=torch.float64)))
    )
    return {
        "kind": kind, "neuron": known, "gain": known.lipschitz,
        "offset": abs(zero) * math.sqrt(math.prod(_sizes(node)[1:])),
    }  # fmt: skip


# One rule per family of ops.


@_link("linear")
def _linear(tracer: Tracer, node: Node) -> Known | str:
    return _layer(tracer, node, _sizes(node)[-1], 1) if len(_sizes(node)) > 1 else "has no batch dimension"


@_link("conv1d", "conv2d", "conv3d")
def _convolution(tracer: Tracer, node: Node) -> Known | str:
    kernel = _sizes(node.args[1])[2:]  # type: ignore[arg-type]
    if argument(node, 6, "groups", 1) != 1 or len(_sizes(node)) != len(kernel) + 2:
        return "is a grouped convolution, or has no batch dimension"
    stride, dilation = (argument(node, i, name, 1) for i, name in ((3, "stride"), (5, "dilation")))
    return _layer(tracer, node, _sizes(node)[1], _overlap(kernel, stride, dilation))


def _layer(tracer: Tracer, node: Node, channels: int, overlap: int) -> Known | str:
    bias_node = argument(node, 2, "bias")
    weight, bias = tracer.tensor(node.args[1]), tracer.tensor(bias_node)
    if weight is None or (bias_node is not None and bias is None):
        return "has a weight that is computed in forward()"
    return {"kind": "layer", "tensors": (weight, bias), "channels": channels, "overlap": overlap}


def _overlap(kernel: Any, stride: Any, dilation: Any) -> int:
    """In how many windows an entry lies, at most: of taps t with x - t dilation a multiple of stride, per dimension."""
    sides = [_per_dimension(value, len(kernel)) for value in (kernel, stride, dilation)]
    return math.prod(math.ceil(k * math.gcd(s, d) / s) for k, s, d in zip(*sides, strict=True))


def _per_dimension(value: Any, dimensions: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * dimensions if len(values) == 1 else values


@_link("batch_norm")
def _batch_norm(tracer: Tracer, node: Node) -> Known | str:
    module = tracer.model.get_submodule(tracer.path(node))
    if node.args[5] or (module.training and isinstance(module, nn.modules.batchnorm._BatchNorm)):
        return "normalises by the batch in training mode: call model.eval() for a closed form"
    tensors = tuple(tracer.tensors.get(arg) for arg in node.args[1:5])  # type: ignore[arg-type]
    if any(arg is not None and name is None for arg, name in zip(node.args[1:5], tensors, strict=True)):
        return "has a weight that is computed in forward()"
    return {"kind": "norm", "tensors": tensors, "channels": _sizes(node)[1], "eps": node.args[7]}


@_link(*POINTWISE)
def _pointwise(tracer: Tracer, node: Node) -> Known | str:
    known, tensors = neuron(neuron_name(node)), ()
    if op_name(node) == "rrelu" and tracer.model.get_submodule(tracer.path(node)).training:
        return "is random in training mode: call model.eval() for a closed form"
    if op_name(node) == "prelu":
        if (name := tracer.tensors.get(node.args[1])) is None:  # type: ignore[arg-type]
            return "has a slope that is computed in forward()"
        tensors, slopes = (name,), attrgetter(name)(tracer.model).detach().double()
        known = neuron(f"prelu({float(slopes[0])})")
        if not bool((slopes == slopes[0]).all()):
            known = Neuron(max(1.0, float(slopes.abs().max())), True, name="prelu with several slopes")
    if not known.homogeneous and known.function is None:
        return "has no closed form"
    return {**_elementwise(known, node), "tensors": tensors}


@_link("glu")
def _glu(tracer: Tracer, node: Node) -> Known | str:
    return {"kind": "gate", "neuron": neuron("sigmoid")}


@_link(*CONSTANT_OPS)
def _arithmetic(tracer: Tracer, node: Node) -> Known | str:
    constant = node.args[1] if len(node.args) == 2 and not node.kwargs else None
    if isinstance(constant, bool) or not isinstance(constant, int | float) or constant == 0:
        return "has no closed form"
    scales = {"mul": abs(constant), "div": 1 / abs(constant)}
    known = Neuron(scales.get(op_name(node), 1.0), function=lambda z: node.target(z, constant))  # type: ignore[operator]
    return _elementwise(known, node, "other")


@_link("softmax", "_softmax", "log_softmax", "_log_softmax")
def _softmax(tracer: Tracer, node: Node) -> Known | str:
    """softmax: the Jacobian diag(p) - p p^T has row sums 2 p (1 - p) <= 1/2 (Gershgorin). Its log: I - 1 p^T is a
    projection of norm sqrt(n) |p| <= sqrt(n)."""
    sizes = _sizes(node)
    n = sizes[node.args[1]]  # type: ignore[index]
    if node.args[1] % len(sizes) == 0:  # type: ignore[operator]
        return "normalises over the inputs of a batch"
    root = math.sqrt(math.prod(sizes[1:]))
    if "log" in op_name(node):
        return {"kind": "other", "gain": math.sqrt(n), "offset": root * math.log(n)}
    return {"kind": "other", "gain": 0.5, "offset": root / n}


@_link("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d")
def _pooling(tracer: Tracer, node: Node) -> Known | str:
    """The mean of m entries is at most their norm / sqrt(m), their maximum at most their norm."""
    kernel = _per_dimension(node.args[1], int(op_name(node)[-2]))
    stride = argument(node, 2, "stride") or kernel
    padded = any(_per_dimension(argument(node, 3, "padding", 0), 1))
    if "max" in op_name(node):
        overlap = _overlap(kernel, stride, argument(node, 4, "dilation", 1))
        return {"kind": "max_pool", "gain": math.sqrt(overlap)}
    if argument(node, 6, "divisor_override") is not None:
        return "has no closed form"
    whole = not argument(node, 4, "ceil_mode", False) and not (
        padded and not argument(node, 5, "count_include_pad", True)
    )
    gain = math.sqrt(_overlap(kernel, stride, 1) / (math.prod(kernel) if whole else 1))
    return {"kind": "padded_pool" if padded else "mean_pool", "gain": gain}


@_link(*(f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)))
def _adaptive_pooling(tracer: Tracer, node: Node) -> Known | str:
    dimensions = int(op_name(node)[-2])
    before, after = _sizes(node.args[0])[-dimensions:], _sizes(node)[-dimensions:]  # type: ignore[arg-type]
    if any(b % a for b, a in zip(before, after, strict=True)):
        return "pools windows of unequal size"
    if "max" in op_name(node):
        return {"kind": "max_pool"}
    return {"kind": "mean_pool", "gain": math.sqrt(math.prod(after) / math.prod(before))}


@_link("mean", "amax")
def _reduction(tracer: Tracer, node: Node) -> Known | str:
    sizes, dims = _sizes(node.args[0]), argument(node, 1, "dim")  # type: ignore[arg-type]
    reduced = {d % len(sizes) for d in ([dims] if isinstance(dims, int) else dims or range(len(sizes)))}
    if 0 in reduced:
        return "reduces over the inputs of a batch"
    if op_name(node) == "amax":
        return {"kind": "max_pool"}
    return {"kind": "mean_pool", "gain": 1 / math.sqrt(math.prod(sizes[d] for d in reduced))}


@_link("dropout", "feature_dropout")
def _dropout(tracer: Tracer, node: Node) -> Known | str:
    """Counts as off: as in eval mode, also where the model trains."""
    return "is on in eval mode too" if argument(node, 2, "train") else {"kind": "same"}


@_link("clone", "contiguous", "detach", "alias", "to", "_to_copy", "type_as", "getitem", "view", "reshape",
       "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")  # fmt: skip
def _same(tracer: Tracer, node: Node) -> Known | str:
    """Rearranges an input's entries. Of several outputs only the first one is known."""
    return "has no closed form" if op_name(node) == "getitem" and node.args[1] != 0 else {"kind": "same"}


@_link("transpose", "permute")
def _permute(tracer: Tracer, node: Node) -> Known | str:
    dims: Any = node.args[1][:1] if op_name(node) == "permute" else node.args[1:3]  # type: ignore[index]
    first = 0 in {dim % len(_sizes(node)) for dim in dims}
    kept = first == (op_name(node) == "permute")
    return {"kind": "same"} if kept else "moves dimension 0, which must count the inputs of a batch"
