"""Models sharded by FSDP2 (`fully_shard`): whole one part at a time, and sharded again at other widths.

The only file that knows the insides of FSDP2: torch has no public way to give a sharded parameter another size.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, empty
from torch.nn.utils.parametrize import is_parametrized
from torch.optim import LBFGS
from torch.utils import swap_tensors
from torch.utils._pytree import tree_map


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def group_of(model: nn.Module) -> Any:
    """The process group that `fully_shard` spread the model over; None if that isn't one."""
    mesh = next(parameter.device_mesh for parameter in model.parameters() if isinstance(parameter, DTensor))
    if mesh.ndim == 1:
        return mesh.get_group()
    return dist.group.WORLD if mesh.size() == dist.get_world_size() else None


def sharding_problems(model: nn.Module, optimizers: Sequence[Any], followers: Sequence[Any]) -> Iterator[str]:
    """What keeps a model to which `fully_shard` was applied from being narrowed."""
    shards = _shards(model)
    if group_of(model) is None:
        yield "`model` must be sharded over one process group or over all ranks, got a part of them. Use one mesh."
    for name, parameter in model.named_parameters():
        placements = parameter.placements if isinstance(parameter, DTensor) else ()
        plain = placements[-1:] == (Shard(0),) and all(isinstance(item, Replicate) for item in placements[:-1])
        if id(parameter) not in shards or not plain:
            got = f"{placements or 'a whole tensor'} ({name}, shape {tuple(parameter.shape)})"
            rule = "be sharded by fully_shard alone, along the first dimension"
            yield f"`model` must {rule}, got {got}. Leave out tensor parallelism, shard_placement_fn, ignored_params."
    if any(shard.offload_to_cpu for shard in shards.values()):
        yield "`model` must be sharded without CPUOffloadPolicy, got it. Keep the shards on the device."
    if any(len(module._get_fsdp_state()._modules) > 1 for module in _parts(model)):
        yield "`model` must be sharded one module at a time, got fully_shard([a, b]). Call it once for each."
    for name, module in model.named_modules():
        if is_parametrized(module):
            yield f"`model` must have no parametrizations where it is sharded, got one ({name}). Train it with DDP."
    if any(isinstance(optimizer, LBFGS) for optimizer in optimizers):
        yield "`optimizer` must not be LBFGS where the model is sharded, got it. Use another one."
    if followers:
        yield f"`followers` must be () where the model is sharded, got {len(followers)}. Train it with DDP."


def reshard_(model: nn.Module) -> None:
    """Frees what forward passes left whole (the root's parameters, say); every rank then holds its shards."""
    for part in _parts(model):
        part.reshard()


def whole_weights(model: nn.Module, names: Iterable[str], weight_of: Callable[[str], Tensor]) -> Iterator[Any]:
    """(name, weight) of every name; the weights of a part (what one `fully_shard` took) are whole at a time."""
    parts = {path: module for path, module in model.named_modules() if isinstance(module, FSDPModule)}
    by_part: dict[str, list[str]] = {}
    for name in names:
        owner = max((path for path in parts if not path or name.startswith(f"{path}.")), key=len)
        by_part.setdefault(owner, []).append(name)
    for owner, own in by_part.items():
        parts[owner].unshard()
        for name in own:
            yield name, weight_of(name)
        parts[owner].reshard()


