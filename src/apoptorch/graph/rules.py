"""One rule per family of ATen ops. A rule never guesses: what it doesn't know, it pins."""

import math
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import Node

from ..plan import Consumer, Slot
from .tracer import Axis, Flow, Tracer, arguments, op_name, rule, shape

POINTWISE = (
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh",
    "softplus", "hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "log_sigmoid", "threshold", "clamp",
    "clamp_min", "clamp_max", "abs", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "square", "sin", "cos", "erf",
    "reciprocal", "neg", "pow",
)  # fmt: skip
IDENTITY = (
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout", "clone", "contiguous",
    "detach", "alias", "lift_fresh_copy",
    "to", "_to_copy", "type_as", "_assert_tensor_metadata",
)  # fmt: skip
POOLING = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices",
)  # fmt: skip
CONSTANT_OPS = ("add", "sub", "rsub", "mul", "div")


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    return arguments(node)[index] if len(arguments(node)) > index else node.kwargs.get(name, default)


def layer_slots(tracer: Tracer, name: str, dim: int, inner: int) -> tuple[list[Slot], str | None]:
    """Where channels lie in a weight, parametrized or not; and why it can't be narrowed, if it can't.

    weight_norm (dim 0): its magnitudes follow the rows, its directions both. spectral_norm: so do its two singular
    vectors; the largest singular value may change with the channels, which the guard measures.
    """
    path, _, attribute = name.rpartition(".")
    module = tracer.model.get_submodule(path)
    if not nn.utils.parametrize.is_parametrized(module, attribute):
        return [Slot(name, dim, inner)], None
    chain = list(module.parametrizations[attribute])  # type: ignore[index]
    prefix = f"{path}.parametrizations.{attribute}".lstrip(".")
    kind = type(chain[0]).__name__ if len(chain) == 1 else "several"
    if kind == "_WeightNorm" and chain[0].dim == 0:
        return (
            [Slot(f"{prefix}.original0", 0), Slot(f"{prefix}.original1", 0)] if dim == 0 else [Slot(name, dim, inner)]
        ), None
    if kind == "_SpectralNorm" and chain[0].dim == 0:
        weight = Slot(f"{prefix}.original", dim, inner)
        if chain[0]._u is None:  # type: ignore[union-attr] - a vector: normalised directly, without buffers
            return [weight], None
        taps = math.prod(module.parametrizations[attribute].original.shape[2:])  # type: ignore[index]
        return [weight, Slot(f"{prefix}.0._u", 0) if dim == 0 else Slot(f"{prefix}.0._v", 0, inner * taps)], None
    return [Slot(name, dim, inner)], f"{name} has a parametrization ({kind}) for which there is no rule"


def layer(tracer: Tracer, node: Node, dim: int, out_dim: int, zero_padded: bool, positions: int) -> None:
    """linear and convolution: the input's channels at `dim` are read, those at `out_dim` are made."""
    x, weight_node, bias_node = arguments(node)[0], arguments(node)[1], argument(node, 2, "bias")
    flow = dict(tracer.flow(x))
    read = flow.pop(dim, None)
    weight, bias = tracer.tensor(weight_node), tracer.tensor(bias_node)
    if weight is None or (bias_node is not None and bias is None):
        tracer.pin_flow(tracer.flow(x), f"{tracer.where(node)} reads them with a weight that is computed in forward()")
        return
    weight_shape = shape(weight_node)
    tracer.uses.setdefault(bias, set()).add(weight)
    slots, reason = layer_slots(tracer, weight, 0, 1)
    made = tracer.produce(weight_shape[0], slots + ([Slot(bias, 0)] if bias else []), node)
    if read is not None:
        if weight_shape[1] != tracer.draft(read).width * read.inner:
            tracer.pin(read, f"{tracer.where(node)} reads them together with others")
        columns, _ = layer_slots(tracer, weight, 1, read.inner)
        tracer.consume(read, Consumer(columns[0], None if zero_padded or read.padded else bias))
        tracer.pass_through(read, columns[1:])
    else:
        tracer.also_reads[columns_of(weight, slots)] = tracer.where(node)
    if reason is not None:
        tracer.pin_flow({0: made, 1: read} if read else {0: made}, reason)
    tracer.cost(math.prod(weight_shape), positions, made, read)
    tracer.flows[node] = {**{d: replace(axis, neuron="general") for d, axis in flow.items()}, out_dim: made}


