"""What one removal takes from each group: curves of what each width costs, one budget spent on them, and the folds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn

from .budget import flops, spend
from .calibrate import Moments
from .network import Network
from .neurons import neuron
from .plan import ChannelGroup, Fold, FoldPlan
from .policy import Policy
from .redundancy import (
    MOST_USED,
    Selection,
    directions_blocks,
    first_order,
    first_order_curve,
    fold_blocks,
    others,
    overfit,
    select_blocks,
    select_whole,
    unexplained,
)  # fmt: skip
from .surgery import named_tensors

_NOTHING = 1e-6  # of what all channels are worth: the rounding of float32 moments


class Plans(NamedTuple):
    """What one removal takes.

    folds: one for each group that shrinks. unexplained: the share of output energy that it leaves unexplained, by
    group. foreseen: the share of the FLOPs left that twice the price and budget would take, half of each group that
    only `steepest` stopped. kept: by group, why only what costs nothing could go.
    """

    folds: list[FoldPlan]
    unexplained: dict[str, float]
    foreseen: float
    kept: dict[str, str]


def plan(
    network: Network, groups: Sequence[ChannelGroup], moments: dict[str, Moments], policy: Policy,
    budget: float, price: float,
) -> Plans:  # fmt: skip
    """Spends where it saves most.

    Channels go while the predicted loss increase stays within `budget` and, with a finite `price`, while it costs
    less than `price` for each share of the full network's cost that it saves, and no group by more than the policy's
    steepest factor or, unless what goes costs nothing, below the policy's room. The price buys what lasts, the
    second-order part: training soon learns the first-order part again. Without a price the budget is for both.
    """
    priced, ranks, device = math.isfinite(price), network.ranks, next(network.model.parameters()).device
    tensors, now = named_tensors(network.model), network.widths
    costs, named = network.open_costs(groups), {group.name: group for group in groups}
    lowest = {group.name: group.least(policy.floor) for group in groups}
    room = policy.room if priced else 0.0
    roomy = {g.name: min(g.width, math.ceil(room * _directions(g, moments[g.name]))) if room else 0 for g in groups}
    gentle = {group.name: math.ceil(group.width / policy.steepest) if priced else 0 for group in groups}
    floors = {name: max(lowest[name], roomy[name], gentle[name]) for name in lowest}
    steps = {group.name: _step(group, policy.multiple or _vector(group, tensors)) for group in groups}
    whole = flops(costs, now)

    def finest(name: str) -> float:
        """Finer differences would not change what is bought of this group."""
        saved = whole - flops(costs, now | {name: floors[name]})
        return min(price * saved / 50, budget / 20) if priced else budget / 500

    def search(name: str) -> tuple[Selection, Float64[Tensor, " k+1"] | None]:
        group, m = named[name], moments[name]
        found = _search(group, m, stop=finest(name), floor=floors[name], multiple=steps[name])
        return found, None if priced else _first_orders(group, m, found)

    def refit(name: str) -> tuple[FoldPlan, float]:
        keep = searches[name][0].order[: widths[name]].sort().values
        cautious = float(curves[name][widths[name]])
        scaled = pacemakers(network, named[name]) if policy.rebalance else ()
        return _refit(named[name], moments[name], keep, cautious, scaled)

    searches = ranks.shared({g.name: g.width**3 for g in groups}, search, "searching", device)
    differ = {name: int((found.error > _NOTHING * found.error[0]).sum()) for name, (found, _) in searches.items()}
    least = {name: max(lowest[name], min(roomy[name], differ[name])) for name in lowest}
    floors = {name: max(least[name], gentle[name]) for name in lowest}
    curves = {g.name: _curve(g, moments[g.name], searches[g.name][0], floors[g.name]) for g in groups}
    asked = {name: _with_first_order(curve, searches[name][1]) for name, curve in curves.items()}
    least_worth = 1 / price if price > 0 else math.inf
    spending = partial(spend, asked, costs, multiple=steps, floor=floors)
    widths = spending(budget=budget, least_worth=least_worth)
    doubled = spending(budget=2 * budget, least_worth=least_worth / 2)
    narrowed = {g.name: widths[g.name] ** 3 for g in groups if widths[g.name] < g.width}
    refits = ranks.shared(narrowed, refit, "folding", device)
    plans = [refits[name][0] for name in narrowed]
    noise = max((m.noise for m in moments.values()), default=0.0)
    stopped = [name for name, floor in floors.items() if least[name] < floor > widths[name] - steps[name]]
    doubled |= {name: max(least[name], widths[name] // 2) for name in stopped}
    foreseen = 1 - flops(network.costs, now | doubled) / flops(network.costs, now | widths)
    errors = {name: refits[name][1] for name in narrowed}
    kept = {name: _kept(width, room) for name, width in roomy.items() if width == now[name]}
    return Plans(_without_noise(plans, noise), errors, foreseen, kept)


def _directions(group: ChannelGroup, m: Moments) -> float:
    """In how many directions, for each entry of a channel, training moves the linear layers that read the group
    (Statement 22); 0 where something else reads it.
    """
    if not m.linear or group.gate is not None:
        return 0.0
    return directions_blocks(m.second, m.mean, m.undamped, group.experts) / group.entries


def _kept(width: int, room: float) -> str:
    return (
        f"training moves what reads it in {width / room:.0f} directions or more, and {room:g} channels are kept for "
        "each; try policy='aggressive', or Policy(room=0)"
    )


def _search(group: ChannelGroup, m: Moments, *, stop: float, floor: int, multiple: int) -> Selection:
    if group.entries > 1:
        return select_whole(m.second, m.mean, m.metric, group.entries, stop=stop, floor=floor, multiple=multiple)
    samples = m.shares if group.experts > 1 else ()
    return select_blocks(
        m.second, m.mean, m.metric, group.blocks, stop=stop, floor=floor, multiple=multiple, samples=samples
    )


def _first_orders(group: ChannelGroup, m: Moments, found: Selection) -> Float64[Tensor, " k+1"]:
    order = group.entries_of(found.order)
    return first_order_curve(m.second, m.mean, m.cross, m.slope, order, group.blocks)[:: group.entries]


def _refit(
    group: ChannelGroup, m: Moments, chosen: Int64[Tensor, " k"], cautious: float, scaled: tuple[str, ...]
) -> tuple[FoldPlan, float]:
    """The plan that keeps `chosen`, and the share of the consumers' output energy that it leaves unexplained."""
    keep = group.entries_of(chosen)
    regression = fold_blocks(m.second, m.mean, keep, group.blocks)
    rest, lost = unexplained(m.second, m.mean, keep, regression), others(keep, len(m.second))
    own = [fold_blocks(*reader, keep, group.blocks) for reader in m.readers]
    share = float((m.energy[lost][:, lost] * rest).sum() / torch.dot(m.energy.flatten(), m.second.flatten()))
    sources = m.sources or ((0, m.cross, m.slope),)
    sudden = math.fsum(first_order(cross, slope, keep, (own or [regression])[i]) for i, cross, slope in sources)
    used, each = len(keep) // len(m.shares), len(m.second) // len(m.shares)  # of one expert
    ratios = torch.stack([overfit(used, samples)[-1] for samples in m.shares]).to(rest).repeat_interleave(each)
    lasting = 0.5 * max(0.0, float(((m.half_damped[lost][:, lost] * rest).sum(1) * ratios[lost]).sum()))
    folds, scale = own or [regression] * len(group.consumers), None
    if scaled:
        scale = regression.coeffs.square().sum(0).sqrt()
        folds = [Fold(each.coeffs / scale, each.shift) for each in folds]
    plan = FoldPlan(
        group.name, chosen, tuple(folds), scale, scaled, lasting + sudden, first_order=sudden,
        cautious=cautious + sudden,
    )  # fmt: skip
    return plan, share


