"""torch.compile around a model whose widths change."""

from collections.abc import Sequence

import torch
import torch._dynamo
from torch import nn

from .plan import ChannelGroup
from .surgery import named_tensors


def is_compiled(model: nn.Module) -> bool:
    """Is the model, or a module of it, compiled: by torch.compile or its own method?"""
    modules = model.modules() if isinstance(model, nn.Module) else ()
    return any(hasattr(item, "_orig_mod") or getattr(item, "_compiled_call_impl", None) for item in modules)


def follow_widths_(model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
    """Has the next compilation leave the groups' widths open, so that none follows when they change.

    By default torch.compile takes all sizes of parameters and modules as fixed. Convolutions stay so: kernels are
    chosen by their channels, and compiled again.
    """
    torch._dynamo.config.force_parameter_static_shapes = False
    torch._dynamo.config.force_nn_module_property_static_shapes = False
    tensors = named_tensors(model)
    for group in groups:
        places = [(tensors[slot.tensor], slot.dim) for slot in group.slots if slot.tensor in tensors]
        if group.prunable and all(tensor.ndim <= 2 for tensor, _ in places):
            for tensor, dim in places:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)


def compile_once_more_() -> None:
    """torch gives up on code that it compiled often; after an event there is a reason to."""
    torch._dynamo.config.recompile_limit += 1


def graphs() -> int:
    """How many were compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]