@rule("linear")
def linear(tracer: Tracer, node: Node) -> None:
    last = len(shape(node)) - 1
    layer(tracer, node, last, last, zero_padded=False, positions=math.prod(shape(node)[:-1]))


@rule("conv1d", "conv2d", "conv3d")
def convolution(tracer: Tracer, node: Node) -> None:
    groups = argument(node, 6, "groups", 1)
    dim = len(shape(node)) - (len(shape(arguments(node)[1])) - 1)  # 0 without a batch dimension
    padding = argument(node, 4, "padding", 0)
    zero_padded = padding not in (0, "valid") and any(padding if isinstance(padding, list | tuple) else [padding])
    positions = math.prod(shape(node)) // shape(node)[dim]
    for other, axis in tracer.flow(arguments(node)[0]).items():
        if other > dim:
            tracer.pin(axis, f"{tracer.where(node)} slides along them")
    if groups == 1:
        layer(tracer, node, dim, dim, bool(zero_padded), positions)
        return
    read = tracer.flow(arguments(node)[0]).get(dim)
    weight, bias = tracer.tensors.get(arguments(node)[1]), tracer.tensors.get(argument(node, 2, "bias"))
    computed = bias is None and argument(node, 2, "bias") is not None
    if (
        read is None
        or weight is None
        or computed
        or groups != shape(node)[dim]
        or read.inner != 1
        or tracer.draft(read).width != groups
    ):
        tracer.pin_flow(tracer.flow(arguments(node)[0]), f"{tracer.where(node)} is a grouped convolution")
        return
    tracer.pass_through(read, [Slot(weight, 0)] + ([Slot(bias, 0)] if bias else []))  # depthwise
    tracer.cost(math.prod(shape(arguments(node)[1])), positions, read, None)
    tracer.flows[node] = {d: replace(axis, neuron="general") for d, axis in tracer.flow(arguments(node)[0]).items()}


@rule("batch_norm")
def batch_norm(tracer: Tracer, node: Node) -> None:
    """Its scale and statistics lie along dimension 1. Only an affine one leaves neurons that can be scaled."""
    flow = dict(tracer.flow(arguments(node)[0]))
    given = [arg for arg in arguments(node)[1:5] if arg is not None]
    names = [tracer.tensors[arg] for arg in given if arg in tracer.tensors]
    for dim, axis in flow.items():
        if dim != 1:
            tracer.pin(axis, f"{tracer.where(node)} normalises over them")
        elif len(names) < len(given):
            tracer.pin(axis, f"{tracer.where(node)} uses parameters that are computed in forward()")
        else:
            tracer.pass_through(axis, [Slot(name, 0, axis.inner) for name in names])
            if axis.neuron != "linear" or arguments(node)[1] is None:
                flow[1] = replace(axis, neuron="general")
    tracer.flows[node] = flow


def neuron_name(node: Node) -> str:
    """The neuron type of an elementwise op, with its constants: "relu", "elu(0.5)"."""
    constants = [arg for arg in arguments(node)[1:] if isinstance(arg, int | float) and not isinstance(arg, bool)]
    if op_name(node) == "gelu":
        constants = [node.kwargs["approximate"]] if node.kwargs.get("approximate", "none") != "none" else []
    return op_name(node) + (f"({', '.join(map(str, constants))})" if constants else "")


