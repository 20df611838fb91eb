"""Narrows every group once to see that the model's own code follows; then puts all back, bit for bit.

A graph can't tell `x.view(-1, 400)` from `x.view(-1, x.shape[1] * 25)`, nor see sizes in Python conditions. So the
narrowed model runs on tensors without data, and is traced again: it must have the same groups, narrowed. Where a size
is an integer attribute of a module (`self.hidden = 64`), that may follow the group's width: it is tried.
"""

import contextlib
import logging
import os
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch._export.utils import _compiling_state_context
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from .calibrate import calibrating
from .errors import ApoptosisError
from .graph import assemble, rehearsing, traced
from .plan import ChannelGroup, FoldPlan, SizeAttribute, Slot
from .surgery import Surgery, attributes, named_tensors

_FEW, _CANDIDATES = 16, 5
_SCALE = "forward() computes with a number that follows their size (the scale of a softmax?)"
_IDLE = (
    "forward() reads them in training mode only (an auxiliary head?): calibration, in eval mode, has nothing to go by"
)
_TORCH = os.path.dirname(torch.__file__)
Numbers = list[tuple[str, tuple[float, ...]]]
Places = tuple[int, int, frozenset[tuple[str, Slot]]]


def rehearsed(
    model: nn.Module, groups: Sequence[ChannelGroup], args: tuple[Any, ...], kwargs: dict[str, Any],
    heads: Collection[str] = (),
) -> list[ChannelGroup]:  # fmt: skip
    """The same groups; those are pinned without whose last channels forward() fails, or does something else.

    `heads`: tensors of which whole heads are channels (`graph.traced`).
    """
    return _Rehearsal(model, list(groups), args, kwargs, heads).run()


