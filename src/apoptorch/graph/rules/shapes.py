"""Ops that move entries: labels are moved by the same op."""

from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from ..labels import Field, compact, reshaped, widened
from ..nodes import argument, arguments, op_name, shape
from ..tracer import Tracer, rule

RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as")


@rule(*RESHAPES)
def reshape(tracer: Tracer, node: Node) -> None:
    old, new = shape(arguments(node)[0]), shape(node)
    fields = []
    for each in tracer.flow(arguments(node)[0]):
        labels, rows = reshaped(each.labels, old, new)
        tracer.rows += [(split, tracer.where(node)) for split in rows]
        fields.append(replace(each, labels=labels))
    _apart(tracer, node, fields)
    tracer.emit(node, fields)


def _apart(tracer: Tracer, node: Node, fields: list[Field]) -> None:
    """Channels of two kinds along one dimension are mixed for good."""
    for i, one in enumerate(fields):
        for other in fields[:i]:
            if set(one.dims) & set(other.dims):
                tracer.pin_flow([one, other], f"{tracer.where(node)} mixes them with other channels")


@rule("permute", "transpose", "t", "numpy_T", "movedim", "swapaxes", "swapdims", "moveaxis", "unsqueeze", "squeeze",
      "select", "slice", "narrow", "unbind", "split", "split_with_sizes", "chunk", "tensor_split", "expand",
      "expand_as", "broadcast_to", "mT", "adjoint", "matrix_H")  # fmt: skip
def view(tracer: Tracer, node: Node) -> None:
    """The op acts on the labels, at the activation's size but without any memory."""
    x, outputs = arguments(node)[0], node.meta["val"]
    several = isinstance(outputs, list | tuple)
    flows: list[list[Field]] = [[] for _ in (outputs if several else [outputs])]
    for each in tracer.flow(x):
        wide = each.labels.expand(shape(x))
        if "expand" in op_name(node) or op_name(node) == "broadcast_to":
            results: Any = wide.expand(shape(node))
        else:
            results = node.target(wide, *arguments(node)[1:], **node.kwargs)  # type: ignore[operator]
        for result, flow in zip(results if several else [results], flows, strict=True):
            labels = compact(result)
            if labels.numel() == 1 and each.labels.numel() > 1 and int(labels) >= 0:
                tracer.pin(labels, f"{tracer.where(node)} takes one of them out")
            flow.append(replace(each, labels=labels))
    if op_name(node) == "chunk" or op_name(node) == "tensor_split":
        _equal_parts(tracer, node, flows)
    kept = [tuple(f for f in flow if bool((f.labels >= 0).any())) for flow in flows]
    tracer.flows[node] = kept if several else kept[0]  # type: ignore[assignment]


def _equal_parts(tracer: Tracer, node: Node, flows: list[list[Field]]) -> None:
    """A tensor can be divided into equal parts only while they stay equal."""
    dim = argument(node, 2, "dim", 0) % len(shape(arguments(node)[0]))
    for parts in zip(*flows, strict=True):
        if any(dim in part.dims for part in parts):
            sizes = {part.labels.shape[dim] for part in parts}
            rows = [part.labels.movedim(dim, -1).reshape(-1, part.labels.shape[dim]) for part in parts]
            if len(sizes) > 1:
                tracer.pin_flow(parts, f"{tracer.where(node)} divides them into unequal parts")
            else:
                tracer.rows.append((torch.cat(rows), tracer.where(node)))


@rule("cat", "concat", "concatenate", "stack")
def concatenate(tracer: Tracer, node: Node) -> None:
    """Along the joined dimension each operand keeps its channels; along others they are the same channels."""
    operands: list[Node] = list(arguments(node)[0])
    ndim = len(shape(node))
    dim = argument(node, 1, "dim", 0) % ndim
    stacks = op_name(node) == "stack"
    flows = [[_stacked(f, dim) if stacks else f for f in tracer.flow(x)] for x in operands]
    sizes = [1 if stacks else shape(x)[dim] for x in operands]
    outer: list[Field] = []  # fields that don't vary along the joined dimension
    lies = [[f for f in flow if dim in f.dims] for flow in flows]
    if any(len(fields) > 1 for fields in lies):
        tracer.pin_flow((f for flow in lies for f in flow), f"{tracer.where(node)} joins channels of several kinds")
    for flow in flows:
        outer += [f for f in flow if dim not in f.dims]
    joined = tracer.join(node, outer)
    for each in joined:
        for x, flow in zip(operands, flows, strict=True):
            if shape(x) != (0,) and not any(set(f.dims) & set(each.dims) for f in flow):
                tracer.pin(each.labels, f"{tracer.where(node)} joins them with what apoptosis doesn't follow")
    fields = [f for flow in lies for f in flow]
    if fields:
        other = [max(f.labels.shape[d] for f in fields) for d in range(ndim)]
        pieces = []
        for x, size, found in zip(operands, sizes, lies, strict=True):
            if shape(x) == (0,):
                continue
            whole = [size if d == dim else n for d, n in enumerate(other)]
            alone = found[0].labels if found else torch.full([1] * ndim, -1)
            pieces.append(widened(alone, tuple(whole), range(ndim)))
        same = len({f.neuron for f in fields}) == 1 and all(lies)
        joined.append(
            Field(
                torch.cat(pieces, dim), fields[0].neuron if same else "general", any(f.max_pooled for f in fields),
                any(f.padded for f in fields),
            )
        )  # fmt: skip
    tracer.emit(node, joined)


