"""Apply fold plans to a model, its optimizers' state, its followers and its modules' attributes.

In place and as a transaction; decides nothing. Shapes: n channels in a group, k survivors.

Every change replaces storage (`parameter.data`), a state dict or an attribute and never overwrites what was
there, so the undo log needs no copies: what was there before is the snapshot.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import normalize
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.optim import LBFGS, Optimizer

from apoptorch.errors import SurgeryError
from apoptorch.plan import ChannelGroup, Fold, FoldPlan, Slot

__all__ = ["Surgery", "attributes", "named_tensors", "narrow_"]


class Surgery:
    """A transaction that removes channels from a model.

    ```
    with Surgery(model, optimizers, followers) as surgery:
        group = surgery.fold_(group, plan)
        if worse(model):
            surgery.undo_()
    ```
    An exception inside the block, or inside `fold_`, puts everything back bit for bit. Leaving the block commits:
    the old tensors are let go. Call it between training steps: not between forward and backward.

    Args:
        model: the model itself, without DDP or torch.compile around it.
        optimizers: every optimizer that holds parameters of `model` or of `followers`.
        followers: modules with the same tensors (also as a submodule: an `AveragedModel`); they keep the same
            channels, and the folds are applied to their own weights.

    Raises:
        SurgeryError: a follower doesn't have the model's tensors, shapes and ties.
    """

    def __init__(
        self, model: nn.Module, optimizers: Sequence[Optimizer] = (), followers: Sequence[nn.Module] = ()
    ):
        self._optimizers = list(optimizers)
        self._networks = [model, *(_counterpart(model, follower, i) for i, follower in enumerate(followers))]
        self._log: dict[tuple[Any, ...], Callable[[], None]] | None = {}

    def __enter__(self) -> "Surgery":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self.undo_()
        self._log = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold_(self, group: ChannelGroup, plan: FoldPlan) -> ChannelGroup:
        """Remove the channels that `plan` does not keep and fold them into the survivors.

        Returns:
            `group` with its new width.

        Raises:
            SurgeryError: the plan doesn't fit the group, a slot doesn't fit its tensor, or an optimizer holds
                state whose layout is unknown. Nothing was changed by this call.
        """
        if self._log is None:
            raise SurgeryError("`fold_` must be called before the transaction ends. Open a new `Surgery`.")
        problems = _plan_problems(group, plan) or [
            p for net in self._networks for p in self._problems(net, group, plan)
        ]
        if problems:
            raise SurgeryError("\n".join(problems))
        try:
            for network in self._networks:
                self._fold_network_(network, group, plan)
        except BaseException:
            self.undo_()
            raise
        return dataclasses.replace(group, width=len(plan.keep))

    def undo_(self) -> None:
        """Put back, bit for bit, what was there when the transaction began.

        Raises:
            SurgeryError: the transaction has ended.
        """
        if self._log is None:
            raise SurgeryError(
                "`undo_` must be called before the transaction ends. Call it inside the `with` block."
            )
        with torch.inference_mode(False), torch.no_grad():
            for restore in self._log.values():
                restore()
        self._log.clear()

    def _problems(self, network: nn.Module, group: ChannelGroup, plan: FoldPlan) -> Iterator[str]:
        """What keeps `group` from being narrowed in `network`, optimizer state included."""
        tensors, roles = named_tensors(network), dict[tuple[int, int], tuple[Slot, Fold | None]]()
        folded = [(c.weight, fold) for c, fold in zip(group.consumers, plan.folds, strict=True)]
        for slot, fold in [*folded, *((slot, None) for slot in _selected(group))]:
            target = _target(network, slot.tensor)
            if target is None:
                yield (
                    f"`{slot.tensor}` must be a parameter, a buffer or a parametrized attribute whose "
                    f"parametrizations have a right_inverse, got none (group {group.name})."
                )
                continue
            shape = tuple(_effective(target).shape)
            if slot.dim >= len(shape) or shape[slot.dim] != group.width * slot.inner:
                yield (
                    f"`{slot.tensor}` must have {group.width} x {slot.inner} entries in dimension {slot.dim}, "
                    f"got shape {shape} (group {group.name}). Find the channel groups again."
                )
                continue
            first, first_fold = roles.setdefault((id(target), slot.dim), (slot, fold))
            if first.inner != slot.inner or not _same(first_fold, fold):
                yield f"`{slot.tensor}` must be cut in one way, got two different ones (group {group.name})."
            for tensor in _originals(target):
                yield from self._tensor_problems(slot.tensor, tensor)
        for bias in (c.bias for c in group.consumers):
            if bias is not None and bias not in tensors:
                yield f"`{bias}` must be a parameter, got nothing by that name (group {group.name})."

    def _tensor_problems(self, name: str, tensor: Tensor) -> Iterator[str]:
        if not tensor.is_floating_point() or tensor.layout != torch.strided:
            yield f"`{name}` must be dense and of floating point, got {tensor.dtype}, {tensor.layout}."
        for optimizer in self._optimizers:
            for key, value in _state(optimizer, tensor).items():
                if not _known_state(value, tensor.shape):
                    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    yield (
                        f"State `{key}` of {type(optimizer).__name__} must be a number or have the dimensions of "
                        f"its parameter, got {got} ({name}, {tuple(tensor.shape)}). Use one of torch.optim."
                    )

    def _fold_network_(self, network: nn.Module, group: ChannelGroup, plan: FoldPlan) -> None:
        tensors, done, touched = named_tensors(network), set[tuple[int, int]](), list[Tensor]()
        consumers = [(c.weight, c.bias, fold) for c, fold in zip(group.consumers, plan.folds, strict=True)]
        for slot, bias, fold in [*consumers, *((slot, None, None) for slot in _selected(group))]:
            # consumers first: the constant of a fold reads full rows
            target, index = _target(network, slot.tensor), _index(plan.keep, slot.inner)
            if target is None or (id(target), slot.dim) in done:
                continue
            done.add((id(target), slot.dim))
            touched += _originals(target)
            weight = _effective(target)
            if bias is not None and fold is not None and fold.shift is not None:
                self._add_(tensors[bias], _constant(weight, slot, fold.shift))
            new = _take(weight, slot.dim, index) if fold is None else _folded(weight, slot, plan.keep, fold)
            if isinstance(target, ParametrizationList):
                for original, data in zip(_originals(target), _right_inverse(target, new), strict=True):
                    self._narrow_(original, slot.dim, index, data)
            else:
                self._narrow_(target, slot.dim, index, new)
        self._converge_(network, {id(tensor) for tensor in touched})
        self._follow_(network, {id(tensor) for tensor in touched})

    def _converge_(self, network: nn.Module, touched: set[int]) -> None:
        """Set the singular vectors that spectral_norm tracks to those of the narrowed weight."""
        for chain in network.modules():
            if isinstance(chain, ParametrizationList) and any(id(t) in touched for t in _originals(chain)):
                for norm in (
                    step for step in chain if isinstance(step, _SpectralNorm) and hasattr(step, "_u")
                ):
                    matrix = _wide(norm._reshape_weight_to_matrix(chain.original.detach()))
                    u = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, -1]
                    self._replace_(norm._u, u.to(norm._u.dtype))
                    self._replace_(norm._v, normalize(matrix.mT @ u, dim=0).to(norm._v.dtype))

    def narrow_(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """`narrow_`, as a part of this transaction, in the model and its followers."""
        if self._log is None:
            raise SurgeryError("`narrow_` must be called before the transaction ends. Open a new `Surgery`.")
        if problems := [p for network in self._networks for p in _shape_problems(network, shapes)]:
            raise SurgeryError("\n".join(problems))
        try:
            with torch.inference_mode(False), torch.no_grad():
                for network in self._networks:
                    tensors = named_tensors(network)
                    for name, shape in shapes.items():
                        for dim, size in enumerate(shape):
                            if size < tensors[name].shape[dim]:
                                self._narrow_(tensors[name], dim, torch.arange(size))
                    self._follow_(network, {id(tensors[name]) for name in shapes})
        except BaseException:
            self.undo_()
            raise

    def _add_(self, bias: Tensor, constant: Float64[Tensor, " m"]) -> None:
        self._replace_(bias, (_wide(bias.detach()) + constant).to(bias.dtype))

    def _narrow_(
        self, tensor: Tensor, dim: int, index: Int64[Tensor, " k"], new: Tensor | None = None
    ) -> None:
        """Take `index` along `dim` of a tensor, its gradient and its optimizer state; `new`: its new content."""
        index = index.to(tensor.device)
        old, data = tensor.shape, _take(tensor.detach(), dim, index) if new is None else _like(new, tensor)
        if data.shape == old:  # only the values change
            self._replace_(tensor, data)
            return
        for optimizer in self._optimizers:
            if state := _state(optimizer, tensor):
                narrowed = {key: _narrowed_state(value, old, dim, index) for key, value in state.items()}
                self._set_state_(optimizer, tensor, narrowed)
        self._replace_(tensor, data, None if tensor.grad is None else _take(tensor.grad, dim, index))

    def _replace_(self, tensor: Tensor, data: Tensor, grad: Tensor | None = None) -> None:
        grad = tensor.grad if grad is None and data.shape == tensor.shape else grad
        self._remember(("tensor", id(tensor)), partial(_set_tensor, tensor, tensor.data, tensor.grad))
        _set_tensor(tensor, data, grad)
        for optimizer in self._optimizers:
            if isinstance(optimizer, LBFGS) and any(
                p is tensor for g in optimizer.param_groups for p in g["params"]
            ):
                # its history is flat over all parameters, and its curvature is that of another function
                self._set_state_(optimizer, optimizer.param_groups[0]["params"][0], {})
                self._set_attribute_(optimizer, "_numel_cache", None)

    def _set_state_(self, optimizer: Optimizer, tensor: Tensor, state: dict[str, Any]) -> None:
        if tensor in optimizer.state:
            old = optimizer.state[tensor]
            self._remember(
                ("state", id(optimizer), id(tensor)), partial(_set_item, optimizer.state, tensor, old)
            )
            _set_item(optimizer.state, tensor, state)

    def _set_attribute_(self, owner: object, name: str, value: Any) -> None:
        self._remember(("attribute", id(owner), name), partial(setattr, owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def _remember(self, key: tuple[Any, ...], restore: Callable[[], None]) -> None:
        """Log how to put back what `key` stands for, on its first change."""
        if self._log is not None:
            self._log.setdefault(key, restore)

    def _follow_(self, network: nn.Module, touched: set[int]) -> None:
        """Let the attributes of the modules that own a touched tensor follow its shape."""
        for module in network.modules():
            if any(id(tensor) in touched for tensor in _own_tensors(module)):
                for name, value in attributes(module).items():
                    if getattr(module, name) != value:
                        self._set_attribute_(module, name, value)


def narrow_(
    model: nn.Module, shapes: Mapping[str, Sequence[int]], optimizers: Sequence[Optimizer] = ()
) -> None:
    """Narrow named parameters and buffers to the given shapes: the first entries stay; attributes follow.

    Optimizer state follows too, unless it has the new shape already. All or nothing.

    Raises:
        SurgeryError: an unknown name, or a shape that isn't the old one with some dimensions narrowed.
    """
    with Surgery(model, optimizers) as surgery:
        surgery.narrow_(shapes)


def attributes(module: nn.Module) -> dict[str, Any]:
    """What a module's size attributes must be, going by the shapes of its tensors; empty for unknown types."""
    for types, follow in _ATTRIBUTES:
        if isinstance(module, types):
            return follow(module)
    return {}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by qualified name, tied ones under each of their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _selected(group: ChannelGroup) -> tuple[Slot, ...]:
    return group.producers + group.passthrough