def _without_noise(plans: Sequence[FoldPlan], noise: float) -> list[FoldPlan]:
    """The plans with first-order parts shrunk, by the noise of their sum, to what is expected without data: their
    second-order parts. A fall of the loss is not believed unless there is no noise (Statement 13).
    """
    sudden = math.fsum(item.first_order for item in plans)
    lasting = math.fsum(item.predicted - item.first_order for item in plans)
    known = lasting / (lasting + noise) if noise else 1.0
    falls = known * sudden + (1 - known) * lasting < 0 < noise
    result = []
    for item in plans:
        second = item.predicted - item.first_order
        first = 0.0 if falls else known * item.first_order + (1 - known) * second
        cautious = item.cautious + max(0.0, first - item.first_order)
        result.append(replace(item, predicted=second + first, first_order=first, cautious=cautious))
    return result


def _vector(group: ChannelGroup, tensors: Mapping[str, Tensor]) -> int:
    """How many channels the hardware takes at a time: a CPU's convolutions the floats of a register, at full price."""
    read = [tensors[slot.tensor] for slot in group.slots if slot.tensor in tensors]
    convolved = any(tensor.ndim > 3 and tensor.device.type == "cpu" for tensor in read)
    registers = torch.backends.cpu.get_cpu_capability() == "AVX512" and group.full_width // group.blocks >= 64
    return 16 if convolved and registers else 8


