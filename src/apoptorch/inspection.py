"""What a model consists of, as apoptosis sees it: its channel groups, with their shares of the whole."""

from typing import Any

from torch import nn
from torch.utils._pytree import tree_leaves

from . import checks
from .discovery import discovered
from .network import Network
from .plan import ChannelGroup


def inspected(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The model's parameters, forward FLOPs for these inputs, and its channel groups, in JSON types.

    A group's shares are those of the weights that make or read its channels; a weight between two groups counts for
    both. The model is left as it was.

    Raises:
        ArgumentError: the inputs don't fit the model; all problems together.
        ExportError: the model can't be captured by torch.export.
    """
    checks.checked(checks.model_problems(model))
    model = checks.uncompiled(model)
    args, kwargs = checks.as_call(example_inputs)
    checks.checked([
        *checks.call_problems(model, args, kwargs), *checks.data_problems(tree_leaves((args, kwargs)), "example_inputs")
    ])  # fmt: skip
    network = Network(model, (), (), *discovered(model, args, kwargs))
    return {
        "model": type(model).__name__,
        "parameters": network.parameters,
        "flops": network.flops(),
        "groups": [_described(group, network) for group in network.groups],
    }


def _described(group: ChannelGroup, network: Network) -> dict[str, Any]:
    touching = [term for term in network.costs if group.name in (term.out_group, term.in_group)]
    part = Network(network.model, (), (), network.groups, touching)
    sizes = {name: parameter.numel() for name, parameter in network.model.named_parameters()}
    owned = {slot.tensor for slot in group.slots}
    return {
        "name": group.name,
        "neuron": group.neuron,
        "width": group.width,
        "parameter_share": sum(sizes.get(name, 0) for name in owned) / network.parameters,
        "flops_share": part.flops() / (network.flops() or 1.0),
        "prunable": group.prunable,
        "reason": group.reason,
    }
