"""Removal without data: what the weights alone show to be redundant, with a bound for every input of a given norm.

Scheme (for chains of layers): prunable groups go one after the other, from the last to the first. Let N_0 be the
network before and N_t after t of them; N_t differs from N_(t-1) in group t alone, whose producer still reads what it
read in N_0, and whose consumers' change still passes the layers that N_(t-1) has. So for |x| <= R

    |N_t(x) - N_(t-1)(x)| <= K_t fold_t,

where fold_t bounds the change at the consumer's output over all inputs of the producer of norm up to R_t
(`redundancy.fold_from_weights`), R_t bounds that input with the weights of N_0, and K_t is a Lipschitz constant of
what follows the consumer in N_(t-1). The sum over t bounds |N_T(x) - N_0(x)| (triangle inequality).

A gate, a product of what two layers make, has a Lipschitz constant only on inputs of bounded norm. Those that matter
are the outputs of N_(t-1) and N_t: at the consumer they are at most r and r + fold_t, with r from the weights of
N_(t-1). If group t may use s of the bound, K_t is taken for r + s / K with the constant K for r; as K <= K_t,
K_t fold_t <= s ensures that fold_t <= s / K.

A convolution's producers are neurons that see patches: |patch| <= |image|; over P positions an error of e at each is
one of e sqrt(P), and if taps overlap at most o times, |conv(x)| <= |W| sqrt(o) |x| with W as a matrix.

All this is in exact arithmetic; that of floats adds the rounding of the forward pass and of the folded weights.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from .graph import Link, attribute
from .neurons import NEURONS, Neuron, range_error
from .plan import ChannelGroup, Fold, FoldPlan
from .redundancy import fold_from_weights
from .surgery import Surgery, named_tensors
from .surgery.tensors import effective, target_of

Matrix = Float64[Tensor, "n d"]


@dataclass(frozen=True)
class Outcome:
    """What went: the plans (their `bound` is on the model's output), the groups that have new widths, and for groups
    that were left alone the reason."""

    plans: list[FoldPlan]
    shrunk: dict[str, ChannelGroup]
    notes: dict[str, str]


@dataclass(frozen=True)
class _Span:
    """A group as a part of the chain: links[producer] makes its channels, links[consumer] reads them."""

    group: ChannelGroup
    producer: int
    consumer: int
    neuron: Neuron
    gate: Link | None
    constant: bool
    max_pooled: bool


def fold_chain_(
    model: nn.Module, groups: Sequence[ChannelGroup], links: Sequence[Link], input_norm: float, bound: float,
    surgery: Surgery,
) -> Outcome:  # fmt: skip
    """Remove what the weights show to be redundant, such that no input of norm <= input_norm moves the output by more
    than `bound`. `links`: the whole model; each group may use an equal share of what is left.
    """
    places = {group.name: _place(group, links) for group in groups}
    notes = {name: place for name, place in places.items() if isinstance(place, str)}
    spans = sorted((s for s in places.values() if isinstance(s, _Span)), key=lambda s: s.producer)
    maps = [gain_and_offset(model, link) for link in links]
    norms, _ = _through(links, maps, input_norm)
    left = bound
    plans: list[FoldPlan] = []
    shrunk: dict[str, ChannelGroup] = {}
    for i, span in reversed(list(enumerate(spans))):
        if not math.isfinite(norms[span.producer]):
            notes[span.group.name] = "no bound on what its layer reads: a neuron before it has no Lipschitz constant"
            continue
        share, behind = left / (i + 1), slice(span.consumer + 1, None)
        made, _ = _through(links[: behind.start], maps[: behind.start], input_norm)
        _, gain = _through(links[behind], maps[behind], made[-1])
        if any(link.kind == "gate" for link in links[behind]):
            _, gain = _through(links[behind], maps[behind], made[-1] + (share / gain if gain else math.inf))
        plan = _plan(model, span, links, norms[span.producer], share, gain)
        if len(plan.keep) < span.group.width:
            plans.append(plan)
            shrunk[span.group.name] = surgery.fold_(span.group, plan)
            left = max(0.0, left - (plan.bound or 0.0))
            own = slice(span.producer, behind.start)
            maps[own] = [gain_and_offset(model, link) for link in links[own]]
    return Outcome(plans[::-1], shrunk, notes)


def _through(links: Sequence[Link], maps: Sequence[tuple[float, float]], norm: float) -> tuple[list[float], float]:
    """For inputs of norm up to `norm`: the norm before each link and behind the last one, and a Lipschitz constant of
    all links together. `maps`: gain and offset of each."""
    norms, total = [norm], 1.0
    for link, (gain, offset) in zip(links, maps, strict=True):
        if link.kind == "gate" and link.neuron:
            gain = gate_gain(link.neuron, norms[-1])
        norms.append(product(gain, norms[-1]) + offset)
        total = product(total, gain)
    return norms, total


def rounding(model: nn.Module, links: Sequence[Link], output_norm: float) -> float:
    """About what float arithmetic may itself change of an output of that norm: 4 eps sqrt(d) of it for each layer of d
    terms, in float32 or better (Higham and Mary, SIAM J. Sci. Comput. 41 (2019), A2815: with independent roundings it
    is more with a probability of about 2 exp(-32)).

    Neurons that are redundant but for the rounding of their weights are within it.
    """
    layers = [_affine(model, link)[0] for link in links if link.kind == "layer"]
    eps = min(torch.finfo(parameter.dtype).eps for parameter in model.parameters())
    eps = min(eps, torch.finfo(torch.float32).eps)
    return 4 * eps * sum(math.sqrt(weight.shape[1] + 1) for weight in layers) * output_norm


def gain_and_offset(model: nn.Module, link: Link) -> tuple[float, float]:
    """(gain, offset) of a link F with the weights it has now: |F(x) - F(y)| <= gain |x - y|, |F(0)| <= offset.

    A gate's is inf: it has one for inputs of bounded norm only, `gate_gain`.
    """
    positions = math.sqrt(link.size / link.channels)
    if link.kind == "layer":
        weight, bias = _affine(model, link)
        return spectral_norm(weight) * math.sqrt(link.overlap), float(bias.norm()) * positions
    if link.kind == "norm":
        scale, shift = _normalisation(model, link)
        return float(scale.abs().max()), float(shift.norm()) * positions
    return math.inf if link.kind == "gate" else link.gain, link.offset


def gate_gain(neuron: Neuron, input_norm: float) -> float:
    """A Lipschitz constant of (a, b) -> a f(b), elementwise, on |(a, b)| <= input_norm (statement 9)."""
    unit = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    zero, most = (float(range_error(neuron, unit, norm, False)[0]) for norm in (0.0, input_norm))
    change = product(neuron.lipschitz, input_norm)
    return min(zero + change, math.hypot(most, change)) * (1 + 1e-12)


def spectral_norm(matrix: Matrix) -> float:
    """Largest singular value: the root of the smaller Gram matrix's largest eigenvalue."""
    gram = matrix @ matrix.T if len(matrix) < matrix.shape[1] else matrix.T @ matrix
    return math.sqrt(max(0.0, float(torch.linalg.eigvalsh(gram)[-1]))) * (1 + 1e-12)


def product(a: float, b: float) -> float:
    """a b, where nothing times infinity is nothing."""
    return 0.0 if a == 0 or b == 0 else a * b


def _place(group: ChannelGroup, links: Sequence[Link]) -> _Span | str:
    """Where the group lies in the chain, and its neuron; or why it has no closed form, in words."""
    if not group.prunable:
        return group.reason or "must keep its width"
    names = {attribute(slot.tensor) for slot in group.slots} | {c.bias for c in group.consumers if c.bias}
    uses = [(name, i) for i, link in enumerate(links) for name in link.tensors if name in names]
    layers = sorted({i for _, i in uses if links[i].kind == "layer"})
    if sorted(name for name, _ in uses) != sorted(names) or len(layers) != 2:
        return "no closed form: more than one layer makes or reads its channels"
    if group.blocks > 1 or not _whole(group, links[layers[0] : layers[1]]):
        return "no closed form: its channels lie among others"
    if any(slot.tensor.endswith(".original") for slot in group.slots):
        return "no closed form: spectral_norm rescales a layer whose channels change"
    if links[layers[0]].tensors[0] not in {attribute(slot.tensor) for slot in group.producers}:
        return "no closed form: it is read before it is made"
    return _between(group, layers[0], layers[1], links)


def _whole(group: ChannelGroup, links: Sequence[Link]) -> bool:
    """Are the group's channels all that the links have, in their order: one row each, or two if there is a gate?"""
    gated = any(link.kind == "gate" for link in links)
    halves = tuple(torch.arange(2 * group.width).view(2, -1).T.flatten().tolist()) if gated else None
    return (
        links[0].channels == (2 if gated else 1) * group.width
        and all(slot.positions in (None, halves) for slot in (*group.producers, *group.passthrough))
        and all(consumer.weight.positions is None for consumer in group.consumers)
    )


def _between(group: ChannelGroup, producer: int, consumer: int, links: Sequence[Link]) -> _Span | str:
    """One neuron, after batch norms, and pooling before or behind it."""
    neuron, gate, max_pooled, pooled = None, None, False, False
    constant = all(each.bias is not None for each in group.consumers)
    own = {slot.tensor for slot in group.passthrough if slot.inner * group.width == links[producer].channels}
    for link in links[producer + 1 : consumer]:
        late = neuron is not None or (pooled and link.kind in ("norm", "gate"))
        other = link.kind == "norm" and not own.issuperset(filter(None, link.tensors))
        if other or link.kind in ("layer", "other") or (late and link.kind in ("norm", "neuron", "gate")):
            return f"no closed form: {link.where} comes between its neuron and the layer that reads it"
        if link.kind in ("neuron", "gate"):
            neuron, gate = link.neuron, link if link.kind == "gate" else None
            if neuron is None or neuron.function is None:
                return f"no closed form for {link.where}"
            if max_pooled:  # max f(-z) is not f(-max z)
                neuron = replace(neuron, reflection=None)
        elif link.kind == "padded_pool":
            if neuron is None:
                return f"no closed form: {link.where} mixes zeros with what its neuron reads"
            constant = False
        pooled |= link.kind.endswith("pool")
        max_pooled |= link.kind == "max_pool"
    return _Span(group, producer, consumer, neuron or NEURONS["linear"], gate, constant, max_pooled)


def _plan(
    model: nn.Module, span: _Span, links: Sequence[Link], input_norm: float, share: float, gain: float
) -> FoldPlan:
    """The fold of one group that moves the model's output by at most `share`; `gain` follows the consumer."""
    reader, width = links[span.consumer], span.group.width
    positions = links[span.consumer - 1].size / width
    columns = [
        _tensor(model, attribute(slot.tensor)).movedim(slot.dim, 0).unflatten(0, (width, slot.inner)).flatten(1)
        for slot in (consumer.weight for consumer in span.group.consumers)
    ]
    rows, gates = _rows(model, links[span.producer : span.consumer]), None
    if span.gate:
        rows, gates = rows.chunk(2)[::-1] if span.gate.gate_first else rows.chunk(2)
    found = fold_from_weights(
        rows, span.neuron, torch.cat(columns, 1).norm(dim=1) * math.sqrt(reader.overlap * positions), gates=gates,
        input_norm=input_norm, bound=share * (1 - 1e-12) / gain if gain else math.inf, constant=span.constant,
        max_pooled=span.max_pooled,
    )  # fmt: skip
    shift = found.shift if found.shift.any() else None
    return FoldPlan(
        span.group.name,
        found.keep,
        (Fold(found.coeffs, shift),) * len(columns),
        predicted=math.nan,
        bound=product(found.bound, gain),
    )


def _rows(model: nn.Module, links: Sequence[Link]) -> Matrix:
    """Weights and bias of each neuron, with the batch norms behind the layer folded in."""
    weight, bias = _affine(model, links[0])
    for link in (link for link in links if link.kind == "norm"):
        scale, shift = _normalisation(model, link)
        weight, bias = scale[:, None] * weight, scale * bias + shift
    return torch.cat([weight, bias[:, None]], 1)


def _affine(model: nn.Module, link: Link) -> tuple[Matrix, Float64[Tensor, " n"]]:
    """Weight, one row for each output, and bias of a layer; those of two one after the other."""
    weights = [_tensor(model, name).flatten(1) for name in link.tensors[::2]]
    biases = [
        weight.new_zeros(len(weight)) if name is None else _tensor(model, name)
        for weight, name in zip(weights, link.tensors[1::2], strict=True)
    ]
    return torch.cat(weights), torch.cat(biases)


def _normalisation(model: nn.Module, link: Link) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
    """Batch norm in eval mode as scale x + shift."""
    mean, variance = _tensor(model, link.tensors[2]), _tensor(model, link.tensors[3])
    scale = (variance + link.eps).rsqrt()
    if link.tensors[0] is not None:
        scale = scale * _tensor(model, link.tensors[0])
    return scale, (0.0 if link.tensors[1] is None else _tensor(model, link.tensors[1])) - mean * scale


def _tensor(model: nn.Module, name: str | None) -> Float64[Tensor, "..."]:
    """The tensor that the forward pass uses by that name, also through a parametrization; nothing is written."""
    target = None if name is None else target_of(model, named_tensors(model), name)
    if target is None:
        raise KeyError(name)
    return effective(target).double()
