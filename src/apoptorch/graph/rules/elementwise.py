"""Elementwise ops, arithmetic of several tensors."""

import math
from dataclasses import replace

from torch.fx import Node

from ..labels import Field, widened
from ..nodes import arguments, nodes_of, op_name, shape
from ..tracer import GATES, Tracer, rule

POINTWISE = (
    "relu", "relu6", "leaky_relu", "prelu", "rrelu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid", "tanh",
    "softplus", "hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "log_sigmoid", "threshold", "clamp",
    "clamp_min", "clamp_max", "abs", "exp", "log", "log1p", "expm1", "sqrt", "rsqrt", "square", "sin", "cos", "erf",
    "reciprocal", "neg", "pow",
)  # fmt: skip
IDENTITY = (
    "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout", "clone", "contiguous",
    "detach", "alias", "lift_fresh_copy", "to", "_to_copy", "type_as", "_assert_tensor_metadata", "float", "half",
    "nan_to_num",
)  # fmt: skip
CONSTANT_OPS = ("add", "sub", "rsub", "mul", "div")
JOINS = (
    "maximum", "minimum", "where", "masked_fill", "lerp", "addcmul", "addcdiv", "true_divide", "floor_divide",
    "logical_and", "logical_or", "logical_not", "eq", "ne", "lt", "le", "gt", "ge", "fmod", "remainder", "atan2",
    "bitwise_not", "bitwise_and", "sign", "floor", "round", "ceil", "isnan", "isinf", "logical_xor", "zeros_like",
    "ones_like", "full_like", "rand_like", "randn_like", "bernoulli", "log2", "exp2", "tan", "cosh", "sinh", "copy",
)  # fmt: skip


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
    flow, name = tracer.flow(arguments(node)[0]), neuron_name(node)
    if node.kwargs and op_name(node) != "gelu":
        name = "general"
    if prelu and math.prod(shape(arguments(node)[1])) > 1:
        name, slope = "general", tracer.tensors.get(arguments(node)[1])
        read = tracer.read(arguments(node)[0], 1, node)
        if read is not None and slope is not None:
            tracer.record(slope, 0, read.labels)
        elif read is not None:
            tracer.pin(read.labels, f"{tracer.where(node)} has slopes that are computed in forward()")
    elif prelu:
        tracer.claimed.add(tracer.tensors.get(arguments(node)[1], ""))
    tracer.emit(
        node, (replace(f, neuron=name if f.neuron == "linear" and not f.max_pooled else "general") for f in flow)
    )


@rule(*IDENTITY)
def identity(tracer: Tracer, node: Node) -> None:
    flow = tracer.flow(arguments(node)[0])
    several = isinstance(node.meta.get("val"), list | tuple)
    tracer.flows[node] = [flow] * len(node.meta["val"]) if several else flow


@rule(*CONSTANT_OPS, *JOINS)
def arithmetic(tracer: Tracer, node: Node) -> None:
    """Elementwise with a number, a per-channel parameter, or another tensor with the same channels."""
    operands, ndim = nodes_of(node), len(shape(node))
    fields, own = [], []
    for operand in operands:
        placed = [_at(each, ndim) for each in tracer.flow(operand)]
        (own if operand in tracer.tensors else fields).extend(placed)
    gates = {"mul": operands, "div": operands[:1]}.get(op_name(node), [])  # 0 stays 0
    gated = {_at(each, ndim).dims for used in gates for each in tracer.flow(used) if each.neuron in GATES}
    fields += _of_parameters(tracer, node, own, fields)
    joined = tracer.join(node, fields)
    for each in joined:
        for operand in operands:
            meet(tracer, node, operand, each)
    both = [operand for operand in operands if tracer.flow(operand)]
    if op_name(node) not in ("add", "sub") or len(operands) != 2 or len(both) != 2:
        joined = [replace(each, neuron=GATES[1] if each.dims in gated else "general") for each in joined]
    tracer.emit(node, joined)


def _of_parameters(tracer: Tracer, node: Node, own: list[Field], fields: list[Field]) -> list[Field]:
    """Those that lie along channels; other dimensions of a parameter are positions and keep their size."""
    channels = {dim for each in fields for dim in each.dims}
    others = [operand for operand in nodes_of(node) if operand not in tracer.tensors]
    made = [dim for dim in range(len(shape(node))) if all(_size(other, dim, node) == 1 for other in others)]
    kept = [each for each in own if channels.union(made) & set(each.dims)]
    lost = [each for each in own if not channels.union(made) & set(each.dims)]
    tracer.pin_flow(lost, f"{tracer.where(node)} uses them for positions")
    return kept


def _size(operand: Node, dim: int, node: Node) -> int:
    own = dim - len(shape(node)) + len(shape(operand))
    return shape(operand)[own] if own >= 0 else 1


def _at(field: Field, ndim: int) -> Field:
    """The field of an operand that is broadcast to `ndim` dimensions."""
    return replace(field, labels=field.labels[(None,) * (ndim - field.labels.ndim)])


def meet(tracer: Tracer, node: Node, operand: Node, field: Field) -> None:
    """An operand without channels must be the same for all of a block's."""
    offset = len(shape(node)) - len(shape(operand))
    own = {dim + offset for each in tracer.flow(operand) for dim in each.dims}
    sizes = (1,) * offset + shape(operand)
    open_dims = [dim for dim in field.dims if sizes[dim] > 1 and dim not in own]
    if field.dims and field.dims[-1] in open_dims:
        tracer.pin(field.labels, f"{tracer.where(node)} combines them with a tensor that apoptosis doesn't follow")
    elif open_dims:
        last = field.dims[-1]
        wide = widened(field.labels, shape(node), tuple(open_dims))
        tracer.rows.append((wide.movedim(last, -1).reshape(-1, wide.shape[last]), tracer.where(node)))
