"""What surgery computes, without changing anything: cuts, folds, parametrizations, state, size attributes.

Shapes: n channels in a group, k survivors, each `inner` entries wide; `left`: what remains of a dimension.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized
from torch.optim import LBFGS, Optimizer

from apoptorch.multihead import is_narrow
from apoptorch.plan import Fold, Slot
from apoptorch.surgery.places import Cut

Target = Tensor | ParametrizationList
FOLLOWING = "apoptosis_sizes"  # names, kept on a user's module, of its integer attributes that follow a group's width


def attributes(module: nn.Module) -> dict[str, Any]:
    """A module's size attributes: what they must be by the shapes of its tensors, and those that were narrowed."""
    known = _following(module)
    for types, sizes in _ATTRIBUTES:
        if isinstance(module, types):
            return known | sizes(module)
    if type(module).__name__ == "Conv1D" and {"nx", "nf"} <= vars(module).keys():  # transformers
        weight: Any = module.weight
        return known | {"nx": weight.shape[0], "nf": weight.shape[1]}
    return known


def following(model: nn.Module) -> dict[str, dict[str, int]]:
    """The size attributes that were narrowed and that no tensor's shape tells, by module and name."""
    return {path: sizes for path, module in model.named_modules() if (sizes := _following(module))}


def note_sizes(module: nn.Module, state: Any, prefix: str, metadata: dict[str, Any]) -> None:
    """A hook: `module.state_dict()` holds, in its metadata, those that no tensor's shape tells."""
    metadata[FOLLOWING] = _following(module)


def _following(module: nn.Module) -> dict[str, int]:
    return {name: getattr(module, name) for name in vars(module).get(FOLLOWING, ())}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by qualified name, tied ones under each of their names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def layout(module: nn.Module) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape of every tensor, and the first name of the tensor that it is tied to."""
    first: dict[int, str] = {}
    return {n: (tuple(t.shape), first.setdefault(id(t), n)) for n, t in named_tensors(module).items()}


def target_of(network: nn.Module, tensors: Mapping[str, Tensor], name: str) -> Target | None:
    """The tensor by that name, or the parametrizations that compute it; None if there is no way to write it."""
    path, _, attribute = name.rpartition(".")
    owner = None if name in tensors else dict(network.named_modules()).get(path)
    if owner is None or not is_parametrized(owner, attribute):
        return tensors.get(name)
    chain = getattr(owner.parametrizations, attribute)
    return chain if all(hasattr(step, "right_inverse") for step in chain) else None


def originals(target: Target) -> list[Tensor]:
    return [*target.parameters(recurse=False)] if isinstance(target, ParametrizationList) else [target]


def effective(target: Target) -> Tensor:
    """What the model computes with; nothing is written, not even the vectors that spectral_norm iterates."""
    if isinstance(target, Tensor):
        return target.detach()
    copies = {name: tensor.detach().clone() for name, tensor in named_tensors(target).items()}
    return functional_call(target, copies, ())


def right_inverse(target: Target, value: Any) -> Sequence[Tensor]:
    """What the originals must be for `target` to be `value`."""
    if isinstance(target, Tensor):
        return [value]
    steps: list[Any] = list(target)
    if all(isinstance(step, _SpectralNorm) for step in steps):  # their right_inverse would lose the scale
        return [value * (originals(target)[0].norm() / effective(target).norm())]
    for step in reversed(steps):
        value = step.right_inverse(value)
    return [value] if isinstance(value, Tensor) else value


def own_tensors(module: nn.Module) -> list[Tensor]:
    chains: Any = module.parametrizations if is_parametrized(module) else nn.ModuleDict()
    return [*module.parameters(recurse=False), *module.buffers(recurse=False), *chains.parameters()]


def cut(tensor: Tensor, slot: Slot, source: Int64[Tensor, " left"]) -> Tensor:
    """A copy of the entries `source` of a slot, in the memory format of `tensor`."""
    if slot.split is None:
        return take(tensor, slot.dim, source)
    return like(slot.closed(take(slot.opened(tensor), slot.dim, source)), tensor)


def take(tensor: Tensor, dim: int, index: Int64[Tensor, " k"]) -> Tensor:
    """A copy of the entries `index` along `dim`, in the memory format of `tensor`."""
    return like(tensor[(slice(None),) * dim + (index.to(tensor.device),)], tensor)


def like(new: Tensor, old: Tensor) -> Tensor:
    """`new`, its dimensions laid out in memory in the order that `old` has (channels_last stays so)."""
    order = sorted(range(old.ndim), key=old.stride, reverse=True)
    return new.permute(order).contiguous().permute([order.index(dim) for dim in range(old.ndim)])


def wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def folded(weight: Tensor, slot: Slot, cut: Cut, keep: Int64[Tensor, " k"], fold: Fold) -> Tensor:
    """weight @ coeffs along the slot, cut to what stays.

    Only what survivors gain is computed, so that a pure selection is exact to the bit.
    """
    gains, dim, weight = fold.coeffs.cpu().clone(), slot.dim, slot.opened(weight)
    gains[keep.cpu(), torch.arange(len(keep))] -= 1.0
    rows = gains.ne(0).any(1).nonzero()[:, 0]
    new = take(weight, dim, cut.source)
    if rows.numel():
        removed = wide(take(weight, dim, cut.index[rows].flatten())).unflatten(dim, (len(rows), -1)).movedim(dim, -1)
        gained = removed.flatten(0, -2) @ wide(gains[rows]).to(weight.device)  # one product, not a batch
        gained = gained.unflatten(0, removed.shape[:-1]).movedim(-1, dim).flatten(dim, dim + 1)
        places = cut.place[cut.index[cut.lead].flatten()].to(weight.device)
        new = wide(new).index_add(dim, places, gained).to(weight.dtype)
    return slot.closed(new)


def scaled(tensor: Tensor, slot: Slot, cut: Cut, scale: Float64[Tensor, " k"]) -> Tensor:
    """A tensor that was cut, with its channels multiplied by `scale`."""
    parts, factors = slot.opened(tensor), torch.ones(len(cut.source), dtype=torch.float64)
    factors[cut.place[cut.index[cut.lead]]] = scale.double().cpu()[:, None].expand(len(scale), cut.index.shape[1])
    shape = [1] * parts.ndim
    shape[slot.dim] = -1
    return slot.closed((wide(parts) * wide(factors.view(shape)).to(parts.device)).to(tensor.dtype))


def constant_of(weight: Tensor, slot: Slot, cut: Cut, shift: Float64[Tensor, " n"]) -> Float64[Tensor, " m"]:
    """What inputs of constant `shift` add to each of the m outputs: summed over channels, inner and taps."""
    channels = slot.opened(weight)
    constants, shape = torch.zeros(channels.shape[slot.dim], dtype=torch.float64), [1] * weight.ndim
    constants[cut.index] = shift.double().cpu()[:, None].expand_as(cut.index)
    shape[slot.dim] = -1
    constants = wide(constants.view(shape)).to(weight.device).expand_as(channels)
    outputs = 1 if slot.dim == 0 else 0  # a transposed convolution's weight is (n, m, ...), others (m, n, ...)
    return (wide(weight) * slot.closed(constants)).movedim(outputs, 0).flatten(1).sum(1)


def state_of(optimizer: Optimizer, tensor: Tensor) -> dict[str, Any]:
    """State that can be narrowed; LBFGS's is dropped instead."""
    return {} if isinstance(optimizer, LBFGS) else optimizer.state.get(tensor, {})