def _stacked(field: Field, dim: int) -> Field:
    return replace(field, labels=field.labels.unsqueeze(dim))


@rule("roll", "flip", "repeat", "repeat_interleave", "index_select", "tile", "rot90", "unfold")
def copy(tracer: Tracer, node: Node) -> None:
    """Entries are copied: labels too, where the op touches a dimension that holds channels."""
    x, name = arguments(node)[0], op_name(node)
    fields: list[Field] = []
    for each in tracer.flow(x):
        labels = _copied(each, node, name)
        if labels is None:
            tracer.pin(each.labels, f"{tracer.where(node)} has no rule for these channels")
        else:
            fields.append(replace(each, labels=labels))
    tracer.emit(node, fields)


def _copied(field: Field, node: Node, name: str) -> torch.Tensor | None:
    labels, x = field.labels, arguments(node)[0]
    ndim = len(shape(x))
    if name in ("roll", "flip"):
        dims = argument(node, 2 if name == "roll" else 1, "dims")
        touched = {d % ndim for d in ([dims] if isinstance(dims, int) else dims or range(ndim))}
        return None if touched & set(field.dims) else labels
    if name in ("repeat", "tile"):
        counts = list(arguments(node)[1])
        labels = labels[(None,) * (len(counts) - ndim)]
        counts = [1] * (labels.ndim - len(counts)) + counts
        return labels.repeat([n if size > 1 else 1 for n, size in zip(counts, labels.shape, strict=True)])
    if name == "repeat_interleave" and isinstance(arguments(node)[1], int) and argument(node, 2, "dim") is not None:
        dim = argument(node, 2, "dim") % ndim
        return labels.repeat_interleave(arguments(node)[1], dim) if dim in field.dims else labels
    if name == "index_select":
        return None if arguments(node)[1] % ndim in field.dims else labels
    return None


@rule("pixel_shuffle", "pixel_unshuffle", "channel_shuffle")
def pixel_shuffle(tracer: Tracer, node: Node) -> None:
    """r x r channels become pixels of one (they go together), or one becomes r x r."""
    x, factor = arguments(node)[0], arguments(node)[1]
    dim, fields = len(shape(x)) - 3, []
    for each in tracer.flow(x):
        if each.dims != (dim,):
            tracer.pin(each.labels, f"{tracer.where(node)} mixes them with another dimension")
            continue
        labels = each.labels
        if op_name(node) == "pixel_shuffle":
            parts = labels.movedim(dim, -1).unflatten(-1, (-1, factor**2))
            tracer.unite(parts[..., :1], parts[..., 1:], f"{tracer.where(node)} joins unlike channels")
            labels = parts[..., 0].movedim(-1, dim)
        elif op_name(node) == "pixel_unshuffle":
            labels = labels.repeat_interleave(factor**2, dim)
        else:
            groups = labels.movedim(dim, -1).unflatten(-1, (factor, -1))
            tracer.rows.append((groups.reshape(factor, -1), tracer.where(node)))
            labels = groups.transpose(-1, -2).flatten(-2).movedim(-1, dim)
        fields.append(replace(each, labels=labels, neuron="general"))
    tracer.emit(node, fields)


@rule("index")
def index(tracer: Tracer, node: Node) -> None:
    """x[rows]: one index, along a dimension without channels."""
    x, indices = arguments(node)[0], arguments(node)[1]
    given = [d for d, each in enumerate(indices) if each is not None]
    fields = []
    for each in tracer.flow(x):
        if len(given) != 1 or given[0] in each.dims or indices[given[0]].meta["val"].dtype == torch.bool:
            tracer.pin(each.labels, f"{tracer.where(node)} has no rule for these channels")
            continue
        labels = each.labels.squeeze(given[0])
        for _ in shape(indices[given[0]]):
            labels = labels.unsqueeze(given[0])
        fields.append(replace(each, labels=labels))
    tracer.emit(node, fields)


@rule("index_add")
def index_add(tracer: Tracer, node: Node) -> None:
    """Rows are added to other rows that have the same channels."""
    x, dim, _, source = arguments(node)[:4]
    fields = [*tracer.flow(x), *tracer.flow(source)]
    dim %= len(shape(x))
    ok = all(dim not in each.dims for each in fields) and bool(tracer.flow(x)) == bool(tracer.flow(source))
    if not ok:
        tracer.pin_flow(fields, f"{tracer.where(node)} has no rule for these channels")
        return
    tracer.emit(node, (replace(each, neuron="general") for each in tracer.join(node, fields)))
