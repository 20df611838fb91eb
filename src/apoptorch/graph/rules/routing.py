"""Ops along one dimension: softmax, and what chooses experts by it. A router's channels are its experts.

Without expert e the router's softmax is what it was with a logit of -inf there: 0 for e, the others rescaled. So its
channels pass a softmax, and the choice of the largest, if what follows are experts (`experts.whole`): `tracer.gates`
keeps the reasons for which they are pinned otherwise. Channels that are 0 where e isn't chosen have a neuron type of
`GATES`; they may be summed over, as they are then in what e has no part in.
"""

from dataclasses import replace

import torch
from torch.fx import Node

from ..labels import Array, Field, along
from ..nodes import argument, arguments, op_name, shape
from ..tracer import GATES, SHARES, Tracer, rule

_COUNTS, _ENDS = "counts", "ends"  # neuron types: how many rows each expert has, and where they end
_SOFTMAX = ("softmax", "_softmax")


@rule(*_SOFTMAX, "log_softmax", "_log_softmax", "logsumexp", "cumsum", "cumprod", "argmax", "sort", "topk")
def along_one_dimension(tracer: Tracer, node: Node) -> None:
    """Ops that mix one dimension and leave the others what they are."""
    x = arguments(node)[0]
    default = {"topk": -1, "sort": -1}.get(op_name(node))
    dim = argument(node, 2 if op_name(node) == "topk" else 1, "dim", default)
    dims = [dim] if isinstance(dim, int) else dim or range(len(shape(x)))
    mixed = {d % len(shape(x)) for d in dims}
    kept, numbers = list[Field](), None
    for each in tracer.flow(x):
        if not mixed & set(each.dims):
            kept.append(replace(each, neuron="general"))
        elif op_name(node) == "cumsum" and each.neuron == _COUNTS:
            kept.append(replace(each, neuron=_ENDS))
        elif each.dims == tuple(mixed) and op_name(node) in (*_SOFTMAX, "topk"):
            numbers = _gate(tracer, node, each)
            kept += [replace(each, neuron=SHARES)] if numbers is None else []
        else:
            tracer.pin(each.labels, f"{tracer.where(node)} {_what(node)} them")
    value = node.meta["val"]
    if not isinstance(value, torch.Tensor):
        if op_name(node) == "sort":  # of numbers: their order doesn't change where one is missing
            numbers = tracer.chosen.get(x, (None,))[0]
        tracer.chosen[node] = (numbers, None) if op_name(node) == "sort" else (None, numbers)
        tracer.flows[node] = [tuple(kept)] * len(value)
    elif len(shape(node)) != len(shape(x)):
        tracer.pin_flow(kept, f"{tracer.where(node)} has no rule for a dimension that goes")
    else:
        tracer.emit(node, kept)


def _what(node: Node) -> str:
    return "has no rule for them along" if op_name(node) in ("sort", "topk", "cumsum", "cumprod") else "normalises over"


def _gate(tracer: Tracer, node: Node, each: Field) -> Array | None:
    """Notes a softmax, or a choice of the largest, of all channels along a dimension; the channels if they are chosen
    from."""
    chosen = argument(node, 1, "k") if op_name(node) == "topk" else 0
    plain = each.neuron in ("linear", SHARES) if chosen else each.neuron == "linear"
    told = plain and argument(node, 3, "largest", True) and bool((each.labels >= 0).all())
    tracer.gates.append((each.labels.flatten(), f"{tracer.where(node)} {_what(node)} them", chosen if told else None))
    return each.labels.flatten() if chosen else None


@rule("histc")
def count(tracer: Tracer, node: Node) -> None:
    """How often each number occurs, of numbers of experts."""
    labels = tracer.chosen.get(arguments(node)[0], (None,))[0]
    bins, first, last = (argument(node, i, name) for i, name in ((1, "bins"), (2, "min"), (3, "max")))
    if labels is not None and (bins, first) == (len(labels), 0) and last in (len(labels) - 1, len(labels)):
        tracer.emit(node, [Field(labels, _COUNTS)])
        return
    flow = (*tracer.flow(arguments(node)[0]), *_numbered(tracer, arguments(node)[0]))
    tracer.pin_flow(flow, f"{tracer.where(node)} has no rule that says what becomes of the channels")


@rule("one_hot", "scatter")
def spread(tracer: Tracer, node: Node) -> None:
    """What is 0 but at the numbers of experts."""
    x, hot = arguments(node)[0], op_name(node) == "one_hot"
    index, dim = (x, -1) if hot else (argument(node, 2, "index"), argument(node, 1, "dim"))
    others = [used for used in node.all_input_nodes if used is not index and (hot or used is not x)]
    base, labels = () if hot else tracer.flow(x), tracer.chosen.get(index, (None,))[0]
    flows = [*base, *(each for used in others for each in (*tracer.flow(used), *_numbered(tracer, used)))]
    zeros = hot or (op_name(x) in ("zeros_like", "zeros", "new_zeros") and len(x.users) == 1 and not node.kwargs)
    dim %= len(shape(node))
    alone = zeros and len(flows) == len(base) and all(each.dims == (dim,) for each in base)
    if labels is None or not alone or shape(node)[dim] != len(labels):
        reason = f"{tracer.where(node)} has no rule that says what becomes of the channels"
        tracer.pin_flow([*flows, *_numbered(tracer, index)], reason)
        return
    made = Field(along(labels, dim, len(shape(node))))
    tracer.emit(node, [replace(each, neuron=GATES[1]) for each in tracer.join(node, [*base, made])])


def _numbered(tracer: Tracer, node: Node) -> list[Field]:
    return [Field(labels) for labels in tracer.chosen.get(node, ())[:1] if labels is not None]


def ends(tracer: Tracer, node: Node) -> Array | None:
    """The experts to which a product by groups gives rows, if they are counted by their numbers."""
    found = [each for each in tracer.known(node) if each.neuron == _ENDS and each.dims == (0,)]
    return found[0].labels if len(found) == 1 else None
