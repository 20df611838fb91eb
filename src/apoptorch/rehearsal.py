"""Narrows every group once to see that the model's own code follows; then puts all back, bit for bit.

A graph can't tell `x.view(-1, 400)` from `x.view(-1, x.shape[1] * 25)`, nor see sizes in Python conditions. So the
narrowed model runs on tensors without data, and is traced again: it must have the same groups, narrowed.
"""

import logging
import os
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from .calibrate import calibrating
from .errors import ApoptosisError
from .graph import trace
from .plan import ChannelGroup, Fold, FoldPlan, Slot
from .surgery import Surgery

_FEW = 16
_TORCH = os.path.dirname(torch.__file__)
_Key = tuple[int, frozenset[tuple[str, Slot]]]


def rehearsed(
    model: nn.Module, groups: Sequence[ChannelGroup], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[ChannelGroup]:
    """The same groups; those are pinned without whose last channels forward() fails, or does something else."""
    groups = list(groups)
    while open_ := [group.name for group in groups if group.prunable and group.width > group.blocks]:
        pinned = _pinned(model, groups, open_, args, kwargs)
        if not pinned:
            break
        groups = [replace(g, prunable=False, reason=pinned[g.name]) if g.name in pinned else g for g in groups]
    return groups


def _pinned(
    model: nn.Module, groups: list[ChannelGroup], names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, str]:
    """Groups of `names` that can't be narrowed, and why; not necessarily all of them."""
    with Surgery(model) as surgery:
        try:
            narrowed = surgery.fold_all_(groups, [_without_last(group) for group in groups if group.name in names])
            if (error := _failure(model, args, kwargs)) is not None:
                surgery.undo_()
                return _blamed(model, groups, names, error, args, kwargs)
            return _changed(model, narrowed, names, args, kwargs)
        finally:
            surgery.undo_()


def _failure(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Exception | None:
    """How forward() fails, on tensors without data."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    quiet, log.disabled = log.disabled, True
    try:
        with calibrating(model), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = tree_map(lambda x: mode.from_tensor(x) if isinstance(x, Tensor) else x, (args, kwargs))
            model(*fake[0], **fake[1])
    except Exception as error:  # a forward pass raises whatever the user wrote
        return error
    finally:
        log.disabled = quiet
    return None


def _blamed(
    model: nn.Module, groups: Sequence[ChannelGroup], names: Sequence[str], error: Exception, args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, str]:  # fmt: skip
    """The groups whose channels pass the innermost line of the user's code that failed."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        where = f"{frame.filename}:{frame.lineno}"
        passing = [g.name for g in groups if g.name in names and where in g.lines]
        if passing and not frame.filename.startswith(_TORCH):
            if len(passing) <= _FEW:  # one line may do much
                alone = [name for name in passing if _fails(model, groups, name, args, kwargs)]
                passing = alone or passing
            told = f"forward() fails with fewer of them at {where}: {frame.line} ({text}; a size written as a number?)"
            return dict.fromkeys(passing, told)
    alone = [name for name in names if len(names) == 1 or _fails(model, groups, name, args, kwargs)]
    reason = f"forward() fails with fewer of them: {text} (a size written as a number?)"
    return dict.fromkeys(alone or names, reason)


def _fails(
    model: nn.Module, groups: Sequence[ChannelGroup], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    with Surgery(model) as surgery:
        try:
            surgery.fold_all_(groups, [_without_last(group) for group in groups if group.name == name])
            return _failure(model, args, kwargs) is not None
        finally:
            surgery.undo_()


def _changed(
    model: nn.Module, narrowed: Sequence[ChannelGroup], names: Sequence[str], args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> dict[str, str]:  # fmt: skip
    """Groups that the narrowed model no longer has."""
    try:
        found = {_key(group) for group in trace(model, args, kwargs)[0]}
    except ApoptosisError as error:
        return dict.fromkeys(names, f"the narrowed model can't be traced: {' '.join(str(error).split())[:300]}")
    reason = "forward() takes other channels for them once they are fewer (a size written as a number?)"
    return {g.name: reason for g in narrowed if g.name in names and g.width > g.blocks and _key(g) not in found}


def _key(group: ChannelGroup) -> _Key:
    roles = [("makes", slot) for slot in (*group.producers, *group.passthrough)]
    return group.width, frozenset([*roles, *(("reads", consumer.weight) for consumer in group.consumers)])


def _without_last(group: ChannelGroup) -> FoldPlan:
    """One channel less in every block."""
    keep = group.leading(group.width - group.blocks)
    fold = Fold(torch.eye(group.width, dtype=torch.float64)[:, keep])
    return FoldPlan(group.name, keep, (fold,) * len(group.consumers))