@rule(*POINTWISE)
def pointwise(tracer: Tracer, node: Node) -> None:
    prelu = op_name(node) == "prelu"
    if (not prelu and len(nodes_of(node)) != 1) or not isinstance(arguments(node)[0], Node):
        arithmetic(tracer, node)
        return
    flow, name = dict(tracer.flow(arguments(node)[0])), neuron_name(node)
    if node.kwargs and op_name(node) != "gelu":
        name = "general"
    if prelu and math.prod(shape(arguments(node)[1])) > 1:
        slope, name = tracer.tensors.get(arguments(node)[1]), "general"
        if 1 in flow and slope is not None:
            tracer.pass_through(flow[1], [Slot(slope, 0, flow[1].inner)])
        elif 1 in flow:
            tracer.pin(flow[1], f"{tracer.where(node)} has slopes that are computed in forward()")
    tracer.flows[node] = {
        dim: replace(axis, neuron=name if axis.neuron == "linear" and not axis.max_pooled else "general")
        for dim, axis in flow.items()
    }


@rule(*IDENTITY)
def identity(tracer: Tracer, node: Node) -> None:
    tracer.flows[node] = dict(tracer.flow(arguments(node)[0]))


def columns_of(weight: str, producers: list[Slot]) -> str:
    """How `layer_slots` names the columns of a weight whose rows are `producers`."""
    first = producers[0].tensor
    return first if first.endswith(".original") else weight


@rule(*POOLING)
def pooling(tracer: Tracer, node: Node) -> None:
    """Pooling works on each channel alone; its spatial dimensions must not hold channels."""
    kept = len(shape(arguments(node)[0])) - int(op_name(node).split("pool")[1][0])
    flow: Flow = {}
    for dim, axis in tracer.flow(arguments(node)[0]).items():
        if dim >= kept:
            tracer.pin(axis, f"{tracer.where(node)} pools over them")
        else:
            flow[dim] = replace(
                axis, max_pooled=axis.max_pooled or "max_pool" in op_name(node), padded=axis.padded or pads_zeros(node)
            )
    outputs = node.meta["val"]
    tracer.flows[node] = [flow] * len(outputs) if isinstance(outputs, list | tuple) else flow


def pads_zeros(node: Node) -> bool:
    padding = argument(node, 3, "padding", 0) if op_name(node).startswith("avg_pool") else 0
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


@rule("pad")
def pad(tracer: Tracer, node: Node) -> None:
    """Padding by reflection and the like keeps channels what they are; constants can't be folded across others."""
    padded, flow = range(len(shape(node)) - len(arguments(node)[1]) // 2, len(shape(node))), {}
    constant = argument(node, 2, "mode", "constant") == "constant"
    for dim, axis in tracer.flow(arguments(node)[0]).items():
        if dim in padded:
            tracer.pin(axis, f"{tracer.where(node)} pads along them")
        else:
            flow[dim] = replace(axis, neuron="general", padded=True) if constant else axis
    tracer.flows[node] = flow


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
def reshape(tracer: Tracer, node: Node) -> None:
    """A channel dimension may absorb the dimensions inside it (flatten), or give them back (unflatten)."""
    flow: Flow = {}
    for dim, axis in tracer.flow(arguments(node)[0]).items():
        target = regroup(shape(arguments(node)[0]), shape(node), dim, axis, tracer.draft(axis).width)
        if target is None:
            tracer.pin(axis, f"{tracer.where(node)} mixes them with another dimension")
        else:
            if target[0] in flow:
                tracer.pin_flow({0: axis, 1: flow[target[0]]}, f"{tracer.where(node)} mixes them with other channels")
            flow[target[0]] = replace(axis, inner=target[1])
    tracer.flows[node] = flow


def regroup(old: tuple[int, ...], new: tuple[int, ...], dim: int, axis: Axis, width: int) -> tuple[int, int] | None:
    """Where the channels of `old[dim]` lie in shape `new`: (dim, inner), or None if they don't stay together."""
    outer, i = math.prod(old[:dim]), 0
    while i < len(new) and math.prod(new[: i + 1]) <= outer:
        i += 1
    if i == len(new) or math.prod(new[:i]) != outer or new[i] % width:
        return None
    inner, block = new[i] // width, axis.inner * math.prod(old[dim + 1 :])
    return (i, inner) if inner * math.prod(new[i + 1 :]) == block else None


@rule("transpose", "permute", "t", "numpy_T", "movedim", "swapaxes")
def permute(tracer: Tracer, node: Node) -> None:
    flow, ndim = tracer.flow(arguments(node)[0]), len(shape(node))
    order = list(range(ndim))
    if op_name(node) == "permute":
        order = [dim % ndim for dim in arguments(node)[1]]
    elif op_name(node) in ("transpose", "swapaxes"):
        a, b = (dim % ndim for dim in arguments(node)[1:3])
        order[a], order[b] = order[b], order[a]
    elif op_name(node) in ("t", "numpy_T"):
        order.reverse()
    elif flow:
        tracer.pin_flow(flow, f"{tracer.where(node)} has no rule")
        return
    tracer.flows[node] = {order.index(dim): axis for dim, axis in flow.items()}


@rule("mean", "sum", "amax")
def reduction(tracer: Tracer, node: Node) -> None:
    flow, ndim = tracer.flow(arguments(node)[0]), len(shape(arguments(node)[0]))
    dims = argument(node, 1, "dim")
    reduced = {d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim))}
    keepdim = argument(node, 2, "keepdim", False)
    result: Flow = {}
    for dim, axis in flow.items():
        if dim in reduced:
            tracer.pin(axis, f"{tracer.where(node)} sums over them")
        else:
            target = dim if keepdim else dim - sum(d < dim for d in reduced)
            result[target] = replace(axis, max_pooled=axis.max_pooled or op_name(node) == "amax")
    tracer.flows[node] = result


