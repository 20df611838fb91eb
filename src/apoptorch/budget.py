"""How many channels each group keeps: one budget for the whole network, spent where it saves most."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from .plan import CostTerm


def flops(costs: Sequence[CostTerm], widths: Mapping[str, int]) -> float:
    """Cost of one forward pass at these widths, in the unit of `CostTerm.flops` (FLOPs, or milliseconds)."""
    return math.fsum(
        term.flops * math.prod(widths[group] for group in (term.out_group, term.in_group) if group) for term in costs
    )


def spend(
    curves: Mapping[str, Float64[Tensor, " n+1"]],
    costs: Sequence[CostTerm],
    *,
    budget: float,
    multiple: int | Mapping[str, int] = 8,
    floor: int | Mapping[str, int] = 1,
    least_worth: float = 0.0,
) -> dict[str, int]:
    """Widths that save the most cost while the predicted errors sum to at most `budget`.

    Greedy: of all steps of all groups to any allowed smaller width, the one that saves most per error is
    taken (so a locally steep curve is stepped over, as on its convex hull), until none is affordable. A cost
    is a product of two widths, so savings are evaluated anew as widths change. More budget never means more
    cost: a step that is not affordable had a better ratio, and a higher price, than all bought in its stead.

    Args:
        curves: for each group the predicted error at width 0 ... n; inf where not allowed, 0 at n.
        costs: `CostTerm.flops` may hold measured milliseconds per channel product instead of FLOPs: only
            ratios matter. Every group named here needs a curve; one that may not shrink has inf below n.
        multiple: allowed widths are its multiples, and the full width whatever it is.
        floor: least width.
        least_worth: steps that save less cost than this per error are not taken.
    """
    curves = {name: curve.cpu() for name, curve in curves.items()}  # read number by number below
    terms = {name: [term for term in costs if name in (term.out_group, term.in_group)] for name in curves}
    allowed = {name: _allowed(curve, _of(multiple, name), _of(floor, name)) for name, curve in curves.items()}
    widths = {name: len(curve) - 1 for name, curve in curves.items()}
    spent = dict.fromkeys(curves, 0.0)
    steps: dict[str, _Step] = {}
    worth: dict[str, tuple[float, float]] = {}
    while True:
        left = max(0.0, budget - math.fsum(spent.values()))
        for name, curve in curves.items():
            # A group's best step stays so until taken or unaffordable: the others only scale its worth.
            if name not in steps or steps[name].price > left:
                steps[name] = _best_step(widths[name], curve, spent[name], allowed[name], left)
                worth.pop(name, None)
            if name not in worth:
                worth[name] = _worth(name, steps[name], terms[name], widths)
        name = max(worth, key=worth.__getitem__, default=None)
        if name is None or worth[name][0] <= least_worth:
            return widths
        widths[name] = steps.pop(name).width
        spent[name] = float(curves[name][widths[name]])
        for neighbour in (group for term in terms[name] for group in (term.out_group, term.in_group)):
            worth.pop(neighbour or "", None)


class _Step(NamedTuple):
    rate: float  # channels saved per error
    price: float  # error
    width: int


def _best_step(
    width: int, curve: Float64[Tensor, " n+1"], spent: float, allowed: Int64[Tensor, " m"], left: float
) -> _Step:
    """The affordable step that saves most channels per error; of rate 0 if there is none."""
    allowed = allowed[allowed < width]
    price = (curve[allowed] - spent).clamp(min=0)
    rate = torch.where((price <= left) & price.isfinite(), (width - allowed) / price, 0.0)
    if len(allowed) == 0:
        return _Step(0.0, 0.0, width)
    best = int(rate.argmax())  # the first, so the longest, of equally good ones
    return _Step(float(rate[best]), float(price[best]), int(allowed[best]))


def _worth(name: str, step: _Step, terms: Sequence[CostTerm], widths: Mapping[str, int]) -> tuple[float, float]:
    """(saved cost per error, saved cost) of a step."""
    slope = 0.0  # saved cost per channel
    for term in terms:
        other = term.in_group if term.out_group == name else term.out_group
        slope += term.flops * (widths[name] + step.width if other == name else widths[other] if other else 1)
    saved = slope * (widths[name] - step.width)
    # What costs no error always goes, even where it saves nothing.
    return (step.rate if math.isinf(step.rate) else step.rate * slope), saved


def _allowed(curve: Float64[Tensor, " n+1"], multiple: int, floor: int) -> Int64[Tensor, " m"]:
    n, least = len(curve) - 1, multiple * math.ceil(max(floor, 1) / multiple)
    return torch.arange(least, max(least, n), multiple, device=curve.device)


def _of(value: int | Mapping[str, int], name: str) -> int:
    return value if isinstance(value, int) else value[name]
