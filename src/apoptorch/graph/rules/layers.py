"""Layers: linear, convolution, embedding."""

import math
from dataclasses import replace
from typing import Any

from torch import nn
from torch.fx import Node

from ..labels import Field, along
from ..nodes import argument, arguments, place_in_stack, shape
from ..tracer import Product, Tracer, rule

Place = tuple[str, int, int]  # tensor, dimension, entries for each column


def layer_slots(tracer: Tracer, name: str, dim: int) -> tuple[list[Place], str | None]:
    """Where channels lie in a weight, parametrized or not; and why it can't be narrowed, if it can't.

    weight_norm (dim 0): its magnitudes follow the rows, its directions both. spectral_norm: so do its two singular
    vectors; the largest singular value may change with the channels, which the guard measures.
    """
    path, _, attribute = name.rpartition(".")
    module = tracer.model.get_submodule(path)
    if not nn.utils.parametrize.is_parametrized(module, attribute):
        return [(name, dim, 1)], None
    chain = list(module.parametrizations[attribute])  # type: ignore[index]
    prefix = f"{path}.parametrizations.{attribute}".lstrip(".")
    kind = type(chain[0]).__name__ if len(chain) == 1 else "several"
    if kind == "_WeightNorm" and chain[0].dim == 0:
        return ([(f"{prefix}.original0", 0, 1), (f"{prefix}.original1", 0, 1)] if dim == 0 else [(name, dim, 1)]), None
    if kind == "_SpectralNorm" and chain[0].dim == 0:
        weight = (f"{prefix}.original", dim, 1)
        if chain[0]._u is None:  # type: ignore[union-attr] - a vector: normalised directly, without buffers
            return [weight], None
        taps = math.prod(module.parametrizations[attribute].original.shape[2:])  # type: ignore[index]
        return [weight, (f"{prefix}.0._u", 0, 1) if dim == 0 else (f"{prefix}.0._v", 0, taps)], None
    return [(name, dim, 1)], f"{name} has a parametrization ({kind}) for which there is no rule"


def layer(
    tracer: Tracer, node: Node, dim: int, out_dim: int, *, rows: int, exact: bool, positions: int, groups: int = 1
) -> None:
    """The input's channels at `dim` are read by a weight's columns, its rows (dimension `rows`) make those at
    `out_dim`. `exact`: a constant input gives a constant output. `groups` of a convolution have columns of their own.

    A weight may be one of several in one parameter (experts): all have the same channels for now (`by_expert`), and no
    bias takes a constant.
    """
    x, weight_node, bias_node = arguments(node)[0], arguments(node)[1], argument(node, 2, "bias")
    (weight, stacked), (bias, biases) = tracer.part(weight_node), tracer.part(bias_node)
    unlike = stacked and (groups > 1 or len(shape(weight_node)) < 2)  # parts with parts of their own, vectors
    if weight is None or (bias_node is not None and bias is None) or unlike:
        flows = [each for used in (x, weight_node, bias_node) for each in tracer.flow(used)]
        tracer.pin_flow(flows, f"{tracer.where(node)} reads them with a weight that is computed in forward()")
        for each in tracer.flow(weight_node):
            if each.dims == (rows,):
                tracer.made_by_product(each.labels)
        return
    exact = exact and not stacked and not biases
    if stacked:
        chosen = (place_in_stack(weight_node), None)
        alike = (bias,) if bias and biases and place_in_stack(bias_node) == chosen[0] else ()
        tracer.products[node] = Product(x, (weight, *alike), {0: (chosen, chosen)})
    rest = [each for each in tracer.flow(x) if dim not in each.dims]
    read = tracer.read(x, dim, node)
    sizes = shape(weight_node)
    tracer.uses.setdefault(bias, set()).add(weight)
    (slots, reason), (columns, _) = (layer_slots(tracer, weight, side + stacked) for side in (rows, 1 - rows))
    makers = [place[:2] for place in slots] + ([(bias, biases)] if bias else [])
    made = tracer.produce(sizes[rows], makers, node)
    split = (rows if rows == 0 else 1 - rows, groups) if groups > 1 and rows == 0 else None
    if read is not None:
        tracer.consume(columns[0][0], columns[0][1], read, bias if exact and not read.padded else None, split)
        for tensor, _, inner in columns[1:]:
            tracer.record(tensor, 0, read.labels.repeat_interleave(inner))
    else:
        tracer.also_reads[columns[0][0]] = tracer.where(node)
    if reason is not None:
        tracer.pin(made, reason)
        if read is not None:
            tracer.pin(read.labels, reason)
    if groups > 1:
        for labels in (made, *([read.labels] if read else [])):
            tracer.rows.append((labels.view(groups, -1), tracer.where(node)))
    if groups > 1 and read is not None:  # with one channel a group, it would be a depthwise convolution
        tracer.multiples.append((read.labels, 2))
        if len(read.labels) == 2 * groups:
            tracer.pin(read.labels, f"{tracer.where(node)} has two of them in each of its {groups} groups, the fewest")
    tracer.cost(math.prod(sizes), positions, made, None if read is None else read.labels)
    field = Field(along(made, out_dim, len(shape(node))))
    tracer.emit(node, [*(replace(each, neuron="general") for each in rest), field])


