"""Normalisation. A norm that mixes channels pins them: what it gives to one depends on all."""

from dataclasses import replace

from torch.fx import Node

from ..nodes import argument, arguments, shape
from ..tracer import Tracer, rule


@rule("batch_norm", "instance_norm")
def channel_norm(tracer: Tracer, node: Node) -> None:
    """Scale and statistics lie along dimension 1. Only an affine norm leaves neurons that can be scaled."""
    x = arguments(node)[0]
    given = [arg for arg in arguments(node)[1:5] if arg is not None]
    names = [tracer.tensors[arg] for arg in given if arg in tracer.tensors]
    kept = [each for each in tracer.flow(x) if 1 in each.dims]
    for each in tracer.flow(x):
        if 1 not in each.dims:
            tracer.pin(each.labels, f"{tracer.where(node)} normalises over them")
    read = tracer.read(x, 1, node)
    if read is not None:
        if len(names) < len(given):
            tracer.pin(read.labels, f"{tracer.where(node)} uses parameters that are computed in forward()")
        tracer.pass_through(read.labels, names)
    else:
        tracer.used_by.update({name: tracer.where(node) for name in names})
        tracer.claimed |= set(names)
    affine = arguments(node)[1] is not None
    tracer.emit(
        node, (each if each.neuron == "linear" and affine else replace(each, neuron="general") for each in kept)
    )


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def layer_norm(tracer: Tracer, node: Node) -> None:
    x, sizes = arguments(node)[0], arguments(node)[1]
    mixed = set(range(len(shape(x)) - len(sizes), len(shape(x))))
    kept = []
    for each in tracer.flow(x):
        if mixed & set(each.dims):
            tracer.pin(each.labels, f"{tracer.where(node)} normalises over them: what it gives to one depends on all")
        else:
            kept.append(replace(each, neuron="general"))
    tracer.claimed |= {tracer.tensors[arg] for arg in arguments(node)[2:] if arg in tracer.tensors}
    several = isinstance(node.meta["val"], list | tuple)
    tracer.flows[node] = [tuple(kept)] * len(node.meta["val"]) if several else tuple(kept)


@rule("group_norm")
def group_norm(tracer: Tracer, node: Node) -> None:
    x, groups = arguments(node)[0], arguments(node)[1]
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    tracer.claimed |= {tracer.tensors[arg] for arg in (weight, bias) if arg in tracer.tensors}
    for each in tracer.flow(x):
        if groups != shape(x)[1] or each.dims != (1,):
            tracer.pin(each.labels, f"{tracer.where(node)} normalises over them: what it gives to one depends on all")
    if groups == shape(x)[1]:
        read = tracer.read(x, 1, node)
        if read is not None:
            tracer.pass_through(read.labels, [tracer.tensors[arg] for arg in (weight, bias) if arg in tracer.tensors])
        tracer.emit(node, (replace(each, neuron="general") for each in tracer.flow(x)))
