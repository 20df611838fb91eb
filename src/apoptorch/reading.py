"""What consumers read: seen in a forward pass by the weights that they read it with."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .multihead import multi_head_attention
from .plan import Slot


@dataclass(frozen=True, eq=False)
class Reader:
    """A group's consumer number `index`, with the weight that the forward pass uses; `paired`: its rows, not its
    columns, have the channels, and what it makes is what is read. `experts`: as many blocks are read apart."""

    group: str
    index: int
    slot: Slot
    width: int
    weight: Tensor
    paired: bool = False
    experts: int = 1


Parts = Sequence[tuple[int, tuple[slice, ...]]]  # experts, and where in a tensor lies what each of them reads


@dataclass(frozen=True, eq=False)
class Reading:
    """One tensor that a consumer read along dimension `dim`, and what its layer made of it."""

    reader: Reader
    source: Tensor
    dim: int
    output: Tensor
    parts: Parts = ((0, ()),)

    def channels(self, x: Tensor) -> Iterator[tuple[int, Float[Tensor, "positions m"]]]:
        """The source (or its gradient) as samples and positions x channels, those of one expert after the other."""
        slot, count = self.reader.slot, self.reader.width * self.reader.slot.inner // self.reader.experts
        for expert, where in self.parts:
            entries = x.detach()[where].movedim(self.dim, -1)
            if slot.positions is not None:
                own = torch.tensor(slot.positions[expert * count : (expert + 1) * count], device=x.device)
                entries = entries[..., own - expert * self.reader.weight.shape[slot.dim]]
            if entries.numel():
                yield expert, entries[..., :count].unflatten(-1, (-1, slot.inner)).transpose(-1, -2).flatten(0, -2)


class Use(NamedTuple):
    """A tensor that an op is given, a weight or a view of one: along `dim` its channels lie, along `along` its experts;
    of the expert `expert` it is a part. `dim` is None if it holds no channels that can be told."""

    reader: Reader
    weight: Tensor
    dim: int | None
    along: int | None = None
    expert: int | None = None


class View(NamedTuple):
    """Which of a weight's dimensions a view of it has, in its own order: all (weight.T), or all but one, of which it
    is one entry, `part`: that dimension and the entry (experts[3])."""

    tensor: Tensor
    weight: Tensor
    dims: tuple[int, ...]
    part: tuple[int, int] | None


_CONVOLUTIONS = (
    F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d,
)  # fmt: skip
_PRODUCTS = (
    torch.matmul, torch.mm, torch.bmm, Tensor.matmul, Tensor.mm, Tensor.bmm, Tensor.__matmul__,
)  # fmt: skip
_GROUPED = ("_grouped_mm", "grouped_mm_fallback")  # a product for all experts: torch's, and transformers'


def _read(func: Any, args: Sequence[Any], weight: Tensor, dim: int) -> tuple[int, int] | None:
    """Which argument a layer reads with its weight, and along which dimension; None if that isn't known."""
    if func is F.linear and args[1] is weight and dim == 1:
        return 0, -1
    if func in _CONVOLUTIONS and args[1] is weight:
        return 0, 1 if args[0].ndim == weight.ndim else 0
    if func in _PRODUCTS and args[1] is weight and dim == max(0, weight.ndim - 2):
        return 0, -1
    if func in _PRODUCTS and args[0] is weight and dim == weight.ndim - 1:
        return 1, -1 if args[1].ndim == 1 else -2
    if getattr(func, "__name__", "") in _GROUPED and args[1] is weight and (args[0].ndim, dim) == (2, 1):
        return 0, -1
    if func in (torch.addmm, Tensor.addmm) and len(args) > 2 and args[2] is weight and dim == 0:
        return 1, -1
    if func is torch.einsum and isinstance(args[0], str) and len(args) == 3 and "." not in args[0]:
        terms = args[0].replace(" ", "").split("->")[0].split(",")
        own, other = (1, 2) if args[1] is weight else (2, 1)
        return other, terms[other - 1].index(terms[own - 1][dim])
    return None


