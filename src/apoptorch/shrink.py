"""`shrink` removes the redundant neurons of a trained model, once: by data, or by its weights alone."""

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import checks
from .batches import Batch, LossFn, split
from .bounds import may_flip
from .closed_form import Outcome, fold_chain_, rounding
from .discovery import discovered
from .evaluation import evaluate
from .graph import trace_chain
from .network import Network
from .plan import Event, GroupChange
from .policy import POLICIES
from .removal import remove_
from .surgery import Surgery


def shrink(
    model: nn.Module, calibration: Iterable[Any] | None = None, *, example_inputs: Any, budget: float | None = None,
    bound: float | None = None, input_norm: float | None = None, loss_fn: LossFn | None = None,
) -> Event:  # fmt: skip
    """Remove what is redundant in a trained model, in place, and say what it may cost. Modes and names stay.

    With `calibration` neurons are folded by regression on that data, and a removal that hurts held-out data more than
    predicted is undone. Without, only closed forms are used: dead, constant, parallel, close and reflected neurons and
    gated units, in models that are one chain of layers (`closed_form`); dropout counts as off, batch norm must be in
    eval mode.

    Args:
        model: the network; a model in eval mode is calibrated in eval mode.
        calibration: batches, each a tensor, a tuple of positional or a dict of keyword arguments; with `loss_fn` a
            pair (inputs, targets). The first few thousand inputs are used: two thirds to plan, one third to judge.
        example_inputs: one batch, as a batch without targets.
        budget: with `calibration`, what the search may predict the loss to rise by, in its units (without `loss_fn`:
            relative mean squared change of the output). What held-out data then shows may be more, but for `guard` and
            `tolerance` of policy "normal", beyond which all is undone; it is in `event.measured` and, with its limit,
            in `event.certificate`. None: as much as that policy finds the saved cost to be worth.
        bound: without `calibration`, limit on the change of the output (Euclidean norm, one input). None: what
            rounding may change of the model's output on `example_inputs` (`closed_form.rounding`), so that only exact
            redundancy goes.
        input_norm: without `calibration`, largest Euclidean norm of one input for which `bound` must hold. None: that
            of `example_inputs`, which should then be real data.
        loss_fn: `loss_fn(output, targets)` -> mean loss.

    Returns:
        The event. With data it has `measured` and `certificate`. Without, `bound`: no input of norm up to `input_norm`
        changes the output by more, but for rounding; and `notes`: why groups have no closed form. If nothing went,
        `reason` says why.

    Raises:
        ArgumentError: something is wrong with the arguments; all problems together. Nothing was changed.
        ExportError: the model can't be captured by torch.export.
        SurgeryError: the removal failed half-way; everything was put back.
    """
    checks.checked(checks.model_problems(model))
    model = checks.uncompiled(model)
    args, kwargs = checks.as_call(example_inputs)
    checks.checked([
        *checks.moment_problems(None), *checks.call_problems(model, args, kwargs),
        *checks.data_problems(tree_leaves((args, kwargs)), "example_inputs"), *_weight_problems(model),
        *_setting_problems(calibration is None, budget, bound, input_norm, loss_fn),
    ])  # fmt: skip
    if calibration is None:
        return _from_weights(model, args, kwargs, bound, input_norm)
    policy = replace(POLICIES["normal"], rebalance=False)
    batches = _batches(model, calibration, loss_fn, math.ceil(1.5 * policy.samples))
    return remove_(_network(model, args, kwargs), *_shares(batches), loss_fn, policy, budget, price=policy.price)


def _network(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Network:
    return Network(model, (), (), *discovered(model, args, kwargs))


def _from_weights(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    bound: float | None,
    input_norm: float | None,
) -> Event:
    """One removal by closed forms alone."""
    start = time.perf_counter()
    norm = _largest_norm(args, kwargs) if input_norm is None else float(input_norm)
    network = _network(model, args, kwargs)
    links = trace_chain(model, args, kwargs)
    widths, parameters, flops = network.widths, network.parameters, network.flops()
    if isinstance(links, str):
        outcome = Outcome([], {}, {g.name: g.reason or f"no closed form: {links}" for g in network.groups})
    else:
        limit = rounding(model, links, _output_norm(model, args, kwargs)) if bound is None else bound
        with Surgery(model) as surgery:
            outcome = fold_chain_(model, network.groups, links, norm, limit, surgery)
    network.groups = [outcome.shrunk.get(group.name, group) for group in network.groups]
    total = math.fsum(plan.bound or 0.0 for plan in outcome.plans)
    changes = tuple(
        GroupChange(plan.group, widths[plan.group], len(plan.keep), None, plan.bound, None) for plan in outcome.plans
    )
    return Event(
        0, changes, widths, network.widths, parameters, network.parameters, flops, network.flops(),
        time.perf_counter() - start, None, None, None, total, None,
        reason=None if changes else _reason(network, outcome, norm),
        notes={**outcome.notes, **_meaning(model, args, kwargs, norm, total)},
    )  # fmt: skip


def _meaning(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], norm: float, bound: float
) -> dict[str, str]:
    """What the bound says, also of predictions where the output may be logits (docs/theory.md, statement 16)."""
    notes = {"bound": f"holds for inputs of Euclidean norm up to {norm:g}"}
    output = evaluate(model, [Batch(args, kwargs)], None).outputs[0]
    if output.ndim == 2 and output.shape[1] > 1:
        flips = int(may_flip(output.double(), bound).sum())
        notes["predictions"] = f"the largest output can change for {flips} of the {len(output)} example inputs at most"
    return notes