def _step(group: ChannelGroup, multiple: int) -> int:
    """Widths go in steps of the hardware's multiple, in each block if its blocks are wide enough."""
    if group.gate is not None:
        return 1
    if group.blocks == 1:
        return math.lcm(max(1, multiple // group.entries), group.multiple)
    return group.blocks * math.lcm(multiple if group.width // group.blocks > 2 * multiple else 1, group.multiple)


def _with_first_order(
    curve: Float64[Tensor, " n+1"], sudden: Float64[Tensor, " k+1"] | None
) -> Float64[Tensor, " n+1"]:
    """The curve and the largest first-order increase at any greater width, so that it still never rises with width."""
    if sudden is None:
        return curve
    sudden = torch.cat([sudden, sudden[-1].expand(len(curve) - len(sudden))]).clamp(min=0)
    sudden[-1] = 0.0
    return curve + sudden.flip(0).cummax(0).values.flip(0).to(curve.device)


def _curve(group: ChannelGroup, m: Moments, found: Selection, floor: int) -> Float64[Tensor, " n+1"]:
    """Predicted loss increase on new data at every width. Of experts, `select_blocks` has told it; inf where one of
    them saw too few samples to fit so many survivors."""
    curve = found.curve(group.width, floor)
    if group.experts == 1:
        return curve * overfit(group.width * group.entries, m.samples)[:: group.entries].to(curve.device)
    few = torch.arange(group.width + 1, device=curve.device) > MOST_USED * min(m.shares) * group.experts
    few[-1] = False
    return curve.masked_fill(few, math.inf)


def pacemakers(network: Network, group: ChannelGroup) -> tuple[str, ...]:
    """Tensors that scale the group's channels, where scaling keeps the pace of learning; () where it doesn't.

    Under plain gradient descent a positively homogeneous neuron that stands for several learns too slowly; scaled by
    the root of its squared coefficients, and its columns by the inverse, it learns as they did together
    (docs/theory.md). Adaptive optimizers don't depend on the scale.
    """
    plain = network.optimizers and all(isinstance(optimizer, torch.optim.SGD) for optimizer in network.optimizers)
    if not plain or not neuron(group.neuron).homogeneous:
        return ()
    tensors = named_tensors(network.model)
    slots = [slot.tensor for slot in group.passthrough if isinstance(tensors.get(slot.tensor), nn.Parameter)]
    slots = slots or [slot.tensor for slot in group.producers]
    return tuple(slots) if len(slots) <= 2 and "parametrizations" not in "".join(slots) else ()
