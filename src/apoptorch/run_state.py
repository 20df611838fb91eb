"""The state of a run, as `Apoptosis.state_dict` gives it: checked and read before anything follows it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .batches import Batch
from .errors import ArgumentError
from .plan import ChannelGroup, Event
from .surgery import narrowed

_NUMBERS = ("step", "event_step", "wake", "batch_size", "scale", "fraction", "event_seconds")


def history_and_batches(
    state: Any, groups: Sequence[ChannelGroup], shapes: Mapping[str, Sequence[int]]
) -> tuple[list[Event], list[Batch]]:
    """The events and the gathered batches of a state for a model of these groups and shapes of tensors.

    Raises:
        ArgumentError: all reasons why it is no state, or that of another model.
    """
    if problems := [*_problems(state, groups, shapes)]:
        raise ArgumentError(problems)
    try:
        batches = [Batch(tuple(args), dict(kwargs), targets) for args, kwargs, targets in state["batches"]]
        return [Event.from_json(event) for event in state["history"]], batches
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {error}"
        raise ArgumentError([f"`history` and `batches` of `state` must be as `state_dict` gives them, got {told}. "
                             "It is damaged."]) from error  # fmt: skip


def _problems(state: Any, groups: Sequence[ChannelGroup], shapes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    if not isinstance(state, dict):
        yield f"`state` must be what `state_dict` gives, got {type(state).__name__}. Pass that."
        return
    saved, experts, widths = state.get("widths"), state.get("experts"), {group.name: group.width for group in groups}
    narrow = state.get("shapes") == shapes  # already: a last head may be no group any more
    if not isinstance(saved, dict) or (set(saved) != set(widths) and not narrow):
        got = sorted(saved, key=str) if isinstance(saved, dict) else saved
        yield f"`state` must be of this model, got groups {got}. Build the same model."
        return
    known = {name: width for name, width in saved.items() if name in widths}
    wrong = [name for name, width in known.items() if type(width) is not int or not 0 < width <= widths[name]]
    if wrong:
        got = {name: saved[name] for name in wrong}
        yield f"`widths` of `state` must be from 1 to those of the model, got {got}. Build the model at its full size."
    whole = {} if wrong else {group.name: known[group.name] for group in groups if group.gate is not None}
    apart = {
        group.name: group.experts for group in narrowed(groups, whole) if group.experts > 1 and group.name in saved
    }
    if isinstance(experts, dict) and (got := {name: n for name, n in experts.items() if name in widths}) != apart:
        yield (f"`experts` of `state` must be those that have channels of their own in the model, {apart}, got {got}. "
               "Build the model at its full size.")  # fmt: skip
    rules = {name: type(state.get(name)) in (int, float) for name in _NUMBERS}
    rules |= {name: type(state.get(name, "")) in (int, float, type(None)) for name in ("first_loss", "total_steps")}
    rules |= {name: isinstance(state.get(name), list) for name in ("history", "batches")}
    rules |= {name: isinstance(state.get(name), dict) for name in ("full_widths", "experts")}
    rules |= {"shapes": _are_shapes(state.get("shapes"))}
    for name, holds in rules.items():
        if not holds:
            got = repr(state.get(name, "nothing"))[:80]
            yield f"`{name}` of `state` must be as `state_dict` gives it, got {got}. It is damaged."


def _are_shapes(value: Any) -> bool:
    shapes = value.values() if isinstance(value, dict) else [None]
    return all(isinstance(shape, list | tuple) and all(type(size) is int for size in shape) for shape in shapes)
