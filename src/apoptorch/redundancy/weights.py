"""Redundancy in weights: bounds that hold for every input -> fold. Shapes: n neurons, d inputs, k survivors."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from ..neurons import Neuron, product, range_error, reach
from .moments import check_finite, others, round_up


@dataclass(frozen=True)
class WeightFold:
    """A fold found in the weights alone: a ~ coeffs @ a[keep] + shift, and what it may cost.

    `bound`: worst-case change of the consumer's output (Euclidean norm) over all inputs of the asked norm, in
    exact arithmetic (`bounds.dot_rounding` bounds what floating point adds).
    """

    keep: Int64[Tensor, " k"]
    coeffs: Float64[Tensor, "n k"]
    shift: Float64[Tensor, " n"]
    bound: float


@dataclass(frozen=True)
class WeightSearch:
    """Removals in the order in which they cost least; every prefix of them is a valid fold.

    Removal j replaces neuron `removed[j]` by `coeff[j]` times neuron `onto[j]`, which is still there, plus `shift[j]`
    (`onto[j]` = -1: by the constant alone). `bound[j]`: worst case of the first j removals together.
    """

    n: int
    removed: Int64[Tensor, " m"]
    onto: Int64[Tensor, " m"]
    coeff: Float64[Tensor, " m"]
    shift: Float64[Tensor, " m"]
    bound: Float64[Tensor, " m+1"]

    def curve(self) -> Float64[Tensor, " n+1"]:
        """The bound at every width 0 ... n, inf where there is none: same form as `Selection.curve`."""
        curve = self.bound.new_full((self.n + 1,), torch.inf)
        curve[self.n - len(self.removed) :] = self.bound.flip(0)
        return curve

    def fold(self, width: int) -> WeightFold:
        m = self.n - width
        keep = others(self.removed[:m], self.n)
        coeffs, shift = torch.eye(self.n).to(self.coeff), self.coeff.new_zeros(self.n)
        for i, j, coeff, constant in zip(self.removed[:m], self.onto, self.coeff, self.shift, strict=False):
            if j >= 0:
                coeffs[:, j] += coeff * coeffs[:, i]
            shift += constant * coeffs[:, i]
        return WeightFold(keep, coeffs[:, keep], shift, float(self.bound[m]))


def fold_from_weights(
    rows: Float[Tensor, "n d+1"],
    neuron: Neuron,
    outgoing: Float[Tensor, " n"],
    *,
    input_norm: float,
    bound: float,
    multiple: int = 1,
    floor: int = 1,
    constant: bool = True,
    max_pooled: bool = False,
    gates: Float[Tensor, "n d+1"] | None = None,
) -> WeightFold:
    """Remove as many neurons as stay within `bound`; arguments as in `search_weights`."""
    search = search_weights(
        rows, neuron, outgoing,
        input_norm=input_norm, bound=bound, floor=floor, constant=constant, max_pooled=max_pooled, gates=gates,
    )  # fmt: skip
    n = len(rows)
    return search.fold(min(n, round_up(max(n - len(search.removed), min(floor, n)), multiple)))


def search_weights(
    rows: Float[Tensor, "n d+1"],
    neuron: Neuron,
    outgoing: Float[Tensor, " n"],
    *,
    input_norm: float,
    bound: float = math.inf,
    floor: int = 1,
    constant: bool = True,
    max_pooled: bool = False,
    gates: Float[Tensor, "n d+1"] | None = None,
) -> WeightSearch:
    """Dead, constant, parallel, Lipschitz-close and reflected neurons, from the weights alone.

    Removing neuron i moves the consumer by v_i (a_i - coeff a_j - shift), so by at most |v_i| times the error of its
    replacement, and adds coeff v_i to v_j; several removals one after the other move it by at most the sum
    (statement 7). Greedy: the least such bound goes next.

    Args:
        rows: weights and bias of each neuron, batch norm folded in.
        outgoing: norm of each neuron's outgoing column.
        input_norm: largest norm of the neurons' input.
        bound: the sum of the single bounds stays within it.
        floor: least number of survivors.
        constant: whether the consumer can take a shift exactly.
        max_pooled: the neurons pass a max pooling, so no replacement may have a negative sign.
        gates: weights and bias behind `neuron`, whose value multiplies that of `rows` (gated units).
    """
    check_finite(rows=rows, outgoing=outgoing, **({} if gates is None else {"gates": gates}))
    rows, outgoing = rows.double(), outgoing.double()
    n, index = len(rows), torch.arange(len(rows), device=rows.device)
    if gates is None:
        pairs = Pairs(rows, neuron, input_norm, constant=constant, max_pooled=max_pooled)
        error, value = range_error(neuron, rows, input_norm, constant)
    else:
        pairs = GatedPairs(rows, gates.double(), neuron, input_norm, max_pooled=max_pooled)
        error, value = pairs.range_error(constant)
    alive, outgoing = torch.ones_like(index, dtype=torch.bool), outgoing.clone()
    distance, onto, turn = pairs.nearest(index, alive)
    found: list[tuple[int, int, float, float, float]] = []
    total = 0.0
    while n - len(found) > max(floor, 1):
        price = torch.where(alive, product(outgoing, torch.minimum(error, distance)), torch.inf)
        i = int(price.argmin())
        if not math.isfinite(float(price[i])) or total + float(price[i]) > bound:
            break
        total += float(price[i])
        alive[i] = False
        if error[i] <= distance[i]:
            found.append((i, -1, 0.0, float(value[i]), total))
        else:
            coeff, shift = pairs.replacement(turn[i])
            outgoing[onto[i]] += coeff.abs() * outgoing[i]
            found.append((i, int(onto[i]), float(coeff), float(shift), total))
        if len(lost := (alive & (onto == i)).nonzero()[:, 0]):  # their nearest neuron has gone
            distance[lost], onto[lost], turn[lost] = pairs.nearest(lost, alive)
    table = torch.tensor(found, dtype=torch.float64, device=rows.device).reshape(-1, 5)
    zero = table.new_zeros(1)
    return WeightSearch(
        n, table[:, 0].long(), table[:, 1].long(), table[:, 2], table[:, 3], torch.cat([zero, table[:, 4]])
    )


class Pairs:
    """How well one neuron replaces another: by f(t w_j~ x~) with a turn t, whatever the neuron type.

    Positively homogeneous: t >= 0 the regression coefficient, so that |w_i~ - t w_j~| = |w_i~| sin(angle); else
    t = 1. With a reflection identity t may be negative: f(-z) = sign f(z) + offset. The error is at most
    L |(w_i~ - t w_j~).x~|, and `reach` is the largest value of that.
    """

    def __init__(
        self,
        rows: Float64[Tensor, "n d+1"],
        neuron: Neuron,
        input_norm: float,
        *,
        constant: bool,
        max_pooled: bool,
    ):
        self.rows, self.neuron, self.input_norm = rows, neuron, input_norm
        sign, offset = neuron.reflection or (1.0, 0.0)
        self.reflects = neuron.reflection is not None and (constant or offset == 0) and not (max_pooled and sign < 0)
        # In these units the Euclidean distance is within sqrt(2) of `reach`.
        self.scaled = torch.cat([rows[:, :-1] * input_norm, rows[:, -1:]], 1)
        self.square = (self.scaled * self.scaled).sum(1)

    def replacement(
        self, turn: Float64[Tensor, "*batch"]
    ) -> tuple[Float64[Tensor, "*batch"], Float64[Tensor, "*batch"]]:
        """(coeff, shift) that replace f(turn z) by coeff f(z) + shift."""
        sign, offset = self.neuron.reflection or (1.0, 0.0)
        turned = turn <= 0
        return torch.where(turned, sign, 1.0) * turn.abs(), torch.where(turned, offset, 0.0).to(turn)

    def nearest(
        self, index: Int64[Tensor, " m"], alive: Bool[Tensor, " n"], chunk: int = 512, tries: int = 4
    ) -> tuple[Float64[Tensor, " m"], Int64[Tensor, " m"], Float64[Tensor, " m"]]:
        """(error, neuron, turn) of the best living replacement of each neuron in `index`.

        The Gram matrix (BLAS-3) finds a few candidates; it loses half the digits of a small distance, so theirs
        are then computed from the rows themselves: exact duplicates give 0.
        """
        parts = [self._nearest(part, alive, min(tries, len(alive))) for part in index.split(chunk)]
        distance, onto, turn = (torch.cat(column) for column in zip(*parts, strict=True))
        return distance, onto, turn

    def _nearest(
        self, index: Int64[Tensor, " m"], alive: Bool[Tensor, " n"], tries: int
    ) -> tuple[Float64[Tensor, " m"], Int64[Tensor, " m"], Float64[Tensor, " m"]]:
        gram = self.scaled[index] @ self.scaled.T
        if self.neuron.homogeneous:
            estimate = self.square[index, None] - gram**2 / self.square.clamp(min=1e-300)
        else:
            estimate = self.square[index, None] + self.square - 2 * (gram.abs() if self.reflects else gram)
        usable = alive & ((gram > 0) | self.reflects | (not self.neuron.homogeneous))
        usable[torch.arange(len(index), device=index.device), index] = False
        estimate = torch.where(usable, estimate, torch.inf)
        candidates = estimate.topk(tries, largest=False).indices
        one, other = self.scaled[index, None], self.scaled[candidates]
        inner = (one * other).sum(-1)
        if self.neuron.homogeneous:
            turn = inner / (other * other).sum(-1).clamp(min=1e-300)
        else:
            turn = torch.where(inner < 0, -1.0, 1.0) if self.reflects else torch.ones_like(inner)
        distance = reach(self.rows[index, None] - turn[..., None] * self.rows[candidates], self.input_norm)
        distance = torch.where(usable.gather(1, candidates), product(self.neuron.lipschitz, distance), torch.inf)
        distance, best = distance.min(1, keepdim=True)
        return distance[:, 0], candidates.gather(1, best)[:, 0], turn.gather(1, best)[:, 0]


class GatedPairs(Pairs):
    """How well one gated unit (w~.x~) f(u~.x~) replaces another: by t (w_j~.x~) f(u_j~.x~), t the regression
    coefficient of the w~ (docs/theory.md, statement 9).

    Where f is homogeneous or has a reflection without offset, the units are first written with gates of norm 1, or
    of one of the two signs: the same functions.
    """

    def __init__(
        self,
        rows: Float64[Tensor, "n d+1"],
        gates: Float64[Tensor, "n d+1"],
        neuron: Neuron,
        input_norm: float,
        *,
        max_pooled: bool,
    ):
        sign, offset = neuron.reflection or (1.0, 0.0)
        if neuron.homogeneous:
            size = gates.norm(dim=1, keepdim=True)
            size = torch.where(size > 0, size, 1.0)
            rows, gates = rows * size, gates / size
        if neuron.reflection is not None and offset == 0:
            turned = gates.gather(1, gates.abs().argmax(1, keepdim=True)) < 0
            rows, gates = torch.where(turned, sign, 1.0) * rows, torch.where(turned, -1.0, 1.0) * gates
        super().__init__(rows, neuron, input_norm, constant=False, max_pooled=max_pooled)
        self.gates, self.max_pooled = gates, max_pooled
        self.scaled_gates = torch.cat([gates[:, :-1] * input_norm, gates[:, -1:]], 1)
        self.most, _ = range_error(neuron, gates, input_norm, False)

    def range_error(self, constant: bool) -> tuple[Float64[Tensor, " n"], Float64[Tensor, " n"]]:
        """(error, value) of each unit as `neurons.range_error` gives them, by f(u~.x~) as a constant and b of w~."""
        if not constant:
            return product(reach(self.rows, self.input_norm), self.most), torch.zeros_like(self.most)
        error, value = range_error(self.neuron, self.gates, self.input_norm, True)
        bias, radius = self.rows[:, -1], self.input_norm * self.rows[:, :-1].norm(dim=-1)
        return product(radius, self.most) + product(bias.abs(), error), bias * value

    def replacement(
        self, turn: Float64[Tensor, "*batch"]
    ) -> tuple[Float64[Tensor, "*batch"], Float64[Tensor, "*batch"]]:
        return turn, torch.zeros_like(turn)

    def _nearest(
        self, index: Int64[Tensor, " m"], alive: Bool[Tensor, " n"], tries: int
    ) -> tuple[Float64[Tensor, " m"], Int64[Tensor, " m"], Float64[Tensor, " m"]]:
        rows, gates, most = self.scaled[index], self.scaled_gates[index], self.most[index, None]
        slope = self.neuron.lipschitz if math.isfinite(self.neuron.lipschitz) else 1.0
        gram, size = rows @ self.scaled.T, self.square.clamp(min=1e-300)
        apart = torch.cdist(gates, self.scaled_gates)
        estimate = (self.square[index, None] - gram**2 / size).clamp(min=0).sqrt() * most
        estimate += gram.abs() / size.sqrt() * slope * apart
        usable = alive & ((gram > 0) if self.max_pooled else (gram != 0))
        usable[torch.arange(len(index), device=index.device), index] = False
        candidates = torch.where(usable, estimate.nan_to_num(torch.inf), torch.inf).topk(tries, largest=False).indices
        other = self.scaled[candidates]
        turn = (rows[:, None] * other).sum(-1) / (other * other).sum(-1).clamp(min=1e-300)
        value = reach(self.rows[index, None] - turn[..., None] * self.rows[candidates], self.input_norm)
        gate = reach(self.gates[index, None] - self.gates[candidates], self.input_norm)
        scale = turn.abs() * reach(self.rows[candidates], self.input_norm)
        distance = product(most, value) + product(scale, product(self.neuron.lipschitz, gate))
        distance = torch.where(usable.gather(1, candidates), distance, torch.inf)
        distance, best = distance.min(1, keepdim=True)
        return distance[:, 0], candidates.gather(1, best)[:, 0], turn.gather(1, best)[:, 0]
