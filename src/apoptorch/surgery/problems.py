"""What keeps a change from being made: looked for, all together, before anything is changed."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apoptorch.plan import ChannelGroup, Fold, FoldPlan
from apoptorch.surgery.places import cuts
from apoptorch.surgery.tensors import effective, is_known_state, named_tensors, originals, state_of, target_of


def plan_problems(group: ChannelGroup, plan: FoldPlan) -> list[str]:
    """Where `plan` doesn't fit `group`."""
    n, k, keep, problems = group.width, len(plan.keep), plan.keep.tolist(), list[str]()
    blocks = [c // (n // group.blocks) for c in keep]
    if k % group.blocks or blocks != [i // max(1, k // group.blocks) for i in range(k)]:
        problems.append(f"`plan.keep` must keep as many in each of {group.blocks} blocks, got {keep} ({group.name}).")
    if plan.group != group.name or not group.prunable:
        problems.append(f"`plan` must be for {group.name} and that be prunable, got {plan.group}, {group.reason}.")
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= n:
        problems.append(f"`plan.keep` must be sorted distinct indices below {n}, got {plan.keep} ({group.name}).")
    if plan.folds and len(plan.folds) != len(group.consumers):
        number = len(group.consumers)
        problems.append(f"`plan.folds` must be none, or one a consumer ({number}), got {len(plan.folds)}.")
    n, k = n * group.entries, k * group.entries
    for consumer, fold in zip(group.consumers, plan.folds, strict=False):
        shift = torch.zeros(n) if fold.shift is None else fold.shift
        where = f"({group.name} -> {consumer.weight.tensor}, {n} -> {k} channels)"
        if fold.coeffs.shape != (n, k) or shift.shape != (n,):
            got = f"{tuple(fold.coeffs.shape)} and {tuple(shift.shape)}"
            problems.append(f"`coeffs` must be {n} x {k} and `shift` {n} numbers, got {got} {where}.")
        elif not (fold.coeffs.isfinite().all() and shift.isfinite().all()):
            problems.append(f"`coeffs` and `shift` must be finite, got others {where}. Check the calibration data.")
        elif consumer.bias is None and shift.any():
            problems.append(f"`shift` must be None or zero without a bias to take it, got others {where}.")
    return problems


def slot_problems(
    network: nn.Module, group: ChannelGroup, plan: FoldPlan, optimizers: Sequence[Optimizer]
) -> Iterator[str]:
    """What keeps `group` from being narrowed in `network`, optimizer state included."""
    tensors, taken = named_tensors(network), dict[tuple[int, int], tuple[int, Fold | None]]()
    for slot, bias, fold in cuts(group, plan):
        width = group.width * (1 if fold is None else group.entries)
        target = target_of(network, tensors, slot.tensor)
        if target is None or (bias is not None and bias not in tensors):
            name = slot.tensor if target is None else bias
            rule = "be a parameter, a buffer or a parametrized attribute with right_inverse"
            yield f"`{name}` must {rule}, got nothing by that name. Find the channel groups again."
            continue
        shape, last = tuple(effective(target).shape), int(slot.index(width).max())
        if slot.dim >= len(shape) or last >= shape[slot.dim] * (slot.split[1] if slot.split else 1):
            rule = f"have {width} x {slot.inner} entries in dimension {slot.dim}"
            yield f"`{slot.tensor}` must {rule}, got shape {shape}. Find the channel groups again."
        inner, first = taken.setdefault((id(target), slot.dim), (slot.inner, fold))
        if inner != slot.inner or first is not fold:
            yield f"`{slot.tensor}` must be cut in one way, got two. Name a shared weight once in {group.name}."
        for tensor in originals(target):
            yield from _tensor_problems(slot.tensor, tensor, tensor.shape, optimizers)


def shape_problems(
    network: nn.Module, shapes: Mapping[str, Sequence[int]], optimizers: Sequence[Optimizer]
) -> Iterator[str]:
    """What keeps the tensors by these names from being narrowed to these shapes."""
    tensors = named_tensors(network)
    for name, new in shapes.items():
        old = tuple(tensors[name].shape) if name in tensors else ()
        if name not in tensors:
            yield f"`{name}` must be a parameter or buffer of the model, got nothing by that name."
        elif len(new) != len(old) or any(a != b and not 0 < a < b for a, b in zip(new, old, strict=True)):
            rule = f"be narrowed from {old}, dimension by dimension"
            yield f"`{name}` must {rule}, got {tuple(new)}. Build the model at its full size."
        elif tuple(new) != old:
            yield from _tensor_problems(name, tensors[name], new, optimizers)


def _tensor_problems(name: str, tensor: Tensor, new: Sequence[int], optimizers: Sequence[Optimizer]) -> Iterator[str]:
    where = f"({name}, {tuple(tensor.shape)})"
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        yield f"`{name}` must be dense and of floating point, got {tensor.dtype} {tensor.layout} {where}."
    for optimizer in optimizers:
        for key, value in state_of(optimizer, tensor).items():
            if not is_known_state(value, tensor.shape, new):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                rule = "be a number or have its parameter's dimensions"
                state = f"{type(optimizer).__name__}.state[...]['{key}']"
                yield f"`{state}` must {rule}, got {got} {where}. Use an optimizer of torch.optim."


def size_problems(network: nn.Module, sizes: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """What keeps attributes of modules, by path and name, from being set to these sizes."""
    modules = dict(network.named_modules())
    for path, values in sizes.items():
        for name, value in values.items():
            old = vars(modules[path]).get(name) if path in modules else None
            if type(old) is not int or type(value) is not int or not 0 < value <= old:
                got = old if type(old) in (int, float, bool) else type(old).__name__
                yield f"`{name}` must be an integer of at least {value}, got {got} ({path or 'the model itself'})."
