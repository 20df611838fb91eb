"""Products of two activations, or of one and a bare parameter: matmul, addmm, einsum, attention."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.fx import Node

from ..labels import Array, Field, along, line
from ..nodes import VIEWS, argument, arguments, is_view, nodes_of, op_name, place_in_stack, shape, stack_of, writes
from ..tracer import GATES, Choice, Flow, Product, Tracer, rule
from .elementwise import meet
from .routing import ends

Letters = list[str]
Pair = tuple[Node, Node]
_PART = "part"  # a dimension of which the operand is one entry
_MAKERS = ("linear", "addmm", "conv1d", "conv2d", "conv3d")
_MOVES = (*VIEWS, "getitem", "_unsafe_view", "numpy_T", "mT", "movedim", "contiguous", "clone", "repeat_interleave",
          "mul", "div")  # fmt: skip
TRANSPOSES = ("t", "numpy_T", "mT", "transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis")


def product(
    tracer: Tracer, node: Node, given: Node, other: Node, dims: tuple[Letters, Letters, Letters],
    rows: Array | None = None,
) -> None:  # fmt: skip
    """einsum of two operands whose dimensions have these letters; letters missing in the result are summed over.

    Channels that are summed over must meet the columns of a parameter. Others pass: what they are multiplied by may
    differ between blocks (heads) and positions, not between the channels of a block. `rows`: the channels along "e" of
    the other operand, of which each row of the first meets one.
    """
    (x, left), (y, right), out = _parameter(tracer, given, dims[0]), _parameter(tracer, other, dims[1]), dims[2]
    _note_experts(tracer, node, (given, other), (x, y), (left, right, out))
    dims, fields = (left, right, out), list[Field]()
    flows = [tracer.flow(x), tracer.flow(y)]
    summed = [letter for letter in dict.fromkeys(dims[0] + dims[1]) if letter not in out]
    for letter in summed:
        if letter != "e" or rows is None or y not in tracer.tensors or shape(y)[right.index("e")] != len(rows):
            _contract(tracer, node, (x, y), flows, dims, letter)
            continue
        for each in (each for each in flows[1] if each.dims == (right.index("e"),)):
            tracer.unite(each.labels.flatten(), rows, f"{tracer.where(node)} joins unlike channels")
            tracer.made_by_product(each.labels, tracer.tensors[y])
    for operand, flow, letters in zip((x, y), flows, dims, strict=False):
        for each in flow:
            own = [letters[d] for d in each.dims]
            if set(own) & set(summed):
                continue
            shared = [letter for letter in own if letter in dims[0] and letter in dims[1]]
            if shared and own and own[-1] in shared:
                _meet(tracer, node, each, own[-1], (x, y), flows, dims)
            left = [letter for letter in letters if letter in out]
            kept = each.labels[tuple(slice(None) if letter in out else 0 for letter in letters)]
            kept = kept.permute([left.index(letter) for letter in out if letter in left])
            for position in [i for i, letter in enumerate(out) if letter not in left]:
                kept = kept.unsqueeze(position)
            made = operand in tracer.tensors
            fields.append(replace(each, labels=kept, neuron="linear" if made else "general"))
            if made:
                tracer.made_by_product(each.labels, tracer.tensors[operand])
    _cost(tracer, (x, y), flows, dims, summed)
    tracer.emit(node, tracer.join(node, fields))


def _parameter(tracer: Tracer, operand: Node, letters: Letters) -> tuple[Node, Letters]:
    """The parameter that the operand is a transpose (x @ weight.T) or a part (x @ experts[3]) of, and the letters of
    all its dimensions."""
    node, own = operand, letters
    while node not in tracer.tensors:
        if (stack := stack_of(node)) is not None:
            node, own = stack, [_PART, *own]
            continue
        if op_name(node) not in TRANSPOSES:
            break
        own = [letter for _, letter in sorted(zip(transposed(node), own, strict=True))]
        node = arguments(node)[0]
    return (node, own) if node in tracer.tensors else (operand, letters)


def transposed(node: Node) -> list[int]:
    """Which dimension of what it transposes each dimension of the result was."""
    sizes = torch.empty([*range(1, len(shape(node)) + 1)])
    order = node.target(sizes, *arguments(node)[1:], **node.kwargs).shape  # type: ignore[operator]
    return [size - 1 for size in order]


def _note_experts(
    tracer: Tracer, node: Node, given: Pair, operands: Pair, dims: tuple[Letters, Letters, Letters]
) -> None:
    """A parameter's dimension counts experts if it is one entry of it that the other operand is multiplied by, or if
    each of its entries makes a part of the output, or reads one of the other operand."""
    parameters = [operand in tracer.tensors for operand in operands]
    own = parameters.index(True) if sum(parameters) == 1 else None
    if own is None or dims[own].count(_PART) > 1:
        return
    source, letters, out = operands[1 - own], dims[1 - own], dims[2]
    experts: dict[int, tuple[Choice | None, Choice | None]] = {}
    for d, letter in enumerate(dims[own]):
        if letter == _PART:
            chosen = (place_in_stack(_part_of(given[own])), None)
            experts[d] = chosen, chosen
            continue
        each = letter in letters and shape(source)[letters.index(letter)] == shape(operands[own])[d]
        read = (None, letters.index(letter)) if each else None
        made = (None, out.index(letter)) if letter in out else None
        if read or made:
            experts[d] = read, made
    tracer.products[node] = Product(source, (tracer.tensors[operands[own]],), experts)


def _part_of(node: Node) -> Node:
    """The op that takes one of several parts, before all that transposes it."""
    while stack_of(node) is None:
        node = arguments(node)[0]
    return node


def _cost(tracer: Tracer, operands: Pair, flows: Sequence[Flow], dims: Sequence[Letters], summed: Letters) -> None:
    """Of a product with a parameter."""
    for operand, flow, letters in zip(operands, flows, dims, strict=False):
        if operand in tracer.tensors:
            sizes = {
                c: n for used, own in zip(operands, dims, strict=False) for c, n in zip(own, shape(used), strict=True)
            }
            sides = {letters[d] in summed: each.labels for each in flow for d in each.dims}
            positions = math.prod(n for letter, n in sizes.items() if letter not in letters)
            experts = math.prod(sizes[c] for c in letters if sum(c in own for own in dims) == 1)  # a row meets one
            whole = math.prod(shape(operand))
            parameters = whole // sizes.get(_PART, 1)
            positions *= whole / experts / parameters
            tracer.cost(parameters, positions, sides.get(False), sides.get(True), experts > 1)
            return


def _meet(
    tracer: Tracer, node: Node, each: Field, letter: str, operands: Pair, flows: Sequence[Flow], dims: Sequence[Letters]
) -> None:
    """A channel dimension that both operands share must hold the same channels in both."""
    for other, flow, theirs in zip(operands, flows, dims, strict=False):
        held = any(theirs[d] == letter for f in flow for d in f.dims)
        if letter in theirs and not held and _differs(other, theirs.index(letter) - len(theirs)):
            tracer.pin(each.labels, f"{tracer.where(node)} combines them with a tensor that apoptosis doesn't follow")


def _differs(node: Node, dim: int) -> bool:
    """May entries differ along a dimension, counted from the last? Not those that one was expanded to."""
    x = arguments(node)[0] if op_name(node) == "expand" else node
    return len(shape(x)) >= -dim and shape(x)[dim] > 1


def _contract(
    tracer: Tracer, node: Node, operands: Pair, flows: Sequence[Flow], dims: Sequence[Letters], letter: str
) -> None:
    """The channels along one letter are read by the other operand, if that is a parameter."""
    found = []
    for operand, flow, letters in zip(operands, flows, dims, strict=False):
        along_it = [each for each in flow if any(letters[d] == letter for d in each.dims)]
        found.append((operand, along_it, letters.index(letter) if letter in letters else -1))
    (x, left, i), (y, right, j) = found
    if not left and not right:
        return
    parameters = [operand in tracer.tensors for operand in operands]
    labelled = [*left, *right]
    if all(parameters) or not any(parameters) or not left or not right:
        if left and right and not any(parameters):
            if [len(each.dims) for each in labelled] == [1, 1] and {each.neuron for each in labelled} & set(GATES):
                tracer.unite(
                    left[0].labels.flatten(), right[0].labels.flatten(), f"{tracer.where(node)} joins unlike ones"
                )
                return
            note_heads(tracer, left, i)
            note_heads(tracer, right, j)
            order = [*(c for c in dims[0] if c in dims[1] and c != letter), letter]
            _pair(tracer, node, operands, [_in_order(f, d, order) for f, d in zip((left, right), dims, strict=False)])
            return
        tracer.pin_flow(labelled, f"{tracer.where(node)} reads them with a tensor that is computed")
        return
    weight, dim, reader = (y, j, (x, i)) if parameters[1] else (x, i, (y, j))
    read = tracer.read(reader[0], reader[1], node)
    if read is not None:
        tracer.consume(tracer.tensors[weight], dim, read, None)


def _in_order(fields: Sequence[Field], letters: Letters, order: Letters) -> Array | None:
    """The labels of the only field along the dimensions `order`; None if there are others, or it lies along others."""
    if len(fields) != 1 or not {letters[d] for d in fields[0].dims} <= set(order):
        return None
    kept = fields[0].labels[tuple(slice(None) if letter in order else 0 for letter in letters)]
    own = [letter for letter in letters if letter in order]
    return kept.permute([own.index(letter) for letter in order])


def _pair(tracer: Tracer, node: Node, operands: Pair, labels: Sequence[Array | None]) -> None:
    """Channels a_c and b_c of two layers, of which sum_c a_c b_c is formed: one channel.

    With a_c ~ sum_s x_cs a_s the sum is that of a_s (b_s + sum_c x_cs b_c): what is linear in the rows that make b is
    folded there. No constant: b isn't one.
    """
    one, other = labels
    made = [_moved(tracer, operand) for operand in operands]
    if one is None or other is None or not all(made):
        flows = [each for operand in operands for each in tracer.flow(operand)]
        tracer.pin_flow(flows, f"{tracer.where(node)} multiplies pairs of them (queries and keys)")
        return
    tracer.unite(one, other, f"{tracer.where(node)} joins unlike channels")
    tracer.general.append(one.flatten())
    tracer.pairs.append((one.flatten(), made[0], made[1]))


def _moved(tracer: Tracer, node: Node) -> set[str]:
    """The parameters of the layer that makes `node`, if what it makes is only moved and multiplied by numbers; else
    none."""
    path = [node]
    while op_name(node) in _MOVES and len(nodes_of(node)) == 1 and "rounding_mode" not in node.kwargs:
        node = nodes_of(node)[0]
        path.append(node)
    weight = {"addmm": 2}.get(op_name(node), 1)
    plain = op_name(node) in _MAKERS and arguments(node)[weight] in tracer.tensors
    if not plain or any(changed(each, path) for each in path):
        return set()
    return {tracer.tensors[each] for each in node.all_input_nodes if each in tracer.tensors}


def changed(node: Node, path: Sequence[Node]) -> bool:
    """Does an op beside the path change the tensor, or a view of it, in place?"""
    beside = [user for user in node.users if user not in path]
    return any(writes(user) or (is_view(user) and changed(user, path)) for user in beside)


def note_heads(tracer: Tracer, flow: Sequence[Field], dim: int) -> None:
    """What lies along `dim` is multiplied in pairs: it can go head by head, where there are several."""
    for each in flow:
        rows = line(each.labels, dim)
        if len(torch.unique(rows[:, 0])) > 1 and bool((rows >= 0).all()):
            tracer.heads.append(rows)


@rule("matmul", "bmm", "mm", "mv", "dot")
def matmul(tracer: Tracer, node: Node) -> None:
    x, y = arguments(node)[:2]
    product(tracer, node, x, y, _matmul_letters(x, y))


def _matmul_letters(x: Node, y: Node) -> tuple[Letters, Letters, Letters]:
    n, m = len(shape(x)), len(shape(y))
    batch = [f"b{i}" for i in range(max(n, m, 2) - 2)]
    left = batch[len(batch) - max(0, n - 2) :] + (["i", "k"] if n > 1 else ["k"])
    right = batch[len(batch) - max(0, m - 2) :] + (["k", "j"] if m > 1 else ["k"])
    return left, right, batch + (["i"] if n > 1 else []) + (["j"] if m > 1 else [])


@rule("_grouped_mm", "grouped_mm_fallback")
def grouped_product(tracer: Tracer, node: Node) -> None:
    """Row t of x is multiplied by the matrix of its expert.

    The kernel asks for rows of whole 16 bytes. Its stand-in in transformers' exported graphs doesn't, but isn't what
    the model runs.
    """
    x, weight = arguments(node)[:2]
    if len(shape(x)) != 2 or len(shape(weight)) != 3 or argument(node, 3, "bias") is not None:
        flows = [each for used in node.all_input_nodes for each in tracer.flow(used)]
        tracer.pin_flow(flows, f"{tracer.where(node)} has no rule for products of these shapes")
        return
    rows = ends(tracer, argument(node, 2, "offs"))
    product(tracer, node, x, weight, (["t", "k"], ["e", "k", "n"], ["t", "n"]), rows)
    if noted := tracer.products.get(node):  # the ends of each expert's rows
        chosen = (argument(node, 2, "offs"), 0)
        letters = _parameter(tracer, weight, ["e", "k", "n"])[1]
        tracer.products[node] = replace(noted, experts={letters.index("e"): (chosen, chosen)})
    aligned = max(1, 16 // node.meta["val"].element_size())
    tracer.multiples += [(each.labels, aligned) for each in (*tracer.flow(x), *tracer.known(node))]


@rule("addmm")
def addmm(tracer: Tracer, node: Node) -> None:
    """bias + x @ weight, as in transformers' Conv1D."""
    bias_node, x, weight_node = arguments(node)[:3]
    weight, bias = tracer.tensors.get(weight_node), tracer.tensors.get(bias_node)
    if weight is None or bias is None or node.kwargs or x in tracer.tensors:
        flows = [each for used in (bias_node, x, weight_node) for each in tracer.flow(used)]
        tracer.pin_flow(flows, f"{tracer.where(node)} reads them with a weight that is computed in forward()")
        return
    last = len(shape(node)) - 1
    rest = [each for each in tracer.flow(x) if last not in each.dims]
    read = tracer.read(x, last, node)
    tracer.uses.setdefault(bias, set()).add(weight)
    made = tracer.produce(shape(weight_node)[1], [(weight, 1), (bias, 0)], node)
    if read is not None:
        tracer.consume(weight, 0, read, None if read.padded else bias)
    else:
        tracer.also_reads[weight] = tracer.where(node)
    tracer.cost(math.prod(shape(weight_node)), shape(x)[0], made, None if read is None else read.labels)
    fields = [*(replace(each, neuron="general") for each in rest), Field(along(made, last, last + 1))]
    tracer.emit(node, fields)


