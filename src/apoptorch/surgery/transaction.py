"""The transaction: what changes when channels go, in which order, and how it is put back.

Every change replaces storage (`parameter.data`), a state dict or an attribute, and never overwrites what was
there: what was there before is the snapshot.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import LBFGS, Optimizer

from apoptorch.distributed import ALONE, Ranks
from apoptorch.errors import SurgeryError
from apoptorch.multihead import NarrowMultiheadAttention, is_narrow
from apoptorch.plan import ChannelGroup, FoldPlan, Slot
from apoptorch.sharding import is_sharded, shared_as
from apoptorch.surgery.places import cut_of, cuts, sizes_of, without
from apoptorch.surgery.problems import plan_problems, shape_problems, size_problems, slot_problems
from apoptorch.surgery.tensors import (
    FOLLOWING,
    attributes,
    constant_of,
    cut,
    effective,
    folded,
    layout,
    like,
    named_tensors,
    narrowed_state,
    note_sizes,
    originals,
    own_tensors,
    right_inverse,
    scaled,
    state_of,
    target_of,
    wide,
)


class Surgery:
    """A transaction that removes channels from a model.

    ```
    with Surgery(model, optimizers, followers) as surgery:
        group = surgery.fold_(group, plan)
        if worse(model):
            surgery.undo_()
    ```
    An exception in the block, or in a method, puts everything back bit for bit. Leaving the block commits: the
    old tensors are let go. To be used between training steps, not between forward and backward.

    Args:
        model: the model itself, without DDP or torch.compile around it.
        optimizers: every optimizer that holds parameters of `model` or of `followers`.
        followers: modules with the same tensors (also as a submodule: an `AveragedModel`); they keep the same
            channels, and the folds are applied to their own weights.
        ranks: where `model` is sharded, those that hold it: every rank calls the same methods, and the tensors of one
            channel group at a time are gathered, narrowed and sharded again.

    Raises:
        SurgeryError: a follower doesn't have the model's tensors, shapes and ties.
    """

    def __init__(
        self, model: nn.Module, optimizers: Iterable[Optimizer] = (), followers: Iterable[nn.Module] = (),
        ranks: Ranks = ALONE,
    ):  # fmt: skip
        self._optimizers, self._ranks = list(optimizers), ranks
        self._networks = [model, *(_counterpart(model, follower, i) for i, follower in enumerate(followers))]
        self._log: dict[tuple[Any, ...], Callable[[], None]] | None = {}

    def __enter__(self) -> "Surgery":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is not None:
            self.undo_()
        self._log = None

    def fold_(self, group: ChannelGroup, plan: FoldPlan) -> ChannelGroup:
        """Remove the channels that `plan` does not keep and fold them into the survivors.

        Returns:
            `group` with its new width.

        Raises:
            SurgeryError: the plan doesn't fit the group, a slot doesn't fit its tensor, or an optimizer holds
                state whose layout is unknown.
        """
        problems = plan_problems(group, plan)
        if not problems:
            problems = [p for network in self._networks for p in slot_problems(network, group, plan, self._optimizers)]
        with self._attempt(problems):
            done = set[tuple[int, int]]()
            for network in self._networks:
                self._fold_network_(network, group, plan, done)
        return without([group], group, plan.keep)[0]

    def fold_all_(self, groups: Sequence[ChannelGroup], plans: Iterable[FoldPlan]) -> list[ChannelGroup]:
        """`fold_` for each plan, by the name of its group.

        Whole experts go last, after the hidden units of all.

        Returns:
            All `groups` as they are then: those that share a dimension with a narrowed one (concatenation) have moved.
        """
        now = list(groups)
        experts = {group.name for group in groups if group.gate is not None}
        for plan in sorted(plans, key=lambda plan: plan.group in experts):
            group = next(group for group in now if group.name == plan.group)
            with self._whole(name for slot, bias, _ in cuts(group, plan) for name in (slot.tensor, bias) if name):
                self.fold_(group, plan)
            now = without(now, group, plan.keep)
        return now

    def narrow_(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """What the function `narrow_` does, as a part of this transaction."""
        with self._attempt(p for network in self._networks for p in shape_problems(network, shapes, self._optimizers)):
            for network in self._networks:
                for name, tensor in named_tensors(network).items():
                    if tuple(shapes.get(name, tensor.shape)) != tuple(tensor.shape):
                        with self._whole([name]):
                            self._narrow_to_(name, named_tensors(network)[name], shapes[name])
                self._follow_(network, {id(tensor) for tensor in named_tensors(network).values()})

    def _narrow_to_(self, name: str, tensor: Tensor, shape: Sequence[int]) -> None:
        for dim, size in enumerate(shape):
            if size != tensor.shape[dim]:
                self._narrow_(tensor, Slot(name, dim), torch.arange(size))

    @contextmanager
    def _whole(self, names: Iterable[str]) -> Iterator[None]:
        """Within, the model has the sharded tensors by those names whole; then they are sharded again."""
        opened = []
        try:
            with self._ranks.whole(names, self._optimizers, "removing neurons") as opened:
                yield
        finally:  # what was whole is no part of the model any more
            gone = {id(each.whole) for each in opened}
            self._log = {key: undo for key, undo in (self._log or {}).items() if key[-1] not in gone}
        for each in opened:
            self._remember(("shard", id(each.parameter)), each.reshard_())

    def resize_(self, sizes: Mapping[str, Mapping[str, int]]) -> None:
        """Set integer attributes of modules, by path and name, that the shapes of their tensors don't tell.

        Raises:
            SurgeryError: the model has no such attribute, or a smaller one.
        """
        with self._attempt(p for network in self._networks for p in size_problems(network, sizes)):
            for network in self._networks:
                self._resize_(network, sizes)

    def fill_(self, values: Mapping[str, Tensor]) -> None:
        """Copy values of the same shapes into named parameters and buffers; followers are left alone."""
        tensors = named_tensors(self._networks[0])
        with self._attempt(
            f"`{name}` must be in the model, got nothing by that name." for name in values.keys() - tensors
        ):
            for name, value in values.items():
                tensor = tensors[name]
                if is_sharded(tensor):
                    self._fill_shard_(tensor, value)
                    continue
                copy = torch.empty_like(tensor)  # in the tensor's dtype, device and memory format
                self._replace_(tensor, copy.copy_(value), tensor.grad)

    def _fill_shard_(self, tensor: Any, value: Any) -> None:
        shard = tensor.to_local().detach()
        self._remember(("values", id(tensor)), partial(shard.copy_, shard.clone()))
        shared: Any = shared_as(tensor, value)
        shard.copy_(shared.to_local())

    def undo_(self) -> None:
        """Put back, bit for bit, what was there when the transaction began.

        Raises:
            SurgeryError: the transaction has ended.
        """
        if self._log is None:
            raise SurgeryError("`undo_` must be called before the transaction ends. Call it in the `with` block.")
        with torch.inference_mode(False), torch.no_grad():
            for restore in self._log.values():
                restore()
        self._log.clear()

    @contextmanager
    def _attempt(self, problems: Iterable[str]) -> Iterator[None]:
        if self._log is None:
            problems = ["A `Surgery` must be used before its transaction ends. Open a new one."]
        if message := "\n".join(problems):
            raise SurgeryError(message)
        try:
            with torch.inference_mode(False), torch.no_grad():
                yield
        except BaseException:
            self.undo_()
            raise

    def _fold_network_(
        self, network: nn.Module, group: ChannelGroup, plan: FoldPlan, done: set[tuple[int, int]]
    ) -> None:
        """Fold what isn't `done`: tied tensors, also those that a follower shares, are cut once a dimension."""
        tensors, touched = named_tensors(network), set[int]()
        read, kept = group.by_entry(), group.entries_of(plan.keep)
        for slot, bias, fold in cuts(group, plan):  # consumers first: a fold's constant reads full rows
            target = target_of(network, tensors, slot.tensor)
            if target is None:
                continue  # not after the checks
            touched.update(id(tensor) for tensor in originals(target))
            if (id(target), slot.dim) in done:
                continue
            done.add((id(target), slot.dim))
            weight = effective(target)
            owner, keep = (group, plan.keep) if fold is None else (read, kept)
            how = cut_of(slot, owner, keep, slot.opened(weight).shape[slot.dim])
            if bias is not None and fold is not None and fold.shift is not None:
                b = tensors[bias]
                self._replace_(b, (wide(b) + constant_of(weight, slot, how, fold.shift)).to(b.dtype), b.grad)
            new = cut(weight, slot, how.source) if fold is None else folded(weight, slot, how, keep, fold)
            if plan.scale is not None and slot.tensor in plan.scaled:
                new = scaled(new, slot, how, plan.scale)
            for original, data in zip(originals(target), right_inverse(target, new), strict=True):
                self._narrow_(original, slot, how.source, data)
        self._converge_(network, touched)
        self._follow_(network, touched)
        self._resize_(network, sizes_of([group], {group.name: len(plan.keep)}))

    def _narrow_(self, tensor: Tensor, slot: Slot, source: Int64[Tensor, " left"], new: Tensor | None = None) -> None:
        """Keep the entries `source` of a tensor, its grad and its optimizer state; `new`: what it then holds."""
        old, grad = tensor.shape, tensor.grad
        data = cut(tensor.detach(), slot, source) if new is None else like(new, tensor)
        if data.shape != old:  # else only values change: weight_norm's magnitudes
            grad = None if grad is None else cut(grad, slot, source)
            for optimizer in self._optimizers:
                if state := state_of(optimizer, tensor):
                    narrowed = {key: narrowed_state(value, old, slot, source) for key, value in state.items()}
                    self._set_state_(optimizer, tensor, narrowed)
        self._replace_(tensor, data, grad)

    def _converge_(self, network: nn.Module, touched: set[int]) -> None:
        """Set the singular vectors that spectral_norm tracks to those of the narrowed weight."""
        chains = [module for module in network.modules() if isinstance(module, ParametrizationList)]
        for chain in (c for c in chains if any(id(tensor) in touched for tensor in originals(c))):
            for norm in (step for step in chain if isinstance(step, _SpectralNorm) and hasattr(step, "_u")):
                matrix = wide(norm._reshape_weight_to_matrix(chain.original))
                u = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors[:, -1]
                self._replace_(norm._u, u.to(norm._u.dtype), None)
                self._replace_(norm._v, normalize(matrix.mT @ u, dim=0).to(norm._v.dtype), None)

    def _follow_(self, network: nn.Module, touched: set[int]) -> None:
        """Let the attributes of the modules that own a touched tensor follow its shape."""
        for module in network.modules():
            if any(id(tensor) in touched for tensor in own_tensors(module)):
                for name, value in attributes(module).items():
                    if getattr(module, name) != value:
                        self._set_attribute_(module, name, value)
                if is_narrow(module) and type(module) is nn.MultiheadAttention:
                    self._set_attribute_(module, "__class__", NarrowMultiheadAttention)
        for encoder in (module for module in network.modules() if isinstance(module, nn.TransformerEncoder)):
            if encoder.use_nested_tensor and any(is_narrow(module) for module in encoder.modules()):
                self._set_attribute_(encoder, "use_nested_tensor", False)

    def _resize_(self, network: nn.Module, sizes: Mapping[str, Mapping[str, int]]) -> None:
        for path, values in sizes.items():
            module = network.get_submodule(path)
            for name, value in values.items():
                if name not in (known := attributes(module)):
                    if not (names := vars(module).get(FOLLOWING, ())):
                        self._remember(("hook", id(module)), module.register_state_dict_post_hook(note_sizes).remove)
                    self._set_attribute_(module, FOLLOWING, (*names, name))
                if known.get(name) != value:
                    self._set_attribute_(module, name, value)

    def _replace_(self, tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
        self._remember(("tensor", id(tensor)), partial(_set_tensor, tensor, tensor.data, tensor.grad))
        _set_tensor(tensor, data, grad)
        for optimizer in (o for o in self._optimizers if isinstance(o, LBFGS)):
            parameters = optimizer.param_groups[0]["params"]
            if any(parameter is tensor for parameter in parameters):
                # It has one group, all state with the first parameter, and a history of another function.
                self._set_state_(optimizer, parameters[0], {})
                self._set_attribute_(optimizer, "_numel_cache", None)

    def _set_state_(self, optimizer: Optimizer, tensor: Tensor, state: dict[str, Any]) -> None:
        if tensor in optimizer.state:
            restore = partial(optimizer.state.__setitem__, tensor, optimizer.state[tensor])
            self._remember(("state", id(optimizer), id(tensor)), restore)
            _set_state(optimizer, tensor, state)

    def _set_attribute_(self, owner: Any, name: str, value: Any) -> None:
        restore = partial(setattr, owner, name, getattr(owner, name)) if hasattr(owner, name) else None
        self._remember(("attribute", id(owner), name), restore or partial(delattr, owner, name))
        _set_attribute(owner, name, value)

    def _remember(self, key: tuple[Any, ...], restore: Callable[[], None]) -> None:
        """Log how to put back what `key` stands for, on its first change."""
        if self._log is not None:
            self._log.setdefault(key, restore)


def narrow_(
    model: nn.Module, shapes: Mapping[str, Sequence[int]], optimizers: Iterable[Optimizer] = (),
    followers: Iterable[nn.Module] = (),
) -> None:  # fmt: skip
    """Narrow named parameters and buffers to `shapes`: the first entries stay, attributes follow. All or nothing.

    Optimizer state and followers do too; state may have the new shape already.

    Raises:
        SurgeryError: an unknown name, or a shape that isn't the old one with some dimensions narrowed.
    """
    with Surgery(model, optimizers, followers) as surgery:
        surgery.narrow_(shapes)


# The three functions that change something.


def _set_tensor(tensor: Tensor, data: Tensor, grad: Tensor | None) -> None:
    """Give `tensor` new storage.

    The detour over another dtype makes autograd forget the AccumulateGrad node, which knows the old shape and
    which a live graph (a loss that the user holds) would keep alive.
    """
    tensor.grad = None
    other = torch.float16 if tensor.dtype == torch.float32 else torch.float32
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
    tensor.grad = grad


def _set_state(optimizer: Optimizer, tensor: Tensor, state: dict[str, Any]) -> None:
    optimizer.state[tensor] = state


def _set_attribute(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


def _counterpart(model: nn.Module, follower: nn.Module, index: int) -> nn.Module:
    """`follower`, or the first of its submodules, that has all of the model's tensors."""
    mine = layout(model)
    for module in follower.modules():
        other = layout(module)
        if mine.items() <= other.items():
            return module
        if mine.keys() <= other.keys():
            break
    else:
        other = layout(follower)
    name = next(name for name in mine if other.get(name) != mine[name])
    raise SurgeryError(
        f"`followers[{index}]` must have the tensors of the model, with their shapes and ties, got "
        f"{other.get(name, 'nothing')} instead of {mine[name]} ({name}). Make it a deepcopy of the model."
    )