@rule("linear")
def linear(tracer: Tracer, node: Node) -> None:
    last = len(shape(node)) - 1
    layer(tracer, node, last, last, rows=0, exact=True, positions=math.prod(shape(node)[:-1]))


@rule("conv1d", "conv2d", "conv3d")
def convolution(tracer: Tracer, node: Node) -> None:
    groups = argument(node, 6, "groups", 1)
    dim = len(shape(node)) - (len(shape(arguments(node)[1])) - 1)  # 0 without a batch dimension
    _no_channels_beyond(tracer, node, dim)
    positions = math.prod(shape(node)) // shape(node)[dim]
    if groups > 1 and shape(arguments(node)[1])[1] == 1:
        depthwise(tracer, node, dim, positions, 0)
        return
    layer(tracer, node, dim, dim, rows=0, exact=not _pads(argument(node, 4, "padding", 0)), positions=positions,
          groups=groups)  # fmt: skip


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(tracer: Tracer, node: Node) -> None:
    """Border pixels see fewer taps: a constant is exact for a kernel of one pixel only."""
    groups = argument(node, 6, "groups", 1)
    sizes = shape(arguments(node)[1])
    dim = len(shape(node)) - (len(sizes) - 1)
    _no_channels_beyond(tracer, node, dim)
    positions = math.prod(shape(arguments(node)[0])) // shape(arguments(node)[0])[dim]
    single = math.prod(sizes[2:]) == 1 and not _pads(argument(node, 4, "padding", 0)) and max(_strides(node)) == 1
    if groups > 1 and sizes[0] == groups and sizes[1] == 1:
        depthwise(tracer, node, dim, positions, 0)
    elif groups > 1:
        tracer.pin_flow(tracer.flow(arguments(node)[0]), f"{tracer.where(node)} is a grouped transposed convolution")
    else:
        layer(tracer, node, dim, dim, rows=1, exact=single, positions=positions)


def depthwise(tracer: Tracer, node: Node, dim: int, positions: int, rows: int) -> None:
    """Every channel makes as many as it has filters; they go together."""
    x, weight_node, bias_node = arguments(node)[0], arguments(node)[1], argument(node, 2, "bias")
    weight, bias = tracer.tensors.get(weight_node), tracer.tensors.get(bias_node)
    read = tracer.read(x, dim, node)
    if weight is None or (bias_node is not None and bias is None):
        tracer.pin_flow(tracer.flow(x), f"{tracer.where(node)} reads them with a weight that is computed in forward()")
        return
    sizes = shape(weight_node)
    if read is None:  # filters of what is no channel
        tracer.also_reads[weight] = tracer.where(node)
        labels = tracer.produce(sizes[rows], [(weight, rows)] + ([(bias, 0)] if bias else []), node)
        tracer.pin(labels, f"{tracer.where(node)} makes one of each of its inputs")
        read = Field(labels)
    else:
        each = sizes[rows] // len(read.labels)
        labels = read.labels.repeat_interleave(each)
        tracer.record(weight, rows, labels)
        if bias:
            tracer.record(bias, 0, labels)
    tracer.cost(math.prod(sizes), positions, labels, None)
    field = replace(read, labels=along(labels, dim, len(shape(node))), neuron="general")
    tracer.emit(node, [field, *(f for f in tracer.flow(x) if dim not in f.dims)])


def _no_channels_beyond(tracer: Tracer, node: Node, dim: int) -> None:
    for each in tracer.flow(arguments(node)[0]):
        if any(other > dim for other in each.dims) and dim not in each.dims:
            tracer.pin(each.labels, f"{tracer.where(node)} slides along them")


def _pads(padding: Any) -> bool:
    return padding not in (0, "valid") and any(padding if isinstance(padding, list | tuple) else [padding])


def _strides(node: Node) -> list[int]:
    stride = argument(node, 3, "stride", 1)
    return list(stride) if isinstance(stride, list | tuple) else [stride]


@rule("embedding")
def embedding(tracer: Tracer, node: Node) -> None:
    """Each entry of a table's rows is a channel."""
    table = tracer.tensor(arguments(node)[0])
    if table is None or table not in tracer.tensors.values():
        tracer.pin_flow(tracer.flow(arguments(node)[0]), f"{tracer.where(node)} looks up a table that is computed")
        return
    last = len(shape(node)) - 1
    made = tracer.produce(shape(node)[-1], [(table, 1)], node)
    tracer.emit(node, [Field(along(made, last, last + 1), neuron="general")])
