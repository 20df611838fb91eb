"""One removal, start to end: measure, plan, apply, check, and put back if it hurt. Knows no schedule."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from torch.optim import Optimizer

from .batches import Batch, LossFn, merged
from .bounds import clopper_pearson_upper, mean_upper, standard_error
from .budget import flops, spend
from .calibrate import Moments, measure
from .distributed import ALONE, Ranks
from .errors import ArgumentError
from .evaluation import Evaluation, evaluate, pooled, relative_changes
from .neurons import neuron
from .plan import Certificate, ChannelGroup, CostTerm, Event, Fold, FoldPlan, GroupChange
from .policy import Policy
from .redundancy import (
    Selection,
    first_order,
    first_order_curve,
    fold_blocks,
    others,
    select_blocks,
    select_whole,
    unexplained,
)
from .surgery import Surgery, named_tensors


@dataclass
class Network:
    """A traced model and all that must shrink with it. `groups` follows the removals."""

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    followers: tuple[nn.Module, ...]
    groups: list[ChannelGroup]
    costs: list[CostTerm]
    ranks: Ranks = ALONE

    @property
    def widths(self) -> dict[str, int]:
        return {group.name: group.width for group in self.groups}

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def flops(self) -> float:
        """Forward FLOPs of the example inputs at the present widths."""
        return flops(self.costs, self.widths)

    def prunable(self, floor: int) -> list[ChannelGroup]:
        return [group for group in self.groups if group.prunable and group.width > group.least(floor)]

    def open_costs(self, groups: Sequence[ChannelGroup]) -> list[CostTerm]:
        """Shares of the full network's cost (half FLOPs, half parameters) as functions of the widths of `groups`."""
        names, widths, terms = {group.name for group in groups}, self.widths, []
        full = {group.name: group.full_width for group in self.groups}
        parameters = flops([replace(term, flops=term.parameters) for term in self.costs], full)
        for term in self.costs:
            sides = [term.out_group, term.in_group]
            share = term.flops / flops(self.costs, full) + term.parameters / parameters
            fixed = math.prod(widths[side] for side in sides if side and side not in names)
            out_group, in_group = (side if side in names else None for side in sides)
            terms.append(CostTerm(share / 2 * fixed, out_group, in_group))
        return terms


def remove_(
    network: Network, calibration: Sequence[Batch], held_out: Sequence[Batch], loss_fn: LossFn | None, policy: Policy,
    budget: float | None = None, *, price: float = math.inf, first_loss: float = math.nan, step: int = 0,
) -> Event:  # fmt: skip
    """Plan on `calibration`, apply, check on `held_out`; a removal that breaks a limit is undone and says so.

    Without `budget` it is the policy's tolerance times the level of the loss (its value now, at least a quarter of what
    has been learned), and channels go for `price` (see `plan`) times what has been learned: the fall of the loss since
    `first_loss`, at least a tenth of the level. Without `loss_fn` both are 1.

    Raises:
        ArgumentError: the calibration data is empty, or the model's loss on it isn't finite.
        SurgeryError: the removal failed half-way; everything was put back.
        AbandonedError: it failed on some ranks; everything was put back on all.
        RanksError: a rank was lost; everything was put back.
    """
    start, ranks = time.perf_counter(), network.ranks
    with ranks.together("measuring the loss"):
        calibration, held_out = (_alike(batches, ranks) for batches in (calibration, held_out))
        before = evaluate(network.model, held_out, loss_fn, ranks)
        _check_calibration(calibration, before, loss_fn)
    before = pooled(before, ranks)
    level, learned = (abs(before.loss), first_loss - before.loss) if loss_fn else (1.0, 1.0)
    level = max(level, learned / 4) if learned > 0 else level  # a loss near 0 is no measure of harm
    if budget is None:
        budget, price = policy.tolerance * level, price * (learned if learned > 0.1 * level else 0.1 * level)
    groups = network.prunable(policy.floor)
    moments = measure(network.model, groups, calibration, loss_fn, policy.damping, ranks, backward=0.5)
    groups = [group for group in groups if group.name in moments]
    plans, errors = plan(network, groups, moments, policy, budget, price)
    draft = _draft(network, step, budget, plans, errors)
    if not plans:
        return replace(draft, seconds=ranks.longest(start), reason="nothing is redundant at this price")
    ranks.agree("fold plans", plans)
    with Surgery(network.model, network.optimizers, network.followers, ranks) as surgery:
        with ranks.together("removing neurons"):
            groups = surgery.fold_all_(network.groups, plans)
            after = evaluate(network.model, held_out, loss_fn, ranks)
        after = pooled(after, ranks)
        clip = 10 * math.sqrt(2 * max(0.0, math.fsum(item.predicted - item.first_order for item in plans)))
        certificate = certify(before, after, policy.confidence, clip, ranks)
        increase = certificate.loss_after - certificate.loss_before
        cautious = math.fsum(item.cautious for item in plans)
        reason = judge(certificate, policy, draft.predicted or 0.0, level, cautious)
        if reason is not None:
            surgery.undo_()
            groups = network.groups
        changed = replace(network, groups=groups)
        event = replace(
            draft, widths_after=changed.widths, parameters_after=changed.parameters, flops_after=changed.flops(),
            measured=increase, certificate=certificate, rolled_back=reason is not None, reason=reason,
            seconds=ranks.longest(start),
        )  # fmt: skip
    network.groups = changed.groups
    return event