def _parts(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], use: Use, place: tuple[int, int]) -> Parts | None:
    """What each expert reads of the argument that a layer reads with its weight; None if that isn't known."""
    experts, source, along = use.reader.experts, args[place[0]], use.along
    if use.expert is not None:
        return ((use.expert, ()),)
    if along is None:
        return ((0, ()),)
    if getattr(func, "__name__", "") in _GROUPED:
        ends = (args[2] if len(args) > 2 else kwargs["offs"]).tolist()
        return [(e, (slice(*rows),)) for e, rows in enumerate(zip([0, *ends], ends, strict=False))]
    if func is torch.einsum:
        terms = args[0].replace(" ", "").split("->")[0].split(",")
        letter = terms[2 - place[0]][along]
        at = terms[place[0] - 1].find(letter)
    else:
        at = source.ndim - use.weight.ndim + along if along < use.weight.ndim - 2 else -1
    if at < 0 or source.shape[at] != experts:
        return None
    return [(e, (slice(None),) * at + (slice(e, e + 1),)) for e in range(experts)]


def _made(func: Any, args: Sequence[Any], weight: Tensor, dim: int) -> int | None:
    """Along which dimension of its output a layer has what these rows of its weight make; None if that isn't known."""
    if func is F.linear and args[1] is weight and dim == 0:
        return -1
    if func in _CONVOLUTIONS[:3] and args[1] is weight and dim == 0:
        return 1 if args[0].ndim == weight.ndim else 0
    if func in (torch.addmm, Tensor.addmm) and len(args) > 2 and args[2] is weight and dim == 1:
        return -1
    return None


