"""Recurrent layers: a hidden unit has a row in every gate, and the same number of units in all layers."""

import math

from torch.fx import Node

from ..labels import Field, along
from ..nodes import arguments, op_name, shape
from ..tracer import Tracer, rule

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule(*_GATES)
def recurrent(tracer: Tracer, node: Node) -> None:
    """Unit c of all layers and directions is one channel, since the module has one hidden size."""
    if getattr(node.target, "_overloadname", "") != "input":
        _pin(tracer, node, "has no rule for packed sequences")
        return
    x, _, weights, biased, layers, _, _, bidirectional, _ = arguments(node)
    directions, each = 2 if bidirectional else 1, 4 if biased else 2
    names = [tracer.tensors.get(weight) for weight in weights]
    if len(names) != layers * directions * each or None in names:
        _pin(tracer, node, "has no rule for projections and computed weights")
        return
    units, gates = shape(weights[1])[1], _GATES[op_name(node)]
    known = tracer.records.get((names[1] or "", 1, None))
    labels = tracer.channels.new(units) if known is None else known.labels
    if known is None:
        tracer.names[int(labels[0])] = tracer.path(node) or (names[1] or "").rpartition(".")[0]
    read = tracer.read(x, 2, node)
    positions = math.prod(shape(x)[:2])
    for i in range(layers * directions):
        own = [name or "" for name in names[i * each : (i + 1) * each]]
        for name in own:
            tracer.record(name, 0, labels.repeat(gates), "producer")
            tracer.makers.append((labels, name))
        below = read if i < directions else Field(labels.repeat(directions), "general")
        if below is not None:
            tracer.consume(own[0], 1, below, None)
        else:
            tracer.also_reads[own[0]] = tracer.where(node)
        tracer.consume(own[1], 1, Field(labels, "general"), None)
        for weight, columns in ((i * each, None if below is None else below.labels), (i * each + 1, labels)):
            tracer.cost(math.prod(shape(weights[weight])), positions, labels, columns)
    tracer.general.append(labels)
    output = (Field(along(labels.repeat(directions), 2, 3), "general"),)
    state = (Field(along(labels, 2, 3), "general"),)
    tracer.flows[node] = [output, *[state] * (len(node.meta["val"]) - 1)]


def _pin(tracer: Tracer, node: Node, why: str) -> None:
    flows = [each for used in node.all_input_nodes for each in tracer.flow(used)]
    tracer.pin_flow(flows, f"{tracer.where(node)} {why}")