def _layout(module: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape of every tensor, and the first name of the tensor that it is tied to."""
    first: dict[int, str] = {}
    return {n: (tuple(t.shape), first.setdefault(id(t), n)) for n, t in named_tensors(module).items()}


def _counterpart(model: nn.Module, follower: nn.Module, index: int) -> nn.Module:
    """`follower`, or the first of its submodules, that has all of the model's tensors."""
    names = named_tensors(model).keys()
    for module in follower.modules():
        if names <= named_tensors(module).keys():
            layout, other = _layout(model), _layout(module)
            if wrong := [name for name in names if other[name] != layout[name]]:
                raise SurgeryError(
                    f"`followers[{index}]` must have the model's shapes and ties, got "
                    f"{other[wrong[0]]} instead of {layout[wrong[0]]} ({wrong[0]}). Make it a deepcopy of the model."
                )
            return module
    missing = sorted(names - set(named_tensors(follower)))
    raise SurgeryError(
        f"`followers[{index}]` must have a submodule with the model's tensor names, got a "
        f"{type(follower).__name__} without {missing[0]}. Make it a deepcopy of the model."
    )


def _plan_problems(group: ChannelGroup, plan: FoldPlan) -> list[str]:
    n, keep = group.width, plan.keep.tolist()
    problems = []
    if plan.group != group.name:
        problems.append(f"`plan` must be for group {group.name}, got one for {plan.group}.")
    if not group.prunable:
        problems.append(f"`group` must be prunable, got {group.name}: {group.reason}.")
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= n:
        problems.append(
            f"`plan.keep` must be sorted distinct indices below {n}, got {keep[:5]} ... ({group.name})."
        )
    if len(plan.folds) != len(group.consumers):
        problems.append(
            f"`plan.folds` must be {len(group.consumers)}, one a consumer, got {len(plan.folds)}."
        )
    for consumer, fold in zip(group.consumers, plan.folds, strict=False):
        where = f"({group.name} -> {consumer.weight.tensor})"
        if fold.coeffs.shape != (n, len(keep)) or not fold.coeffs.isfinite().all():
            problems.append(
                f"`coeffs` must be finite, {n} x {len(keep)}, got {tuple(fold.coeffs.shape)} {where}."
            )
        if fold.shift is not None and (fold.shift.shape != (n,) or not fold.shift.isfinite().all()):
            problems.append(f"`shift` must be {n} finite numbers, got {tuple(fold.shift.shape)} {where}.")
        if consumer.bias is None and fold.shift is not None and fold.shift.any():
            problems.append(f"`shift` must be None or zero where a consumer has no bias to take it {where}.")
    return problems


def _shape_problems(network: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Iterator[str]:
    tensors = named_tensors(network)
    for name, shape in shapes.items():
        if name not in tensors:
            yield f"`{name}` must be a parameter or buffer of the model, got nothing by that name."
        elif len(shape) != tensors[name].ndim or any(
            not 0 < size <= old and size != old for size, old in zip(shape, tensors[name].shape, strict=True)
        ):
            got = f"got {tuple(shape)} for {tuple(tensors[name].shape)}"
            yield f"`{name}` must keep its dimensions and may only be narrowed, {got}. Build the full-size model."


def _target(network: nn.Module, name: str) -> Tensor | ParametrizationList | None:
    """The tensor by that name, or the parametrization that computes it; None if it can't be written."""
    if (tensor := named_tensors(network).get(name)) is not None:
        return tensor
    path, _, attribute = name.rpartition(".")
    try:
        module = network.get_submodule(path)
    except AttributeError:
        return None
    if not is_parametrized(module, attribute):
        return None
    chain = module.parametrizations[attribute]
    if all(isinstance(step, _SpectralNorm) for step in chain):  # linear in the original, up to its norm
        return chain.original
    return chain if all(hasattr(step, "right_inverse") for step in chain) else None


def _originals(target: Tensor | ParametrizationList) -> list[Tensor]:
    return list(target.parameters(recurse=False)) if isinstance(target, ParametrizationList) else [target]


def _effective(target: Tensor | ParametrizationList) -> Tensor:
    """The tensor that the model computes with; nothing is written, not even spectral_norm's buffers."""
    if isinstance(target, Tensor):
        return target.detach()
    copies = {name: tensor.detach().clone() for name, tensor in named_tensors(target).items()}
    return functional_call(target, copies, ())


def _right_inverse(chain: ParametrizationList, value: Tensor) -> list[Tensor]:
    for step in reversed(list(chain)):
        value = step.right_inverse(value)
    return [value] if isinstance(value, Tensor) else list(value)


def _own_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    if is_parametrized(module):
        yield from module.parametrizations.parameters()


def _index(keep: Int64[Tensor, " k"], inner: int) -> Int64[Tensor, " k*inner"]:
    return (keep[:, None] * inner + torch.arange(inner, device=keep.device)).flatten()


def _take(tensor: Tensor, dim: int, index: Int64[Tensor, " k"]) -> Tensor:
    """A copy of the entries `index` along `dim`, in the memory format of `tensor`."""
    return _like(tensor[(slice(None),) * dim + (index.to(tensor.device),)], tensor)


def _like(new: Tensor, old: Tensor) -> Tensor:
    """`new`, its dimensions laid out in memory in the order that `old` has (channels_last stays so)."""
    order = sorted(range(old.ndim), key=old.stride, reverse=True)
    return new.permute(order).contiguous().permute([order.index(dim) for dim in range(old.ndim)])


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _folded(weight: Tensor, slot: Slot, keep: Int64[Tensor, " k"], fold: Fold) -> Tensor:
    """weight @ coeffs along `slot.dim`: (..., n * inner, ...) -> (..., k * inner, ...).

    The kept columns stay as they are, bit for bit, where no removed channel is folded into them.
    """
    change = _wide(fold.coeffs.to(weight.device)).clone()
    keep = keep.to(weight.device)
    change[keep, torch.arange(len(keep), device=weight.device)] -= 1.0
    rows = change.ne(0).any(1).nonzero()[:, 0]
    channels = weight.unflatten(slot.dim, (-1, slot.inner))
    folded = _take(channels, slot.dim, keep)
    if rows.numel():
        gain = torch.tensordot(_wide(_take(channels, slot.dim, rows)), change[rows], ([slot.dim], [0]))
        folded = (_wide(folded) + gain.movedim(-1, slot.dim)).to(weight.dtype)
    return folded.flatten(slot.dim, slot.dim + 1)


def _constant(weight: Tensor, slot: Slot, shift: Float64[Tensor, " n"]) -> Float64[Tensor, " m"]:
    """What a constant input `shift` adds to each of the m outputs: the sum over channels, inner and kernel taps."""
    channels = weight.unflatten(slot.dim, (-1, slot.inner))
    constant = torch.tensordot(_wide(channels), _wide(shift.to(weight.device)), ([slot.dim], [0]))
    # A transposed convolution reads its inputs in dimension 0 and makes its outputs in 1: then `inner` is first.
    return constant.movedim(1 if slot.dim == 0 else 0, 0).flatten(1).sum(1)


def _same(a: Fold | None, b: Fold | None) -> bool:
    if a is None or b is None:
        return a is b
    shifts = [s for s in (a.shift, b.shift) if s is not None]
    return torch.equal(a.coeffs, b.coeffs) and (not shifts or (len(shifts) == 2 and torch.equal(*shifts)))


def _state(optimizer: Optimizer, tensor: Tensor) -> dict[str, Any]:
    """State that can be narrowed; LBFGS's is dropped instead."""
    return {} if isinstance(optimizer, LBFGS) else optimizer.state.get(tensor, {})


def _known_state(value: Any, shape: torch.Size) -> bool:
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str)
    return value.numel() == 1 or (
        value.ndim == len(shape) and all(v in (1, size) for v, size in zip(value.shape, shape, strict=True))
    )


def _narrowed_state(value: Any, shape: torch.Size, dim: int, index: Int64[Tensor, " k"]) -> Any:
    """State of a parameter of `shape`; Adafactor's factors have 1 where they are averaged."""
    whole = isinstance(value, Tensor) and value.ndim == len(shape) and value.shape[dim] == shape[dim]
    return _take(value, dim, index) if whole else value


# What changes, changes here.


def _set_tensor(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give `tensor` new storage.

    The detour over another dtype makes autograd forget its AccumulateGrad node, which knows the old shape, even
    where a live graph (a loss that the user holds) keeps that node alive.
    """
    tensor.grad = None
    other = torch.float16 if tensor.dtype == torch.float32 else torch.float32
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
    tensor.grad = grad


def _set_item(state: dict[Tensor, Any], tensor: Tensor, value: Any) -> None:
    state[tensor] = value


def _shape(module: nn.Module, name: str = "weight") -> tuple[int, ...]:
    if is_parametrized(module, name):
        return tuple(_effective(module.parametrizations[name]).shape)
    return tuple(getattr(module, name).shape)


def _conv_attributes(conv: nn.Module) -> dict[str, Any]:
    rows, columns = _shape(conv)[:2]
    groups = conv.groups
    transposed = isinstance(conv, _ConvTransposeNd)
    if groups > 1 and groups == conv.in_channels:  # depthwise: one group a channel
        multiplier = conv.out_channels // conv.groups
        groups = rows if transposed else rows // multiplier
    sizes = (rows, columns * groups) if transposed else (columns * groups, rows)
    return {"in_channels": sizes[0], "out_channels": sizes[1], "groups": groups}


def _norm_attributes(norm: nn.Module) -> dict[str, Any]:
    tensor = norm.weight if norm.weight is not None else norm.running_mean
    return {} if tensor is None else {"num_features": tensor.shape[0]}


_ATTRIBUTES: tuple[tuple[Any, Callable[[Any], dict[str, Any]]], ...] = (
    (nn.Linear, lambda m: dict(zip(("out_features", "in_features"), _shape(m), strict=True))),
    (
        nn.Bilinear,
        lambda m: dict(zip(("out_features", "in1_features", "in2_features"), _shape(m), strict=True)),
    ),
    (_ConvNd, _conv_attributes),
    (_NormBase, _norm_attributes),
    (nn.PReLU, lambda m: {"num_parameters": _shape(m)[0]}),
)