@rule("softmax", "log_softmax", "_softmax", "_log_softmax")
def softmax(tracer: Tracer, node: Node) -> None:
    flow = dict(tracer.flow(arguments(node)[0]))
    dim = arguments(node)[1] % len(shape(node))
    if dim in flow:
        tracer.pin(flow.pop(dim), f"{tracer.where(node)} normalises over them")
    tracer.flows[node] = {d: replace(axis, neuron="general") for d, axis in flow.items()}


@rule(*CONSTANT_OPS)
def arithmetic(tracer: Tracer, node: Node) -> None:
    """Elementwise with a number, a per-channel parameter, or another tensor with the same channels."""
    operands = nodes_of(node)
    result: Flow = {}
    for operand in operands:
        offset = len(shape(node)) - len(shape(operand))
        for dim, axis in tracer.flow(operand).items():
            target = dim + offset
            if target in result:
                result[target] = tracer.unite(result[target], axis, f"{tracer.where(node)} joins unlike channels")
            else:
                result[target] = axis
    for operand in operands:
        meet(tracer, node, operand, result)
    if op_name(node) not in ("add", "sub") or len(operands) != 2 or not all(map(tracer.flow, operands)):
        result = {dim: replace(axis, neuron="general") for dim, axis in result.items()}
    tracer.flows[node] = result


def nodes_of(node: Node) -> list[Node]:
    """The tensors that an elementwise op takes, as often as it takes them."""
    return [arg for arg in (*arguments(node), *node.kwargs.values()) if isinstance(arg, Node)]


def meet(tracer: Tracer, node: Node, operand: Node, result: Flow) -> None:
    """An operand without channels must be constant over them, or be a parameter with one entry a channel."""
    sizes, offset = shape(operand), len(shape(node)) - len(shape(operand))
    for dim, axis in result.items():
        own = dim - offset
        if own < 0 or sizes[own] == 1 or own in tracer.flow(operand):
            continue
        if operand in tracer.tensors:
            tracer.pass_through(axis, [Slot(tracer.tensors[operand], own, axis.inner)])
        else:
            tracer.pin(axis, f"{tracer.where(node)} combines them with a tensor that apoptosis doesn't follow")
