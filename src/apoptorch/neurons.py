"""Neuron types: what of each activation function is known in closed form.

Each entry of `NEURONS` is keyed by its ATen op and gives, for the op's default constants, the sharp Lipschitz
constant, positive homogeneity and the reflection identity. `neuron("elu(0.5)")` resolves other constants. Statements
are those of docs/theory.md; the table of statement 2 has a row for every rule of this file.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Elementwise = Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]


@dataclass(frozen=True)
class Neuron:
    """An elementwise function f and its closed-form properties (Statement 2).

    Attributes:
        lipschitz: least L with |f(y) - f(z)| <= L |y - z|, rounded up at 1e-7; inf where there is none.
        homogeneous: f(c z) = c f(z) for all c >= 0; f(0) = 0.
        reflection: (sign, offset) with f(-z) = sign f(z) + offset for all z, or None.
        monotone: f never rises or never falls, so that its range over an interval is that of the end points.
        function: f itself; None where it is not known.
        name: ATen op, with its constants where given ("elu(0.5)").
    """

    lipschitz: float = math.inf
    homogeneous: bool = False
    reflection: tuple[float, float] | None = None
    monotone: bool = False
    function: Elementwise | None = field(default=None, compare=False)
    name: str = ""


ODD, EVEN = (-1.0, 0.0), (1.0, 0.0)
_RULES: dict[str, Callable[..., Neuron]] = {}


def _rule(make: Callable[..., Neuron]) -> Callable[..., Neuron]:
    _RULES[make.__name__.strip("_")] = make
    return make


def neuron(spec: str) -> Neuron:
    """The neuron type that `ChannelGroup.neuron` names: an ATen op, "elu(0.5)" with constants in order (Statement 2).

    One without any known property (lipschitz inf, no function) if the op or its constants are not known.

    >>> neuron("leaky_relu(0.2)").homogeneous
    True
    >>> neuron("general").lipschitz
    inf
    """
    name, _, constants = spec.removesuffix(")").partition("(")
    try:
        made = _RULES[name](*(_number(constant) for constant in constants.split(", ") if constant))
    except (KeyError, TypeError):
        return Neuron(name=spec)
    return replace(made, name=spec)


def activation(spec: str) -> Elementwise:
    """The function of a known neuron type (Statement 2); KeyError for any other."""
    if (function := neuron(spec).function) is None:
        raise KeyError(spec)
    return function


def reach(rows: Float[Tensor, "*batch d+1"], input_norm: float) -> Float[Tensor, "*batch"]:
    """Largest |w.x + b| over all |x| <= input_norm, for rows (w, b): |w| input_norm + |b| (Statement 1).

    Attained at x = +-input_norm w / |w|. Never above the Cauchy-Schwarz bound |(w, b)| |(x, 1)|.
    """
    return input_norm * rows[..., :-1].norm(dim=-1) + rows[..., -1].abs()


def range_error(
    known: Neuron, rows: Float[Tensor, "n d+1"], input_norm: float, constant: bool
) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """(error, value): |f(w.x + b) - value| <= error for all |x| <= input_norm; value is 0 unless `constant`
    (Statement 3).

    w.x + b stays within |w| input_norm of b. A monotone f then stays between its values at both ends, and half
    their distance is attained; for any other f, |f(z) - f(b)| <= L |z - b|. Zero for dead neurons (ReLU that no
    input reaches) and constant ones (w = 0).
    """
    centre, radius = rows[:, -1], input_norm * rows[:, :-1].norm(dim=-1)
    if known.function is None:  # homogeneous ones still have f(0) = 0
        zero = (reach(rows, input_norm) == 0) & known.homogeneous
        return torch.where(zero, 0.0, torch.inf).to(rows), torch.zeros_like(centre)
    if known.monotone:
        low, high = known.function(centre - radius), known.function(centre + radius)
    else:
        value, change = known.function(centre), product(known.lipschitz, radius)
        low, high = value - change, value + change
    if not constant:
        return torch.maximum(low.abs(), high.abs()), torch.zeros_like(centre)
    error = torch.where(low == high, 0.0, (high - low).abs() / 2)  # also where both are infinite
    return error, torch.where(error.isfinite(), (low + high) / 2, 0.0)


def product(scale: float | Float[Tensor, "*batch"], error: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """scale * error, where no error is no error even at an infinite scale, and nothing weighs nothing (Statement 5)."""
    scale = torch.as_tensor(scale, dtype=error.dtype, device=error.device)
    return torch.where((error == 0) | (scale == 0), 0.0, scale * error)


def _number(constant: str) -> float | str:
    try:
        return float(constant)
    except ValueError:
        return constant


# One rule per op, with ATen's constants. L is the largest |f'|, attained or approached where the comment says.


@_rule
def linear() -> Neuron:
    return Neuron(1.0, True, ODD, True, lambda z: z)


@_rule
def neg() -> Neuron:
    return Neuron(1.0, True, ODD, True, torch.neg)


@_rule
def abs_() -> Neuron:
    return Neuron(1.0, True, EVEN, False, torch.abs)


@_rule
def relu() -> Neuron:
    return Neuron(1.0, True, None, True, torch.relu)


@_rule
def leaky_relu(slope: float = 0.01) -> Neuron:
    return Neuron(max(1.0, abs(slope)), True, None, slope >= 0, lambda z: F.leaky_relu(z, slope))


@_rule
def prelu(slope: float = math.nan) -> Neuron:
    """The slope is trained: give its value, prelu(0.25); without it only homogeneity is known."""
    return Neuron(math.inf, True) if math.isnan(slope) else leaky_relu(slope)


@_rule
def rrelu(lower: float = 1 / 8, upper: float = 1 / 3) -> Neuron:
    """In eval mode; in training the slope is random."""
    return leaky_relu((lower + upper) / 2)


@_rule
def threshold(at: float, value: float) -> Neuron:
    continuous = at == value
    return Neuron(
        1.0 if continuous else math.inf,
        at == value == 0,
        monotone=value <= at,
        function=lambda z: F.threshold(z, at, value),
    )


@_rule
def clamp_min(least: float) -> Neuron:
    return Neuron(1.0, least == 0, None, True, lambda z: z.clamp(min=least))


@_rule
def clamp_max(most: float) -> Neuron:
    return Neuron(1.0, most == 0, None, True, lambda z: z.clamp(max=most))


@_rule
def hardtanh(least: float = -1.0, most: float = 1.0) -> Neuron:
    return Neuron(1.0, False, ODD if least == -most else None, True, lambda z: z.clamp(least, most))


_RULES["clamp"] = lambda least, most: hardtanh(least, most)  # with both limits; with one it is not known which


@_rule
def relu6() -> Neuron:
    return hardtanh(0.0, 6.0)


@_rule
def sigmoid() -> Neuron:
    return Neuron(0.25, False, (-1.0, 1.0), True, torch.sigmoid)  # at 0


@_rule
def hardsigmoid() -> Neuron:
    # relu6(z + 3) / 6: the next float above 1/6 is sharp for any use
    return Neuron(math.nextafter(1 / 6, 1), False, (-1.0, 1.0), True, F.hardsigmoid)


@_rule
def tanh() -> Neuron:
    return Neuron(1.0, False, ODD, True, torch.tanh)  # at 0


@_rule
def log_sigmoid() -> Neuron:
    return Neuron(1.0, False, None, True, F.logsigmoid)  # f' = sigmoid(-z), as z -> -inf


@_rule
def softplus(beta: float = 1.0, threshold: float = 20.0) -> Neuron:
    # f' = sigmoid(beta z), as z -> inf. Beyond the threshold torch uses z itself, a jump by
    # log1p(exp(-threshold)) / beta: 2e-9 at the default 20, rounding in float32; not negligible if set lower.
    smooth = threshold >= 20 and beta > 0
    return Neuron(1.0 if smooth else math.inf, False, None, smooth, lambda z: F.softplus(z, beta, threshold))


@_rule
def elu(alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Neuron:
    # scale z above 0, scale alpha (exp(input_scale z) - 1) below: steepest at 0 on either side
    below = alpha * input_scale
    return Neuron(
        abs(scale) * max(1.0, abs(below)) if input_scale >= 0 else math.inf,
        False,
        None,
        below >= 0,
        lambda z: torch.ops.aten.elu(z, alpha, scale, input_scale),
    )


@_rule
def selu() -> Neuron:
    return Neuron(1.7580994, False, None, True, F.selu)  # scale alpha = 1.75809934..., at 0-


@_rule
def celu(alpha: float = 1.0) -> Neuron:
    # f' = exp(z / alpha) below 0, 1 above
    return Neuron(1.0 if alpha > 0 else math.inf, False, None, alpha > 0, lambda z: F.celu(z, alpha))


@_rule
def gelu(approximate: str = "none") -> Neuron:
    # f' = Phi + z phi is largest where f'' = (2 - z^2) phi = 0: Phi(sqrt 2) + sqrt 2 phi(sqrt 2) = 1.12890415;
    # the tanh form at z = 1.41850401: 1.12899307
    lipschitz = 1.1289042 if approximate == "none" else 1.1289931
    return Neuron(lipschitz, False, None, False, lambda z: F.gelu(z, approximate=approximate))


@_rule
def silu() -> Neuron:
    return Neuron(1.0998394, False, None, False, F.silu)  # 1.09983932 at z = 2.39935728


@_rule
def mish() -> Neuron:
    return Neuron(1.0884982, False, None, False, F.mish)  # 1.08849816 at z = 1.49057118


@_rule
def hardswish() -> Neuron:
    return Neuron(1.5, False, None, False, F.hardswish)  # (2 z + 3) / 6 at z = 3-


@_rule
def hardshrink(limit: float = 0.5) -> Neuron:
    return Neuron(math.inf, limit == 0, ODD, True, lambda z: F.hardshrink(z, limit))  # jumps by `limit`


@_rule
def softshrink(limit: float = 0.5) -> Neuron:
    return Neuron(1.0, limit == 0, ODD, True, lambda z: F.softshrink(z, limit))


@_rule
def softsign() -> Neuron:
    return Neuron(1.0, False, ODD, True, F.softsign)  # (1 + |z|)^-2 at 0


@_rule
def tanhshrink() -> Neuron:
    return Neuron(1.0, False, ODD, True, F.tanhshrink)  # f' = tanh^2, as |z| -> inf


@_rule
def sin() -> Neuron:
    return Neuron(1.0, False, ODD, False, torch.sin)


@_rule
def cos() -> Neuron:
    return Neuron(1.0, False, EVEN, False, torch.cos)


@_rule
def erf() -> Neuron:
    return Neuron(1.1283792, False, ODD, True, torch.erf)  # 2 / sqrt(pi) = 1.12837917 at 0


NEURONS: dict[str, Neuron] = {
    name: neuron(name) for name in _RULES if name not in ("threshold", "clamp", "clamp_min", "clamp_max")
}
