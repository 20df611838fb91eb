"""Redundancy in activations: second moments -> error curve and fold. Shapes: n channels, k survivors."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from ..errors import ArgumentError
from ..plan import Fold

_EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Selection:
    """Channels in the order in which they are worth keeping.

    Attributes:
        order: the first k survivors, most valuable first; width w keeps `order[:w]`.
        error: predicted loss increase with the first 0 ... k of them; non-increasing, never negative.
    """

    order: Int64[Tensor, " k"]
    error: Float64[Tensor, " k+1"]

    def curve(self, n: int, floor: int = 1) -> Float64[Tensor, " n+1"]:
        """Predicted loss increase at every width 0 ... n: inf below `floor`, 0 at n.

        Between k and n nothing was searched; the error at k stands there, an upper limit.
        """
        curve = self.error.new_full((n + 1,), float(self.error[-1]))
        curve[: len(self.error)] = self.error
        curve[:floor] = torch.inf
        curve[n] = 0.0
        return curve


def select(
    second: Float[Tensor, "n n"],
    mean: Float[Tensor, " n"] | None,
    metric: Float[Tensor, "n n"],
    *,
    stop: float,
    floor: int = 1,
    multiple: int = 1,
    block: int = 96,
) -> Selection:
    """Order channels by greedy pivoted Cholesky of the activations' covariance, as the loss weighs them.

    With S the part of the activations that the survivors do not explain (the Schur complement), the predicted
    loss increase is 1/2 tr(metric S). Each pivot is the channel with the largest remaining metric_ii S_ii.
    Blocked as in LAPACK's dpstrf: matrix-vector products inside a block, one matrix product after it.

    Args:
        second: mean of a a^T over samples.
        mean: mean of a; None where the consumer can take no constant (then nothing is centred).
        metric: V^T G V summed over consumers, positive semidefinite.
        stop: the search ends when the predicted loss increase is at most this, or at numerical rank.
        floor: least number of survivors.
        multiple: their number is rounded up to a multiple of it (n at most).
        block: pivots per block.
    """
    check_finite(second=second, mean=mean, metric=metric)
    n, noise = len(second), _rounding(second)
    residual, fine = _centred(second, mean), metric.double()
    live = torch.arange(n, device=second.device)
    order, gains, left = [live[:0]], [residual.new_zeros(0)], _half_trace(fine, residual)
    block, floor = round_up(block, multiple), min(n, round_up(floor, multiple))
    found = 0
    while found < n and (left > stop or found < floor):
        rows, pivots = _pivot_block(residual, fine.diagonal().clamp(min=0), noise, min(block, len(live)))
        if len(pivots) == 0:
            break
        order.append(live[pivots])
        gains.append(_half_quadratic(rows, metric))
        found += len(pivots)
        residual.addmm_(rows.T, rows, alpha=-1.0)
        _clear(residual, (residual.diagonal() <= noise).index_fill(0, pivots, True))
        left = _half_trace(fine, residual)
        open_ = residual.diagonal() > 0
        if 4 * int(open_.sum()) < 3 * len(live):  # copying pays once a quarter is done with
            residual, fine, metric = (matrix[open_][:, open_] for matrix in (residual, fine, metric))
            live, noise = live[open_], noise[open_]
    return _trim(torch.cat(order), torch.cat(gains), left, n, stop=stop, floor=floor, multiple=multiple)


def select_whole(
    second: Float[Tensor, "n n"], mean: Float[Tensor, " n"] | None, metric: Float[Tensor, "n n"], entries: int, *,
    stop: float, floor: int = 1, multiple: int = 1,
) -> Selection:  # fmt: skip
    """`select` of whole channels of m = `entries` entries each; the selection counts channels.

    Each pivot is the channel c with the largest remaining tr(metric_cc S_cc); all its entries are eliminated at once.
    """
    check_finite(second=second, mean=mean, metric=metric)
    count, noise = len(second) // entries, _rounding(second)
    residual, metric = _centred(second, mean), metric.double()
    order, gains = list[int](), list[Tensor]()
    left = _half_trace(metric, residual)
    while len(order) < count and (left > stop or len(order) < floor):
        score = _diagonal_products(metric, residual, entries)
        score[order] = 0.0
        value, best = score.max(0)
        if value <= 0:
            break
        own = torch.zeros(len(second), dtype=torch.float64, device=second.device)
        own[int(best) * entries : (int(best) + 1) * entries] = 1.0
        rows, pivots = _pivot_block(residual, own, noise, entries)
        residual.addmm_(rows.T, rows, alpha=-1.0)
        _clear(residual, (residual.diagonal() <= noise).index_fill(0, pivots, True))
        order.append(int(best))
        gains.append(_half_quadratic(rows, metric).sum())
        left = _half_trace(metric, residual)
    chosen = torch.tensor(order, dtype=torch.int64, device=second.device)
    gained = torch.stack(gains) if gains else residual.new_zeros(0)
    return _trim(chosen, gained, left, count, stop=stop, floor=floor, multiple=multiple)


def _diagonal_products(a: Float[Tensor, "n n"], b: Float[Tensor, "n n"], entries: int) -> Float[Tensor, " blocks"]:
    """tr(a_cc b_cc) of every block c on the diagonal of two symmetric matrices."""
    shape = (len(a) // entries, entries) * 2
    own_a, own_b = (x.view(shape).diagonal(dim1=0, dim2=2) for x in (a, b))
    return (own_a * own_b).sum((0, 1)).clamp(min=0)


def _pivot_block(
    residual: Float64[Tensor, "m m"],
    weight: Float64[Tensor, " m"],
    noise: Float64[Tensor, " m"],
    limit: int,
) -> tuple[Float64[Tensor, "b m"], Int64[Tensor, " b"]]:
    """Up to `limit` pivots; `rows` is their Cholesky factor, transposed: residual ~ rows^T rows."""
    rows, pivots = residual.new_zeros(limit, len(residual)), []
    left = residual.diagonal().clone()
    for j in range(limit):
        score = torch.where(left > noise, left * weight, 0.0)
        value, pivot = score.max(0)
        if value <= 0:
            break
        p = int(pivot)
        row = torch.addmv(residual[p], rows[:j].T, rows[:j, p], alpha=-1.0).div_(left[p].sqrt())
        row[pivots] = 0.0  # zero in exact arithmetic
        row[p] = left[p].sqrt()
        rows[j] = row
        left.addcmul_(row, row, value=-1.0)
        left[p] = 0.0
        pivots.append(p)
    return rows[: len(pivots)], torch.tensor(pivots, dtype=torch.int64, device=residual.device)


def _trim(
    order: Int64[Tensor, " p"],
    gains: Float64[Tensor, " p"],
    left: Float64[Tensor, ""],
    n: int,
    *,
    stop: float,
    floor: int,
    multiple: int,
) -> Selection:
    # Summed from the small end: exactly non-increasing, and no cancellation as in total - cumsum(gains).
    error = torch.cat([left[None], gains.flip(0)]).cumsum(0).flip(0)
    k = min(n, round_up(max(floor, int((error > stop).sum())), multiple))
    if k > len(order):  # the rank is exhausted: any other channels fill up to the multiple
        spare = others(order, n)[: k - len(order)]
        order, error = torch.cat([order, spare]), torch.cat([error, error[-1].expand(len(spare))])
    if k == n:
        error = error.index_fill(0, torch.tensor([n], device=error.device), 0.0)
    return Selection(order[:k], error[: k + 1])


def fold(
    second: Float[Tensor, "n n"],
    mean: Float[Tensor, " n"] | None,
    keep: Int64[Tensor, " k"],
    *,
    ridge: float = 1e-10,
) -> Fold:
    """The regression of all channels on the survivors `keep` (sorted): a ~ coeffs @ a[keep] + shift.

    Channels are scaled to unit variance first, so their units don't matter; `ridge` is relative to that and
    grows tenfold until the factorization succeeds. Rows of survivors are exactly the identity.
    """
    check_finite(second=second, mean=mean)
    variance = second.diagonal().double() - (0.0 if mean is None else mean.double().square())
    varies = variance > _rounding(second)
    scale = torch.where(varies, variance, 1.0).sqrt()
    normal = _rows(second, mean, keep).mul_(varies / scale).mul_((varies / scale)[keep, None])
    lost = others(keep, len(second))
    coeffs = normal.new_zeros(len(second), len(keep)).index_put_((keep, torch.arange(len(keep))), normal.new_ones(()))
    coeffs[lost] = _solve(normal[:, keep], normal[:, lost], ridge).T * scale[lost, None] / scale[keep]
    if mean is None:
        return Fold(coeffs)
    shift = mean.double() - coeffs @ mean.double()[keep]
    shift[keep] = 0.0
    return Fold(coeffs, shift)


def _solve(matrix: Float64[Tensor, "k k"], right: Float64[Tensor, "k n"], ridge: float) -> Float64[Tensor, "k n"]:
    return torch.cholesky_solve(right, _factor(matrix, ridge))


def _factor(matrix: Float64[Tensor, "k k"], ridge: float) -> Float64[Tensor, "k k"]:
    identity = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    while True:  # a unit-diagonal Gram matrix plus enough of the identity is positive definite
        factor, info = torch.linalg.cholesky_ex(matrix + ridge * identity)
        if not int(info):
            return factor
        ridge = max(10.0 * ridge, _EPS)


def first_order(
    cross: Float[Tensor, "n n"], slope: Float[Tensor, " n"], keep: Int64[Tensor, " k"], fold: Fold
) -> float:
    """First-order change of the loss by a fold: sum over i of E[u_i (coeffs a_keep + shift - a)_i] (Statement 13)."""
    change = torch.dot(fold.coeffs.double().flatten(), cross[:, keep].double().flatten()) - cross.diagonal().sum()
    return float(change if fold.shift is None else change + torch.dot(fold.shift.double(), slope.double()))


def first_order_curve(
    second: Float[Tensor, "n n"],
    mean: Float[Tensor, " n"] | None,
    cross: Float[Tensor, "n n"],
    slope: Float[Tensor, " n"],
    order: Int64[Tensor, " k"],
    blocks: int = 1,
    *,
    ridge: float = 1e-10,
) -> Float64[Tensor, " k+1"]:
    """`first_order` of the regressions on the first 0 ... k channels of `order`, from one Cholesky factor.

    With L L^T the covariance of those channels, L^-1 turns them into uncorrelated channels of variance 1, each of which
    explains its own part of E[u a^T]. Channels of different blocks count as uncorrelated: folds don't mix them.
    """
    covariance = _centred(second, mean)
    centred = cross.double() if mean is None else cross.double() - torch.outer(slope.double(), mean.double())
    if blocks > 1:
        block = torch.arange(len(second), device=second.device) // (len(second) // blocks)
        apart = block[:, None] != block
        covariance, centred = covariance.masked_fill(apart, 0.0), centred.masked_fill(apart, 0.0)
    scale = covariance.diagonal()[order].sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    factor = _factor(covariance[order][:, order] / scale[:, None] / scale, ridge)
    ours, theirs = (
        torch.linalg.solve_triangular(factor, matrix[:, order].T / scale[:, None], upper=False)
        for matrix in (covariance, centred)
    )
    explained = (ours * theirs).sum(1).cumsum(0)
    return torch.cat([explained.new_zeros(1), explained]) - centred.diagonal().sum()


def unexplained(
    second: Float[Tensor, "n n"],
    mean: Float[Tensor, " n"] | None,
    keep: Int64[Tensor, " k"],
    fold: Fold,
) -> Float64[Tensor, "n-k n-k"]:
    """Second moment of a - coeffs @ a[keep] - shift on the channels that go, `others(keep, n)`; exact for any fold.

    On the survivors it is zero.
    """
    lost = others(keep, len(second))
    coeffs = fold.coeffs.double()[lost]
    half = _rows(second, mean, lost).addmm_(coeffs, _rows(second, mean, keep), alpha=-1.0)
    inner = half[:, lost].addmm_(half[:, keep], coeffs.T, alpha=-1.0)
    if mean is not None:
        offset = mean.double()[lost] - coeffs @ mean.double()[keep]
        offset = offset if fold.shift is None else offset - fold.shift.double()[lost]
        inner.addr_(offset, offset)
    return inner


def directions(second: Float[Tensor, "n n"], mean: Float[Tensor, " n"] | None, metric: Float[Tensor, "n n"]) -> float:
    """In how many directions the loss is curved in a matrix that multiplies the channels (Statement 22).

    second, mean: E[a a^T] and E[a]. metric: the second moment of the loss's gradient in a, up to a factor.
    """
    return _effective_rank(_centred(second, mean)) * _effective_rank(metric.double())


def _effective_rank(matrix: Float64[Tensor, "n n"]) -> float:
    """tr(M)^2 / tr(M^2), the number of equal eigenvalues that would have these traces; 0 for M = 0."""
    trace, squared = float(matrix.trace()), float(matrix.square().sum())
    return trace * trace / squared if squared > 0 else 0.0


def _rows(
    second: Float[Tensor, "n n"], mean: Float[Tensor, " n"] | None, channels: Int64[Tensor, " k"]
) -> Float64[Tensor, "k n"]:
    """Rows of the covariance (second moment where `mean` is None)."""
    rows = second[channels].double()
    return rows if mean is None else rows.addr_(mean.double()[channels], mean.double(), alpha=-1.0)


def _centred(second: Float[Tensor, "n n"], mean: Float[Tensor, " n"] | None) -> Float64[Tensor, "n n"]:
    """A fresh covariance (second moment where `mean` is None) with exact zeros for constant channels."""
    rest = second.to(torch.float64, copy=True)
    if mean is not None:
        rest.addr_(mean.double(), mean.double(), alpha=-1.0)
    _clear(rest, rest.diagonal() <= _rounding(second))
    return rest


def _rounding(second: Float[Tensor, "n n"]) -> Float64[Tensor, " n"]:
    """Below this a channel's remaining variance is rounding: relative to each channel's own second moment."""
    return (len(second) + 64) * _EPS * second.diagonal().double().abs()


def _clear(matrix: Float64[Tensor, "n n"], channels: Bool[Tensor, " n"]) -> None:
    index = channels.nonzero()[:, 0]
    matrix.index_fill_(0, index, 0.0).index_fill_(1, index, 0.0)


def _half_trace(metric: Float64[Tensor, "m m"], residual: Float64[Tensor, "m m"]) -> Float64[Tensor, ""]:
    return 0.5 * torch.dot(metric.reshape(-1), residual.reshape(-1)).clamp(min=0)


def _half_quadratic(rows: Float64[Tensor, "b m"], metric: Float[Tensor, "m m"]) -> Float64[Tensor, " b"]:
    return 0.5 * ((rows.to(metric.dtype) @ metric) * rows).sum(1).clamp(min=0)


def others(chosen: Int64[Tensor, " k"], n: int) -> Int64[Tensor, " n-k"]:
    free = torch.ones(n, dtype=torch.bool, device=chosen.device)
    return free.index_fill_(0, chosen, False).nonzero()[:, 0]


def round_up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def check_finite(**arrays: Tensor | None) -> None:
    problems = [
        f"`{name}` must be finite, got NaN or infinity ({tuple(array.shape)}). "
        "Check the calibration batch and the model's activations on it."
        for name, array in arrays.items()
        if array is not None and not _is_finite(array)
    ]
    if problems:
        raise ArgumentError(problems)


def _is_finite(array: Tensor) -> bool:
    """By sums: one pass each, no copy; in float64 only where the first overflows."""
    return math.isfinite(float(array.sum())) or math.isfinite(float(array.sum(dtype=torch.float64)))