def _alike(batches: Sequence[Batch], ranks: Ranks) -> list[Batch]:
    """The inputs in fewer batches; as many on every rank where each takes part in the others' forward passes."""
    fewer = merged(batches)
    if ranks.sharded is None:
        return fewer
    numbers = ranks.gather((len(fewer), len(batches)))
    if len({number for number, _ in numbers}) == 1:
        return fewer
    if len({number for _, number in numbers}) > 1:
        raise ArgumentError([f"`inputs` must be as many batches on every rank, got {numbers}. Call `step` everywhere."])
    return list(batches)


def plan(
    network: Network, groups: Sequence[ChannelGroup], moments: dict[str, Moments], policy: Policy,
    budget: float, price: float,
) -> tuple[list[FoldPlan], dict[str, float]]:  # fmt: skip
    """Fold plans that spend where it saves most; and each group's unexplained share of output energy.

    Channels go while the predicted loss increase stays within `budget` and, with a finite `price`, while it costs
    less than `price` for each share of the full network's cost that it saves, and no group by more than the policy's
    steepest factor. The price buys what lasts, the second-order part: training soon learns the first-order part again.
    Without a price the budget is for both.
    """
    priced = math.isfinite(price)
    costs = network.open_costs(groups)
    worth = price * flops(costs, network.widths) ** (1 + policy.concavity)  # of all that the groups still cost
    stop = min(worth / 100, budget / (20 if priced else 500))  # finer differences would not change what is bought
    steepest = policy.steepest if priced else math.inf
    floors = {group.name: max(group.least(policy.floor), math.ceil(group.width / steepest)) for group in groups}
    steps = {group.name: _step(group, policy.multiple) for group in groups}
    named = {group.name: group for group in groups}
    ranks, device = network.ranks, next(network.model.parameters()).device

    def search(name: str) -> tuple[Selection, Float64[Tensor, " k+1"] | None]:
        m, group, limits = moments[name], named[name], {"stop": stop, "floor": floors[name], "multiple": steps[name]}
        if group.entries > 1:
            found = select_whole(m.second, m.mean, m.metric, group.entries, **limits)
        else:
            found = select_blocks(m.second, m.mean, m.metric, group.blocks, **limits)
        if priced:
            return found, None
        order = group.entries_of(found.order)
        sudden = first_order_curve(m.second, m.mean, m.cross, m.slope, order, group.blocks)
        return found, sudden[:: group.entries]

    def refit(name: str) -> tuple[Int64[Tensor, " k"], tuple[Fold, ...], float, float, float]:
        m, group, chosen = moments[name], named[name], searches[name][0].order[: widths[name]].sort().values
        keep = group.entries_of(chosen)
        regression = fold_blocks(m.second, m.mean, keep, group.blocks)
        rest = unexplained(m.second, m.mean, keep, regression)
        own = tuple(fold_blocks(*reader, keep, group.blocks) for reader in m.readers)
        lost = others(keep, len(m.second))
        share = float((m.energy[lost][:, lost] * rest).sum() / torch.dot(m.energy.flatten(), m.second.flatten()))
        sources = m.sources or ((0, m.cross, m.slope),)
        sudden = math.fsum(first_order(cross, slope, keep, (own or (regression,))[i]) for i, cross, slope in sources)
        lasting = 0.5 * max(0.0, float((m.undamped[lost][:, lost] * rest).sum()))
        return chosen, (regression, *own), share, sudden, lasting

    searches = ranks.shared({g.name: g.width**3 for g in groups}, search, "searching", device)
    curves = {
        g.name: searches[g.name][0].curve(g.width, floors[g.name]) * overfit(g, moments[g.name].samples) for g in groups
    }
    asked = {name: _with_first_order(curve, searches[name][1]) for name, curve in curves.items()}
    widths = spend(
        asked, costs, budget=budget, multiple=steps, floor=floors,
        least_worth=1 / price if price > 0 else math.inf, concavity=policy.concavity,
    )  # fmt: skip
    narrowed = {g.name: widths[g.name] ** 3 for g in groups if widths[g.name] < g.width}
    refits, plans, errors = ranks.shared(narrowed, refit, "folding", device), [], {}
    for group in (g for g in groups if g.name in refits):
        keep, (regression, *own), errors[group.name], sudden, lasting = refits[group.name]
        folds = tuple(own or [regression] * len(group.consumers))
        scaled = pacemakers(network, group) if policy.rebalance else ()
        scale = regression.coeffs.square().sum(0).sqrt() if scaled else None
        if scale is not None:
            folds = tuple(Fold(each.coeffs / scale, each.shift) for each in folds)
        width = widths[group.name]
        lasting *= float(overfit(group, moments[group.name].samples)[width])
        plans.append(
            FoldPlan(
                group.name, keep, folds, scale, scaled, lasting + sudden, first_order=sudden,
                cautious=float(curves[group.name][width]) + sudden,
            )
        )  # fmt: skip
    return _without_noise(plans, max((m.noise for m in moments.values()), default=0.0)), errors


