"""One removal, start to end: measure, plan, apply, check, and put back if it hurt. Knows no schedule."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

from .batches import Batch, LossFn, merged
from .bounds import clopper_pearson_upper, mean_upper, standard_error
from .calibrate import measure
from .distributed import ALONE, Ranks
from .errors import ArgumentError
from .evaluation import Evaluation, evaluate, pooled, relative_changes
from .network import Network
from .plan import Certificate, Event, FoldPlan, GroupChange
from .planning import plan
from .policy import Policy
from .surgery import Surgery


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
    plans, errors, foreseen, kept = plan(network, groups, moments, policy, budget, price)
    draft = replace(_draft(network, step, budget, plans, errors), foreseen=foreseen, notes=kept)
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
        changed = network.narrowed(groups)
        event = replace(
            draft, widths_after=changed.widths, parameters_after=changed.parameters, flops_after=changed.flops(),
            measured=increase, certificate=certificate, rolled_back=reason is not None, reason=reason,
            seconds=ranks.longest(start),
        )  # fmt: skip
    network.groups, network.costs = changed.groups, changed.costs
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
            item.group, widths[item.group], len(item.keep), item.predicted, item.bound,
            errors[item.group] if math.isfinite(errors[item.group]) else None, item.first_order,
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