@contextmanager
def outlined(model: nn.Module, call: Any) -> Iterator[Any]:
    """`call` (arguments of the model) on the meta device; within, the model is a plain one there, all shape."""
    reshard_(model)
    kept = [(module, module.__class__, dict(vars(module))) for module in model.modules()]
    shapes: dict[int, Tensor] = {}

    def outline(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        shape = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        shape = nn.Parameter(shape, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shape
        return shapes.setdefault(id(tensor), shape)

    try:
        for module in model.modules():
            state = vars(module)
            for kind in ("_parameters", "_buffers"):
                state[kind] = {name: outline(tensor) for name, tensor in state[kind].items()}
            if isinstance(module, FSDPModule):
                own = module._get_fsdp_state()
                for kind in ("_forward_pre_hooks", "_forward_hooks"):
                    hooks = state[kind].items()
                    state[kind] = type(state[kind])((i, h) for i, h in hooks if getattr(h, "__self__", None) is not own)
                module.__class__ = type(module).__mro__[type(module)._orig_cls_mro_index]
        yield tree_map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, call)
    finally:
        for module, kind, state in kept:
            vars(module).update(state)
            module.__class__ = kind


class Opened:
    """A sharded parameter in whose place the model has it whole; its gradient and optimizer state are whole too.

    The constructor is a collective.
    """

    def __init__(self, parameter: Any, shard: Any, optimizers: Sequence[Any]):
        self.parameter, self._shard = parameter, shard
        self._states = [(o, o.state[parameter]) for o in optimizers if parameter in o.state]
        self.whole = nn.Parameter(parameter.full_tensor().detach(), parameter.requires_grad)
        self.whole.grad = None if parameter.grad is None else parameter.grad.full_tensor()
        shard._setattr_on_modules(self.whole)
        for optimizer, state in self._states:
            whole = {key: value.full_tensor() if is_sharded(value) else value for key, value in state.items()}
            optimizer.state[self.whole] = whole

    def close_(self) -> None:
        """The shard as it was."""
        self._shard._setattr_on_modules(self.parameter)
        for optimizer, _ in self._states:
            optimizer.state.pop(self.whole, None)

    def reshard_(self) -> Callable[[], None]:
        """Shards what the whole has become; the parameter stays the same object.

        Returns:
            What puts the old shard back.
        """
        shard, before = self._shard, dict(vars(self._shard))
        whole = nn.Parameter(self.whole.detach().contiguous(), self.whole.requires_grad)
        shard._init_sharded_param(whole, shard.device, lambda _: before["fsdp_placement"], shard.mesh_info)
        if shard.post_forward_mesh_info:
            shard._init_sharded_post_forward_param_metadata(whole)
        shard.all_gather_outputs = []
        vars(shard).pop("_unsharded_param", None)
        other = shard.sharded_param
        other.grad = None if self.whole.grad is None else shared_as(self.parameter, self.whole.grad)
        self._place_(other)
        for optimizer, old in self._states:
            new = optimizer.state.pop(self.whole)
            optimizer.state[self.parameter] = {
                key: shared_as(self.parameter, value) if is_sharded(old.get(key)) else value
                for key, value in new.items()
            }

        def restore() -> None:
            vars(shard).clear()
            vars(shard).update(before)
            self._place_(other)
            for optimizer, old in self._states:
                optimizer.state[self.parameter] = old

        return restore

    def _place_(self, other: Any) -> None:
        swap_tensors(self.parameter, other)
        self._shard.sharded_param = self.parameter
        self._shard._setattr_on_modules(self.parameter)


def opened_(model: nn.Module, names: Iterable[str], optimizers: Sequence[Any]) -> list[Opened]:
    """Makes the parameters by those names whole, tied ones once. A collective."""
    reshard_(model)
    shards, known = _shards(model), dict(model.named_parameters(remove_duplicate=False))
    wanted = {id(known[name]): known[name] for name in names if name in known}
    return [Opened(parameter, shards[key], optimizers) for key, parameter in wanted.items() if key in shards]


def shared_as(like: Any, tensor: Tensor) -> Tensor:
    """A tensor that every rank has, shared out as `like` is. No collective."""
    if is_sharded(tensor):
        return tensor
    where = tensor.to(like.device).contiguous()
    return distribute_tensor(where, like.device_mesh, like.placements, src_data_rank=None)


def empty_shard(model: nn.Module, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without values, shared out as the model's parameters are."""
    like: Any = next(model.parameters())
    return empty(*shape, dtype=dtype, device_mesh=like.device_mesh, placements=like.placements)


def share_state_(optimizer: Any) -> None:
    """Shards optimizer state that was loaded whole, as its parameters are."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items() if isinstance(parameter, DTensor) else ():
            if isinstance(value, Tensor) and not is_sharded(value) and value.shape == parameter.shape and value.ndim:
                state[key] = shared_as(parameter, value)


def _parts(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _shards(model: nn.Module) -> dict[int, Any]:
    """FSDP2's own record of every sharded parameter."""
    groups = [group for part in _parts(model) for group in part._get_fsdp_state()._fsdp_param_groups]
    return {id(shard.sharded_param): shard for group in groups for shard in group.fsdp_params}
