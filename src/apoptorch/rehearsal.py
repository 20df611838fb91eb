"""Narrows every group once, by one channel, to see that the model's own code survives it; then puts all back."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from .calibrate import calibrating
from .plan import ChannelGroup, Fold, FoldPlan
from .surgery import Surgery


def rehearsed(
    model: nn.Module, groups: Sequence[ChannelGroup], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[ChannelGroup]:
    """The same groups; those without whose last channel forward() fails are pinned.

    A graph can't tell `x.view(-1, 400)` from `x.view(-1, x.shape[1] * 25)`, nor see sizes in Python conditions.
    """
    prunable = [group for group in groups if group.prunable and group.width > group.blocks]
    if not prunable or _failure(model, prunable, args, kwargs) is None:
        return list(groups)
    reasons = {group.name: _failure(model, [group], args, kwargs) for group in prunable}
    if not any(reasons.values()):
        reasons = dict.fromkeys(reasons, "forward() fails when several groups are narrowed together")
    return [
        replace(group, prunable=False, reason=reasons[group.name]) if reasons.get(group.name) else group
        for group in groups
    ]


def _failure(
    model: nn.Module, groups: Sequence[ChannelGroup], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """How forward() fails when each group loses its last channel, in words; None if it doesn't."""
    with Surgery(model) as surgery:
        try:
            surgery.fold_all_(groups, [_without_last(group) for group in groups])
            with calibrating(model), torch.no_grad():
                model(*args, **kwargs)
        except Exception as error:  # a forward pass raises whatever the user wrote
            text = " ".join(str(error).split())[:200]
            return f"forward() fails with fewer of them: {type(error).__name__}: {text} (a size written as a number?)"
        finally:
            surgery.undo_()
    return None


def _without_last(group: ChannelGroup) -> FoldPlan:
    """One channel less in every block."""
    keep = group.leading(group.width - group.blocks)
    fold = Fold(torch.eye(group.width, dtype=torch.float64)[:, keep])
    return FoldPlan(group.name, keep, (fold,) * len(group.consumers))