class _Rehearsal:
    def __init__(
        self, model: nn.Module, groups: list[ChannelGroup], args: tuple[Any, ...], kwargs: dict[str, Any],
        heads: Collection[str],
    ):  # fmt: skip
        self.model, self.args, self.kwargs, self.heads = model, args, kwargs, heads
        self.groups = [_counted(group, model) for group in groups]
        self.vain = set[tuple[Any, ...]]()  # attributes that were tried, for a group that passes the same lines

    @cached_property
    def numbers(self) -> Numbers:
        """What the model as it is computes with."""
        return traced(self.model, self.args, self.kwargs).numbers()

    def run(self) -> list[ChannelGroup]:
        while names := [group.name for group in self.groups if group.prunable and group.shrinks]:
            changed = self.changed(names)
            if not changed:
                break
            self.groups = [changed.get(group.name, group) for group in self.groups]
        return self.groups

    def changed(self, names: Sequence[str]) -> dict[str, ChannelGroup]:
        """Groups of `names` that can't be narrowed as they are: pinned, or with attributes that follow."""
        with Surgery(self.model) as surgery:
            try:
                plans = [_without_last(group) for group in self.groups if group.name in names]
                narrowed = surgery.fold_all_(self.groups, plans)
                seen = _Seen()
                error = _failure(self.model, self.args, self.kwargs, seen)
                reasons, numbers = self.unlike(narrowed, names) if error is None else ({}, [])
            finally:
                surgery.undo_()
        if error is not None:
            reasons = self.blamed(names, error)
        elif idle := self.idle(names, seen):
            reasons |= dict.fromkeys(idle, _IDLE)
        elif not reasons and (scaled := self.scaled(names)) and numbers != self.numbers:
            reasons = dict.fromkeys(scaled, _SCALE)
        return {g.name: self.resolved(g, reasons[g.name]) for g in self.groups if g.name in reasons}

    def scaled(self, names: Sequence[str]) -> list[str]:
        """Groups that a number in the code may follow: those multiplied in pairs, without any those with attributes."""
        paired = [group.name for group in self.groups if group.paired and group.name in names]
        return paired or [group.name for group in self.groups if group.sizes]

    def idle(self, names: Sequence[str], seen: "_Seen") -> list[str]:
        """Groups of which a forward pass in eval mode used none of the weights that read them."""
        tensors, found = named_tensors(self.model), list[str]()
        for group in (group for group in self.groups if group.name in names):
            weights = [tensors.get(consumer.weight.tensor) for consumer in group.consumers]
            computed = any(weight is None for weight in weights)  # by a parametrization
            if not computed and not any(id(weight) in seen.tensors for weight in weights):
                found.append(group.name)
        return found

    def resolved(self, group: ChannelGroup, reason: str) -> ChannelGroup:
        error = None if group.sizes else self.failure_of(group)
        whole = group.entries > 1 or group.gate is not None
        silent = error is None and whole and not group.sizes  # fewer heads or experts, counted as before
        sized = self.sized(group, error) if error is not None or silent else None
        return sized or replace(group, prunable=False, reason=reason, sizes=())

    def failure_of(self, *groups: ChannelGroup) -> Exception | None:
        """How forward() fails when these groups alone are narrowed."""
        with Surgery(self.model) as surgery:
            try:
                surgery.fold_all_(groups, [_without_last(group) for group in groups])
                return _failure(self.model, self.args, self.kwargs)
            finally:
                surgery.undo_()

    def follows(self, group: ChannelGroup) -> bool:
        """Has the model the same group, narrowed, once this group alone is?"""
        with Surgery(self.model) as surgery:
            try:
                narrowed = surgery.fold_all_(self.groups_with(group), [_without_last(group)])
                failed = _failure(self.model, self.args, self.kwargs) is not None
                return not failed and not self.unlike(narrowed, [group.name])[0]
            finally:
                surgery.undo_()

    def groups_with(self, group: ChannelGroup) -> list[ChannelGroup]:
        return [group if other.name == group.name else other for other in self.groups]

    def sized(self, group: ChannelGroup, error: Exception | None) -> ChannelGroup | None:
        """The group with the fewest attributes that must follow it, None if none help: for forward() to run or, without
        an error, for it to cut the group as before."""
        modules = {module: path for path, module in self.model.named_modules()}
        taken = {(size.module, size.name) for other in self.groups for size in other.sizes}
        owners = _holders(group, self.model) if error is None else _failing(error, modules)
        candidates = [c for c in _candidates(group, owners, modules) if (c.module, c.name) not in taken]
        for count in range(1, min(len(candidates), _CANDIDATES if error is not None else 1) + 1):
            for chosen in combinations(candidates[:_CANDIDATES], count):
                types = [(type(self.model.get_submodule(size.module)), size.name) for size in chosen]
                key = (group.lines, *types)
                if key in self.vain:
                    continue
                sized = replace(group, sizes=chosen)
                if self.follows(sized) if error is None else self.failure_of(sized) is None:
                    return sized
                self.vain.add(key)
        return None

    def blamed(self, names: Sequence[str], error: Exception) -> dict[str, str]:
        """The groups whose channels pass the innermost line of the user's code that failed."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        by_name = {group.name: group for group in self.groups}
        for frame in reversed(traceback.extract_tb(error.__traceback__)):
            where = f"{frame.filename}:{frame.lineno}"
            passing = [name for name in names if where in by_name[name].lines]
            if passing and not frame.filename.startswith(_TORCH):
                few = len(passing) <= _FEW  # one line may do much
                passing = self.alone(passing if few else self.culprits(names)) or passing
                told = f"forward() fails with fewer of them at {where}: {frame.line}"
                return dict.fromkeys(passing, f"{told} ({text}; a size written as a number?)")
        alone = [name for name in names if len(names) == 1 or self.failure_of(by_name[name]) is not None]
        reason = f"forward() fails with fewer of them: {text} (a size written as a number?)"
        return dict.fromkeys(alone or names, reason)

    def alone(self, names: Sequence[str]) -> list[str]:
        """Those of `names` with any one of which forward() fails; all, untested, if they are many."""
        groups = [group for group in self.groups if group.name in names]
        return [group.name for group in groups if len(names) > _FEW or self.failure_of(group) is not None]

    def culprits(self, names: Sequence[str]) -> list[str]:
        """Of the groups `names`, with which forward() fails: one with which alone it may, found by halving, and those
        whose channels pass the same lines."""
        left = [group for group in self.groups if group.name in names]
        while len(left) > 1:
            half = left[: len(left) // 2]
            left = left[len(half) :] if self.failure_of(*half) is None else half
        return [g.name for g in self.groups if g.name in names and g.lines == left[0].lines]

    def unlike(self, narrowed: Sequence[ChannelGroup], names: Sequence[str]) -> tuple[dict[str, str], Numbers]:
        """Groups that the narrowed model no longer has; and the numbers that it computes with."""
        try:
            tracer = traced(self.model, self.args, self.kwargs, self.heads)
        except ApoptosisError as error:
            text = f"the narrowed model can't be traced: {' '.join(str(error).split())[:300]}"
            return dict.fromkeys(names, text), []
        groups = assemble(tracer)[0]
        found = {places_of(form) for group in groups for form in (group, group.with_experts(1))}  # one has no blocks
        reason = "forward() takes other channels for them once they are fewer (a size written as a number?)"
        reasons = {g.name: reason for g in narrowed if g.name in names and g.shrinks and places_of(g) not in found}
        return reasons, tracer.numbers()


class _Seen(TorchFunctionMode):
    """Notes the tensors that ops are given."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tensors.update(id(leaf) for leaf in tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