@rule("baddbmm")
def baddbmm(tracer: Tracer, node: Node) -> None:
    tracer.pin_flow(tracer.flow(arguments(node)[0]), f"{tracer.where(node)} adds them to a product")
    x, y = arguments(node)[1:3]
    product(tracer, node, x, y, _matmul_letters(x, y))


@rule("einsum")
def einsum(tracer: Tracer, node: Node) -> None:
    equation, operands = arguments(node)[:2]
    sides = equation.replace(" ", "").split("->")
    terms = sides[0].split(",")
    plain = len(sides) == 2 and len(terms) == 2 and "." not in equation
    plain = plain and all(len(set(term)) == len(term) for term in (*terms, sides[-1]))
    if not plain:
        flows = [each for used in operands for each in tracer.flow(used)]
        tracer.pin_flow(flows, f"{tracer.where(node)} has no rule for {equation!r}")
        return
    x, y = operands
    product(tracer, node, x, y, (list(terms[0]), list(terms[1]), list(sides[1])))


@rule("scaled_dot_product_attention")
def attention(tracer: Tracer, node: Node) -> None:
    """Value channels pass, head by head; whole heads do where queries, keys and values have them.

    Of fewer value (or key) heads, each one's share goes to several query heads.
    """
    query, key, value = arguments(node)[:3]
    mask, ndim, pairs = argument(node, 3, "attn_mask"), len(shape(node)), list[Field]()
    operands = [used for used in (query, key, mask) if isinstance(used, Node)]
    whole = all(any(_of_heads(each, ndim) for each in tracer.flow(used)) for used in (query, key))
    fields = []
    for used in operands:
        for each in tracer.flow(used):
            if whole and _of_heads(each, ndim):
                fields.append(_for_queries(each, node))
                continue
            if used is not mask and each.dims[-1:] == (ndim - 1,):
                note_heads(tracer, [each], ndim - 1)
                pairs.append(_for_queries(each, node))
            else:
                tracer.pin(each.labels, f"{tracer.where(node)} multiplies pairs of them (queries and keys)")
    scaled = argument(node, 6, "scale") is not None
    if len(pairs) == 2 and scaled:
        order = [str(d) for d in range(ndim) if d != ndim - 2]
        _pair(tracer, node, (query, key), [_in_order([each], [*map(str, range(ndim))], order) for each in pairs])
    else:
        by = "" if scaled else ", by a scale that follows their number"
        tracer.pin_flow(pairs, f"{tracer.where(node)} multiplies pairs of them (queries and keys){by}")
    for each in tracer.flow(value):
        if each.dims[-1:] == (ndim - 1,):
            labels = each.labels
            if whole:
                tracer.unite(labels[..., :1], labels, f"{tracer.where(node)} joins unlike channels")
                labels = labels[..., :1]
            fields.append(_for_queries(replace(each, labels=labels), node))
        elif whole and _of_heads(each, ndim):
            fields.append(_for_queries(each, node))
        else:
            tracer.pin(each.labels, f"{tracer.where(node)} sums over them")
    joined = tracer.join(node, fields)
    for each in joined if whole else ():
        for used in (*operands, value):
            meet(tracer, node, used, each)
    tracer.emit(node, joined)


def _of_heads(field: Field, ndim: int) -> bool:
    """Does it lie along the heads, and neither along positions nor along entries?"""
    return ndim > 2 and field.dims == (field.labels.ndim - 3,)


def _for_queries(field: Field, node: Node) -> Field:
    """The field at the dimensions of the output, one entry for each query head."""
    labels, heads = field.labels[(None,) * (len(shape(node)) - field.labels.ndim)], shape(node)[-3:][0]
    if labels.ndim > 2 and labels.shape[-3] not in (1, heads):
        labels = labels.repeat_interleave(heads // labels.shape[-3], -3)
    return replace(field, labels=labels, neuron="general")


@rule("glu")
def glu(tracer: Tracer, node: Node) -> None:
    """a * sigmoid(b): the two halves are made together."""
    x = arguments(node)[0]
    dim = argument(node, 1, "dim", -1) % len(shape(x))
    fields = []
    for each in tracer.flow(x):
        labels = each.labels
        if dim in each.dims:
            first, second = labels.chunk(2, dim)
            tracer.unite(first, second, f"{tracer.where(node)} joins unlike channels")
            labels = first
        fields.append(replace(each, labels=labels, neuron="general"))
    tracer.emit(node, fields)