def is_known_state(value: Any, *shapes: Sequence[int]) -> bool:
    if not isinstance(value, Tensor):
        return value is None or isinstance(value, bool | int | float | str)
    fits = value.ndim == len(shapes[0])  # 1 where Adafactor averages
    return value.numel() == 1 or (fits and all(v in (1, *s) for v, *s in zip(value.shape, *shapes, strict=True)))


def narrowed_state(value: Any, shape: torch.Size, slot: Slot, source: Int64[Tensor, " left"]) -> Any:
    """Optimizer state with the parameter's dimensions, cut like it where it isn't averaged (size 1)."""
    if not isinstance(value, Tensor) or value.ndim != len(shape) or value.shape[slot.dim] != shape[slot.dim]:
        return value
    if slot.split and value.shape[slot.split[0]] != shape[slot.split[0]]:  # one value for all blocks
        return take(value, slot.dim, source[: len(source) // slot.split[1]])
    return cut(value, slot, source)


def _weight_shape(module: Any) -> tuple[int, ...]:
    target = module.parametrizations.weight if is_parametrized(module, "weight") else module.weight
    return tuple(effective(target).shape)


def _conv_attributes(conv: Any) -> dict[str, Any]:
    rows, columns = _weight_shape(conv)[:2]
    transposed, groups = isinstance(conv, _ConvTransposeNd), conv.groups
    if groups > 1 and groups == conv.in_channels:  # depthwise: as many groups as inputs
        groups = rows if transposed else rows * groups // conv.out_channels
    inputs, outputs = (rows, columns * groups) if transposed else (columns * groups, rows)
    return {"in_channels": inputs, "out_channels": outputs, "groups": groups}


def _norm_attributes(norm: Any) -> dict[str, Any]:
    tensor = norm.running_mean if norm.weight is None else norm.weight
    return {} if tensor is None else {"num_features": tensor.shape[0]}


def _recurrent_attributes(rnn: Any) -> dict[str, Any]:
    gates = {"LSTM": 4, "GRU": 3}.get(rnn.mode, 1)
    return {"hidden_size": rnn.weight_hh_l0.shape[0] // gates, "input_size": rnn.weight_ih_l0.shape[1]}


def _attention_attributes(attention: Any) -> dict[str, Any]:
    return {"num_heads": attention.out_proj.weight.shape[1] // attention.head_dim} if is_narrow(attention) else {}


def _by_weight(*names: str) -> Callable[[Any], dict[str, Any]]:
    """Attributes named in the order of the weight's dimensions."""
    return lambda module: dict(zip(names, _weight_shape(module), strict=True))


_ATTRIBUTES: list[tuple[type, Callable[[Any], dict[str, Any]]]] = [
    (nn.Linear, _by_weight("out_features", "in_features")),
    (nn.Bilinear, _by_weight("out_features", "in1_features", "in2_features")),
    (nn.PReLU, _by_weight("num_parameters")),
    (_ConvNd, _conv_attributes),
    (_NormBase, _norm_attributes),
    (nn.RNNBase, _recurrent_attributes),
    (nn.MultiheadAttention, _attention_attributes),
    (nn.Embedding, lambda module: dict(zip(("num_embeddings", "embedding_dim"), module.weight.shape, strict=True))),
]