def _view(view: Tensor, weight: Tensor) -> View | None:
    """The tensor as a view of the weight; None if it is another tensor."""
    places = [*zip(weight.shape, weight.stride(), strict=True)]
    found = [*zip(view.shape, view.stride(), strict=True)]
    if view.dtype != weight.dtype or len(set(places)) < len(places) or len(set(found)) < len(found):
        return None
    gone, (offset, rest) = [*set(places) - set(found)], divmod(view.data_ptr() - weight.data_ptr(), view.element_size())
    size, stride = gone[0] if gone else (1, 1)
    inside = rest == 0 and offset % stride == 0 and 0 <= offset // stride < size
    if not inside or len(gone) > 1 or not set(found) <= set(places):
        return None
    part = (places.index(gone[0]), offset // stride) if gone else None
    return View(view, weight, tuple(places.index(place) for place in found), part)


def _lstm(gates: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (gates + hidden).chunk(4, -1)
    state = f.sigmoid() * state + i.sigmoid() * g.tanh()
    return o.sigmoid() * state.tanh(), state


def _gru(gates: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    r, z, n = gates.chunk(3, -1)
    hr, hz, hn = hidden.chunk(3, -1)
    z = (z + hz).sigmoid()
    state = (1 - z) * (n + (r + hr).sigmoid() * hn).tanh() + z * state
    return state, state


def _rnn(function: Any) -> Any:
    return lambda gates, hidden, state: (function(gates + hidden),) * 2


_CELLS = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn(torch.tanh), "rnn_relu": _rnn(torch.relu)}


def unrolled(
    kind: str, x: Tensor, states: Any, weights: Sequence[Tensor], biased: bool, layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """What torch.lstm, gru and the like compute, one step of one layer after the other; without dropout."""
    directions, each = 2 if bidirectional else 1, 4 if biased else 2
    first, second = (states[0], states[1]) if kind == "lstm" else (states, states)
    layer, ends = x.transpose(0, 1) if batch_first else x, []
    for i in range(layers):
        outputs = []
        for j in range(i * directions, (i + 1) * directions):
            w, u, *biases = weights[j * each : (j + 1) * each]
            b, c = biases or (None, None)
            gates, h, s, steps = F.linear(layer, w, b), first[j], second[j], []
            for t in reversed(range(len(layer))) if j % directions else range(len(layer)):
                h, s = _CELLS[kind](gates[t], F.linear(h, u, c), s)
                steps.append(h)
            outputs.append(torch.stack(steps[::-1] if j % directions else steps))
            ends.append((h, s))
        layer = torch.cat(outputs, -1)
    last = [torch.stack(parts) for parts in zip(*ends, strict=True)]
    return (layer.transpose(0, 1) if batch_first else layer, *(last if kind == "lstm" else last[:1]))


class Recorder(TorchFunctionMode):
    """Sees every op of a forward pass and keeps the inputs of those that read a known weight.

    `lost`: groups with a weight that another op used, so that what it read isn't known.
    """

    def __init__(self, readers: Mapping[int, Sequence[Reader]]):
        super().__init__()
        self.readers = readers
        self.readings: list[Reading] = []
        self.lost: set[str] = set()
        self.starts: dict[int, tuple[Tensor, Tensor]] = {}  # what is read, and its stand-in that readers are given
        self.views: dict[int, View] = {}  # of known weights

    def known(self, leaf: Any) -> list[Use]:
        """Who reads with this tensor, a weight or a view of one."""
        view = self.views.get(id(leaf))
        readers = self.readers.get(id(leaf if view is None else view.weight), ())
        return [self.use(reader, leaf, view) for reader in readers]

    def use(self, reader: Reader, leaf: Tensor, view: View | None) -> Use:
        split = reader.slot.split
        if view is None:
            return Use(reader, leaf, reader.slot.dim, split[0] if split and reader.experts > 1 else None)
        kept = {d: i for i, d in enumerate(view.dims)}
        if split is None:
            return Use(reader, leaf, kept.get(reader.slot.dim))
        own = view.part[1] if view.part and view.part[0] == split[0] else None
        told = reader.experts > 1 and (own is not None or split[0] in kept)
        return Use(reader, leaf, kept.get(reader.slot.dim) if told else None, kept.get(split[0]), own)

    def follow(self, result: Any, readers: Sequence[Reader]) -> None:
        """What an op that reads nothing made of known weights: views of one of them, or what can't be followed."""
        weights = list({id(reader.weight): reader.weight for reader in readers}.values())
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                view = _view(leaf, weights[0]) if len(weights) == 1 else None
                if view is None:
                    self.lost |= {reader.group for reader in readers}
                else:
                    self.views[id(leaf)] = view

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = [each for leaf in tree_leaves((args, kwargs)) for each in self.known(leaf)]
        if not known:
            return func(*args, **kwargs)
        if getattr(func, "__name__", "") in _CELLS and len(args) == 9:
            with self:  # step by step, so that every product is seen
                return unrolled(func.__name__, *args)
        if func is F.multi_head_attention_forward and kwargs.get("static_k") is kwargs.get("static_v") is None:
            with self:
                return multi_head_attention(*args, **kwargs)
        if "input" in kwargs:  # F.linear(input=x, ...)
            names = [name for name in ("input", "weight", "bias") if name in kwargs]
            args = (*args, *(kwargs[name] for name in names))
            kwargs = {key: value for key, value in kwargs.items() if key not in names}
        found, made = {}, {}
        for use in known if len(args) > 1 else ():
            if use.dim is None:
                continue
            if use.reader.paired and (own := _made(func, args, use.weight, use.dim)) is not None:
                made[use.reader] = own
            elif not use.reader.paired and (place := _read(func, args, use.weight, use.dim)) is not None:
                if (parts := _parts(func, args, kwargs, use, place)) is not None:
                    found[use.reader] = *place, parts
                else:
                    self.lost.add(use.reader.group)
        if not found and not made:
            result = func(*args, **kwargs)
            self.follow(result, [use.reader for use in known])
            return result
        args = list(args)
        for index in {index for index, _, _ in found.values()}:
            source = args[index]
            # a view has the gradient of what reads it, not that of shortcuts; frozen layers below: it starts here
            start = source.view_as(source) if source.requires_grad else source.detach().requires_grad_()
            _, args[index] = self.starts.setdefault(id(source), (source, start))
        output = func(*args, **kwargs)
        self.readings += [
            Reading(reader, args[index], dim, output, parts) for reader, (index, dim, parts) in found.items()
        ]
        if made:  # a copy: what follows may change it in place
            output = (output if output.requires_grad else output.detach().requires_grad_()).clone()
            self.readings += [Reading(reader, output, dim, output) for reader, dim in made.items()]
        return output
