"""Ops on the positions of each channel: pooling, padding, resizing, reductions."""

from dataclasses import replace

from torch.fx import Node

from ..labels import line
from ..nodes import argument, arguments, op_name, shape
from ..tracer import GATES, Tracer, rule

POOLING = (
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool1d",
    "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices", "_adaptive_avg_pool2d",
)  # fmt: skip
RESIZING = {
    "upsample_nearest1d": 1, "upsample_nearest2d": 2, "upsample_nearest3d": 3, "upsample_linear1d": 1,
    "upsample_bilinear2d": 2, "upsample_bicubic2d": 2, "upsample_trilinear3d": 3, "_upsample_nearest_exact1d": 1,
    "_upsample_nearest_exact2d": 2, "_upsample_bilinear2d_aa": 2, "_upsample_bicubic2d_aa": 2,
    "_upsample_nearest_exact3d": 3,
}  # fmt: skip


@rule(*POOLING, *RESIZING)
def pooling(tracer: Tracer, node: Node) -> None:
    """Works on each channel alone; the spatial dimensions must not hold channels."""
    name, x = op_name(node), arguments(node)[0]
    pools = name not in RESIZING
    kept = len(shape(x)) - (int(name.split("pool")[1][0]) if pools else RESIZING[name])
    fields = []
    for each in tracer.flow(x):
        if any(dim >= kept for dim in each.dims):
            tracer.pin(each.labels, f"{tracer.where(node)} {'pools' if pools else 'resizes'} over them")
        else:
            maximum = each.max_pooled or "max_pool" in name
            fields.append(replace(each, max_pooled=maximum, padded=each.padded or _pads_zeros(node)))
    outputs = node.meta["val"]
    tracer.flows[node] = [tuple(fields)] * len(outputs) if isinstance(outputs, list | tuple) else tuple(fields)


def _pads_zeros(node: Node) -> bool:
    padding = argument(node, 3, "padding", 0) if op_name(node).startswith("avg_pool") else 0
    return any(padding) if isinstance(padding, list | tuple) else bool(padding)


@rule("pad", "constant_pad_nd")
def pad(tracer: Tracer, node: Node) -> None:
    """Padding by reflection and the like keeps channels what they are; constants can't be folded across others."""
    amounts = arguments(node)[1]
    padded = {len(shape(node)) - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    constant = op_name(node) == "constant_pad_nd" or argument(node, 2, "mode", "constant") == "constant"
    fields = []
    for each in tracer.flow(arguments(node)[0]):
        if padded & set(each.dims):
            tracer.pin(each.labels, f"{tracer.where(node)} pads along them")
        else:
            fields.append(replace(each, neuron="general", padded=True) if constant and padded else each)
    tracer.emit(node, fields)


@rule("mean", "sum", "amax", "amin", "max", "min", "std", "var", "any", "all", "linalg_vector_norm", "prod")
def reduction(tracer: Tracer, node: Node) -> None:
    """Blocks that are summed over (heads) have the same channels; a sum over the channels themselves pins them."""
    x = arguments(node)[0]
    ndim, index = len(shape(x)), 2 if op_name(node) == "linalg_vector_norm" else 1
    dims = argument(node, index, "dim")
    if len(arguments(node)) > 1 and isinstance(arguments(node)[1], Node):  # max of two tensors
        tracer.pin_flow((*tracer.flow(x), *tracer.flow(arguments(node)[1])), f"{tracer.where(node)} has no rule")
        return
    reduced = {d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim))}
    sizes = node.meta["val"][0].shape if isinstance(node.meta["val"], list | tuple) else shape(node)
    keepdim, fields = len(sizes) == ndim, []
    for each in tracer.flow(x):
        over = [dim for dim in each.dims if dim in reduced]
        if op_name(node) == "sum" and each.neuron in GATES and len(each.dims) == 1 and over:
            continue
        if (each.dims and each.dims[-1] in reduced) or not set(each.dims) - reduced:
            tracer.pin(each.labels, f"{tracer.where(node)} sums over them")
            continue
        labels = each.labels
        for dim in over:
            rows = line(labels.transpose(dim, 0).movedim(0, -1), labels.ndim - 1).T  # one row for each block
            tracer.unite(rows[:1], rows[1:], f"{tracer.where(node)} sums over them")
            labels = labels.narrow(dim, 0, 1)
        if not keepdim:
            labels = labels[tuple(0 if d in reduced else slice(None) for d in range(ndim))]
        same = op_name(node) in ("mean", "sum", "amax") and not over
        maximum = each.max_pooled or op_name(node) in ("amax", "max")
        fields.append(replace(each, labels=labels, max_pooled=maximum, neuron=each.neuron if same else "general"))
    outputs = node.meta["val"]
    flow = tracer.fields(fields)
    tracer.flows[node] = [flow] * len(outputs) if isinstance(outputs, list | tuple) else flow