def _without_noise(plans: Sequence[FoldPlan], noise: float) -> list[FoldPlan]:
    """The plans with first-order parts shrunk by the positive-part James-Stein factor of their sum (Statement 13)."""
    sudden = math.fsum(item.first_order for item in plans)
    lasting = math.fsum(item.predicted - item.first_order for item in plans)
    share = max(0.0, 1 - noise * lasting / sudden**2) if sudden else 0.0
    return [
        replace(
            item, predicted=item.predicted + (share - 1) * item.first_order, first_order=share * item.first_order,
            cautious=item.cautious + max(0.0, (share - 1) * item.first_order),
        )
        for item in plans
    ]  # fmt: skip


def _step(group: ChannelGroup, multiple: int) -> int:
    """Widths go in steps of the hardware's multiple, in each block if its blocks are wide enough."""
    if group.blocks == 1:
        return max(1, multiple // group.entries)
    return group.blocks * (multiple if group.width // group.blocks > 2 * multiple else 1)


def _with_first_order(
    curve: Float64[Tensor, " n+1"], sudden: Float64[Tensor, " k+1"] | None
) -> Float64[Tensor, " n+1"]:
    """The curve and the largest first-order increase at any greater width, so that it still never rises with width."""
    if sudden is None:
        return curve
    sudden = torch.cat([sudden, sudden[-1].expand(len(curve) - len(sudden))]).clamp(min=0)
    sudden[-1] = 0.0
    return curve + sudden.flip(0).cummax(0).values.flip(0).to(curve.device)


def overfit(group: ChannelGroup, samples: int) -> Float64[Tensor, " n+1"]:
    """How much more a regression on 0 ... n survivors leaves unexplained on new data (generalised cross-validation)."""
    used = torch.arange(group.width + 1, dtype=torch.float64) * group.entries / max(samples, 1)
    return (1 - used.clamp(max=0.9)) ** -2


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


def judge(certificate: Certificate, policy: Policy, predicted: float, level: float, cautious: float) -> str | None:
    """Why the removal must be undone (None if it need not). `level`: the loss that the tolerance is a share of.

    `cautious`: the prediction that the search made and the guard goes by; `predicted` follows from the fold itself, so
    it would excuse a fold that isn't what was searched for.
    """
    increase, share = certificate.loss_after - certificate.loss_before, certificate.changed_upper
    if not math.isfinite(increase):
        return "the loss on held-out data is no longer finite"
    if increase - 3 * certificate.error > policy.guard * max(0.0, cautious) + policy.tolerance * level:
        return (
            f"the loss on held-out data rose by {increase:.3g} (standard error {certificate.error:.1g}), not by "
            f"{predicted:.3g} as predicted"
        )
    limits = (
        ("a loss increase within", policy.max_loss_increase, certificate.loss_upper),
        ("a share of changed predictions within", policy.max_changed_predictions, share),
    )
    for what, most, upper in limits:
        if most is not None and (upper is None or upper > most):
            found = "there are no classes" if upper is None else f"upper limit {upper:.3g}"
            return f"{what} {most:g} can't be shown at confidence {policy.confidence:g} ({found})"
    return None


def certify(before: Evaluation, after: Evaluation, confidence: float, clip: float, ranks: Ranks = ALONE) -> Certificate:
    """What held-out data shows of a removal: the loss change, and upper limits on it and on changed predictions.

    `clip`: at which changes of a single input's loss are clipped, chosen without that data.
    """
    known = math.isfinite(before.loss)
    changes = after.units - before.units if known else relative_changes(before, after, ranks)
    loss = (before.loss, after.loss) if known else (0.0, float(changes.mean()))
    error, loss_upper, changed, changed_upper = 0.0, None, None, None
    if bool(changes.isfinite().all()):
        error, loss_upper = standard_error(changes), mean_upper(changes, confidence, clip)
    if before.predictions is not None and after.predictions is not None and len(before.predictions):
        changed = int((before.predictions != after.predictions).sum())
        changed_upper = clopper_pearson_upper(changed, len(before.predictions), confidence)
    return Certificate(
        before.samples, *loss, changed, changed_upper, confidence, error=error, loss_upper=loss_upper, clip=clip
    )


def _draft(
    network: Network, step: int, budget: float | None, plans: Sequence[FoldPlan], errors: dict[str, float]
) -> Event:
    widths, size, cost = network.widths, network.parameters, network.flops()
    changes = tuple(
        GroupChange(
            item.group, widths[item.group], len(item.keep), item.predicted, item.bound, errors[item.group],
            item.first_order,
        )
        for item in plans
    )  # fmt: skip
    return Event(
        step, changes, widths, widths, size, size, cost, cost, 0.0, budget,
        math.fsum(item.predicted for item in plans) if plans else None, None, None, None,
    )  # fmt: skip


def abandoned(network: Network, step: int, reason: str) -> Event:
    """The event of a removal that failed on some ranks: it says why, and that nothing was changed."""
    return replace(_draft(network, step, None, (), {}), rolled_back=True, reason=reason)


def _check_calibration(calibration: Sequence[Batch], before: Evaluation, loss_fn: LossFn | None) -> None:
    problems = []
    if not sum(batch.size for batch in calibration) or not before.samples:
        problems.append("`inputs` must hold at least one input, got an empty batch. Pass a batch of training data.")
    elif not all(bool(output.isfinite().all()) for output in before.outputs):
        problems.append("`inputs` must give finite outputs, got NaN or infinity. Check the data and the weights.")
    elif loss_fn is not None and not math.isfinite(before.loss):
        problems.append(f"`loss_fn` must give a finite loss, got {before.loss}. Check the targets.")
    if problems:
        raise ArgumentError(problems)
