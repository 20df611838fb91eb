"""What stood in the way of each channel group, in one sentence, and what to try."""

from collections.abc import Sequence
from dataclasses import dataclass

from .plan import ChannelGroup, Event


@dataclass(frozen=True)
class Outlook:
    """Where the schedule stands.

    looked: the last look for redundancy, also one that found nothing; None before the first. next_look: its step, None
    if none will come. unpaid: the last look was left out because it would not have paid for itself. floor: least width.
    """

    looked: Event | None
    next_look: int | None
    unpaid: bool
    floor: int


def explained(groups: Sequence[ChannelGroup], history: Sequence[Event], outlook: Outlook) -> dict[str, str]:
    """One sentence for each group, by name: what happened to it, or why nothing did and what to try."""
    return {group.name: _sentence(group, history, outlook) for group in groups}


def _sentence(group: ChannelGroup, history: Sequence[Event], outlook: Outlook) -> str:
    if not group.prunable:
        return f"keeps its {group.width} channels: {group.reason}; {_unpin(group.reason or '')}"
    width, full = group.width // group.experts, group.full_width // group.experts
    kind = "channels" if group.gate is None else "experts"
    every = f"channels in each of {group.experts} experts" if group.experts > 1 else kind
    part = [(event, change) for event in history for change in event.changes if change.group == group.name]
    if width < full:
        last, change = next((e, c) for e, c in reversed(part) if not e.rolled_back) if part else (None, None)
        when = f", last at step {last.step}" if last else ""
        cost = f", predicted to raise the loss by {change.predicted:.2g}" if change and change.predicted else ""
        return f"{full} -> {width} {every}{when}{cost}"
    return f"{full} -> {width} {every}: {_obstacle(group, [e for e, _ in part if e.rolled_back], outlook)}"


def _obstacle(group: ChannelGroup, undone: Sequence[Event], outlook: Outlook) -> str:
    """Why a group that may shrink has its full width."""
    if undone:
        return (
            f"removed at step {undone[-1].step} and undone, as {undone[-1].reason}; try policy='conservative', "
            "or larger batches to plan on (Policy(samples=...))"
        )
    if group.gate is not None and group.width <= group.least(outlook.floor):
        return f"nothing may go, as each token takes {group.least(outlook.floor)} of them"
    if group.width <= group.least(outlook.floor):
        return (
            f"nothing was redundant that may go, as no group gets narrower than {outlook.floor}; try Policy(floor=...)"
        )
    if outlook.looked is not None and outlook.looked.rolled_back and not outlook.looked.changes:
        return f"the look at step {outlook.looked.step} was {outlook.looked.reason}"
    if outlook.looked is not None and group.name in outlook.looked.notes:
        return f"nothing may go, as {outlook.looked.notes[group.name]}"
    if outlook.looked is not None:
        return (
            "nothing was redundant at this price; policy='aggressive' or a longer run pays more, "
            "apoptose(..., budget=...) pays that"
        )
    longer = "try a longer run, Policy(payback=0), or apoptorch.shrink after training"
    if outlook.next_look is None:
        return f"nothing was tried: no look is left in this run, or it would not pay for itself; {longer}"
    again = f"next look at step {outlook.next_look}, if it will pay for itself"
    if outlook.unpaid:
        return f"nothing was tried: at the last look it would not pay for itself; {again}; {longer}"
    return f"nothing was tried yet; {again}"


def _unpin(reason: str) -> str:
    """What to try, for the first obstacle in the way."""
    if reason.startswith("protected by"):
        return "take it out of `protect` to let it shrink"
    if "output" in reason or reason.startswith("no layer reads"):
        return "they are the model's output, and stay"
    if "forward() fails" in reason:
        return "try sizes taken from the tensor (x.flatten(1), x.shape[1]) in forward()"
    if "shared module" in reason or "also used by" in reason:
        return "try a layer of its own for each use"
    return "no setting changes that: try it without this op, or protect it to say that it should stay"