def _reason(network: Network, outcome: Outcome, norm: float) -> str:
    """Why nothing went."""
    searched = [group.name for group in network.groups if group.name not in outcome.notes]
    if not searched:
        return "no group of channels has a closed form (see notes): give calibration data"
    return (
        f"no neuron of {', '.join(searched)} can go within the bound for inputs of norm up to {norm:g}: "
        "give calibration data, or a larger `bound`"
    )


def _output_norm(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Largest Euclidean norm of what the model makes of one of the example inputs."""
    output = evaluate(model, [Batch(args, kwargs)], None).outputs[0]
    return float(output.double().flatten(1).norm(dim=1).max())


def _largest_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    """Largest Euclidean norm of one input, dimension 0 counting the inputs."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    norms = [float(tensor.double().flatten(1).norm(dim=1).max()) for tensor in tensors if tensor.ndim > 1]
    if not norms or max(norms) == 0:
        checks.checked(["`input_norm` must be given where example_inputs have no norm above 0, got None. Pass it."])
    return max(norms)


def _batches(model: nn.Module, calibration: Iterable[Any], loss_fn: LossFn | None, wanted: int) -> list[Batch]:
    """The first batches, until there are `wanted` inputs."""
    found, forms, paired = list[Batch](), set[Any](), loss_fn is not None
    for i, item in enumerate(calibration):
        pair = isinstance(item, tuple | list) and len(item) == 2
        if paired and not pair:
            checks.checked(
                [
                    f"`calibration` must give pairs (inputs, targets) with loss_fn, got {type(item).__name__} "
                    f"(batch {i}). Yield (inputs, targets)."
                ]
            )
        inputs, targets = item if paired else (item, None)
        batch = Batch(*checks.as_call(inputs), targets)
        checks.checked(checks.data_problems(tree_leaves((batch.args, batch.kwargs)), "calibration"))
        if (form := checks.form(batch)) not in forms:
            checks.checked(checks.batch_problems(model, batch, loss_fn, "calibration"))
            forms.add(form)
        found.append(batch)
        if sum(batch.size for batch in found) >= wanted:
            break
    if not found:
        checks.checked(["`calibration` must hold at least one batch, got none. Pass a list or a fresh loader."])
    return found


def _shares(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Two thirds of the batches to plan on and one to judge on; if they are few, parts of each."""
    if len(batches) >= 3:
        return batches[0::3] + batches[1::3], batches[2::3]
    plan, judge = zip(*(split(batch) for batch in batches), strict=True)
    return list(plan), list(judge)


def _weight_problems(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            yield f"`model` must have finite parameters, got NaN or infinity ({name}). Load a sound checkpoint."


def _setting_problems(
    closed: bool, budget: float | None, bound: float | None, input_norm: float | None, loss_fn: Any
) -> Iterator[str]:
    numbers: Sequence[tuple[str, Any]] = (("budget", budget), ("bound", bound), ("input_norm", input_norm))
    for name, value in numbers:
        if value is not None and not (isinstance(value, int | float) and value >= 0 and math.isfinite(value)):
            yield f"`{name}` must be a finite number >= 0, got {value!r}. See help(apoptorch.shrink)."
    yield from checks.loss_problems(loss_fn)
    settings = {"budget": budget, "loss_fn": loss_fn} if closed else {"bound": bound, "input_norm": input_norm}
    for name, value in settings.items():
        if value is not None:
            yield (
                f"`{name}` must be None with{'out' if closed else ''} calibration data, got {value!r}. "
                + ("Pass batches as `calibration`." if closed else "Closed forms take no data: leave it out.")
            )