def _failure(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seen: _Seen | None = None
) -> Exception | None:
    """How forward() fails, on tensors without data, which code that keeps tensors (a cache) must not keep."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    quiet, log.disabled = log.disabled, True
    try:
        fakes = FakeTensorMode(allow_non_fake_inputs=True)
        with rehearsing(model), calibrating(model), torch.no_grad(), _compiling_state_context(), fakes as mode:
            fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, (args, kwargs))
            with seen or contextlib.nullcontext():
                model(*fake[0], **fake[1])
    except Exception as error:  # a forward pass raises whatever the user wrote
        return error
    finally:
        log.disabled = quiet
    return None


def _failing(error: Exception, modules: dict[nn.Module, str]) -> Iterable[nn.Module]:
    """The modules in which forward() fails, innermost first."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    owners = [frame.f_locals.get("self") for frame in reversed(frames)]
    return dict.fromkeys(owner for owner in owners if isinstance(owner, nn.Module) and owner in modules)


def _holders(group: ChannelGroup, model: nn.Module) -> Iterable[nn.Module]:
    """The modules that hold a tensor of the group, innermost first."""
    names = [slot.tensor.rpartition(".")[0].split(".") for slot in group.makers]
    paths = {".".join(name[:length]) for name in names for length in range(len(name) + 1)}
    return [model.get_submodule(path) for path in sorted(paths, key=lambda path: (-path.count("."), path == "", path))]


def _counted(group: ChannelGroup, model: nn.Module) -> ChannelGroup:
    """Of whole experts, with the attributes by such a name that count them, where they and their router lie."""
    if group.gate is None or group.sizes:
        return group
    modules = {module: path for path, module in model.named_modules()}
    paths = dict.fromkeys([*(slot.tensor.rpartition(".")[0] for slot in group.makers), group.name.rpartition(".")[0]])
    found = _candidates(group, [model.get_submodule(path) for path in paths], modules)
    return replace(group, sizes=tuple(size for size in found if "experts" in size.name))


def _candidates(
    group: ChannelGroup, owners: Iterable[nn.Module], modules: dict[nn.Module, str]
) -> Iterator[SizeAttribute]:
    """Integer attributes of these modules that are the group's width, that of a block, or count its entries."""
    slots = [*group.producers, *group.passthrough]
    inner = {slot.inner for slot in (*slots, *(consumer.weight for consumer in group.consumers))}
    ratios = {a // b for a in inner for b in inner if a % b == 0}
    known = {group.width * times: (times, 1) for times in sorted({1} | inner | ratios, reverse=True)}
    known |= {group.width // group.blocks: (1, group.blocks)} if group.blocks > 1 else {}
    for module in owners:
        derived = attributes(module)
        for name, value in vars(module).items():
            if type(value) is int and value in known and name not in derived and not name.startswith("_"):
                yield SizeAttribute(modules[module], name, *known[value])


def places_of(group: ChannelGroup) -> Places:
    """Width, blocks and slots: what makes two groups the same."""
    roles = [("makes", slot) for slot in (*group.producers, *group.passthrough)]
    return group.width, group.blocks, frozenset([*roles, *(("reads", consumer.weight) for consumer in group.consumers)])


def _without_last(group: ChannelGroup) -> FoldPlan:
    """As few channels less as may go: one in every block, or down to a multiple."""
    left = (group.width - 1) // group.least_step * group.least_step
    return FoldPlan(group.name, group.leading(left), folds=())
