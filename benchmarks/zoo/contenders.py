"""What apoptorch, and what Torch-Pruning, makes of one model of the zoo; as plain data."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from apoptorch.graph import trace
from tests.planted import loss, planted

from .entries import Entry, in_precision
from .examine import halved, traced

BATCH, DISTINCT = 32, 8
Record = dict[str, Any]


def apoptorch(entry: Entry) -> Iterator[Record]:
    """Every stage as it is done, so that one that never returns costs only itself."""
    torch.manual_seed(0)
    args, kwargs = entry.inputs(2)
    yield traced(_seeded(entry), args, kwargs)
    yield _planted(entry)
    yield halved(lambda: _seeded(entry), *entry.inputs(BATCH))


def _planted(entry: Entry) -> Record:
    """The planted check in float64 where the model computes in it, else in float32."""
    inputs = entry.inputs(BATCH)
    model, (args, kwargs) = _seeded(entry).double(), in_precision(inputs, torch.float64)
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except RuntimeError:  # a dtype written into forward()
        model, (args, kwargs) = _seeded(entry), inputs
    start = time.process_time()
    outcome, _ = planted(model, args, kwargs, most=DISTINCT)
    return {
        "planted_groups": len(outcome.planted), "planted_problems": outcome.problems, "output": outcome.output,
        "step": outcome.step, "planted_dtype": str(args[0].dtype) if args else str(next(model.parameters()).dtype),
        "planted_s": time.process_time() - start,
    }  # fmt: skip


def torch_pruning(entry: Entry) -> Iterator[Record]:
    """Half of the channels of every layer by magnitude, then one training step, by its own documentation.

    As there, layers that make the output are left out, and it is told the heads of attention modules, whose sizes are
    set by hand afterwards.
    """
    import torch_pruning as tp

    model, (args, kwargs) = _seeded(entry), entry.inputs(2)
    ignored = _output_layers(model, args, kwargs)
    shapes = [leaf.shape for leaf in _tensors(model(*args, **kwargs))]
    before = sum(p.numel() for p in model.parameters())
    heads = dict(_heads(model))
    start = time.process_time()
    pruner = tp.pruner.BasePruner(
        model, kwargs or args, importance=tp.importance.MagnitudeImportance(), pruning_ratio=0.5,
        ignored_layers=ignored, num_heads={layer: count for layer, (_, count) in heads.items()},
        output_transform=lambda output: [leaf for leaf in _tensors(output) if leaf.requires_grad],
    )  # fmt: skip
    yield {"trace_s": time.process_time() - start, "parameters": before}
    pruner.step()
    for layer, (owner, count) in heads.items():
        _resize_attention(owner, layer, count)
    after = sum(p.numel() for p in model.parameters())
    output = model(*args, **kwargs)
    loss(output).backward()
    problems = [] if [leaf.shape for leaf in _tensors(output)] == shapes else ["the outputs have another shape"]
    problems += [] if after < 0.95 * before else [f"only {1 - after / before:.1%} of the parameters went"]
    yield {"parameters_halved": after, "halved_problems": problems}


CONTENDERS: dict[str, Callable[[Entry], Iterator[Record]]] = {"apoptorch": apoptorch, "torch-pruning": torch_pruning}


def _seeded(entry: Entry) -> nn.Module:
    """The model with random weights, also where it starts with zeros (a head), which would hide what it reads."""
    torch.manual_seed(0)
    model = entry.build()
    for parameter in model.parameters():
        if parameter.ndim > 1 and not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return model


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _output_layers(model: nn.Module, args: Any, kwargs: Any) -> list[nn.Module]:
    """The modules whose channels are the model's output, found by apoptorch's own trace; else the last layer."""
    try:
        groups, _ = trace(model, args, kwargs)
        names = {slot.tensor for g in groups if "the model's output" in (g.reason or "") for slot in g.producers}
    except Exception:  # whatever keeps the model from being exported
        names = set()
    made = {id(tensor) for name, tensor in model.named_parameters() if name in names}  # also under a tied name
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]
    return [layer for layer in layers if id(layer.weight) in made] or layers[-1:]


_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_PROJECTIONS = (
    "q", "k", "v", "qkv", "query", "key", "value", "q_proj", "k_proj", "v_proj", "q_lin", "k_lin", "v_lin",
    "query_key_value", "c_attn",
)  # fmt: skip


def _heads(model: nn.Module) -> Iterator[tuple[nn.Module, tuple[nn.Module, int]]]:
    """Layers that make queries, keys and values, with their attention module and its number of heads."""
    for module in model.modules():
        count = next((value for name in _HEADS if isinstance(value := getattr(module, name, None), int)), None)
        for name, child in module.named_children():
            if count and name in _PROJECTIONS and isinstance(child, nn.Linear):
                yield child, (module, count)


def _resize_attention(owner: Any, layer: Any, count: int) -> None:
    """What Torch-Pruning's examples do by hand after pruning the size of the heads."""
    width = layer.out_features // (3 if layer.out_features > layer.in_features * 2 else 1)
    for name, value in (
        ("all_head_size", width), ("attention_head_size", width // count), ("head_dim", width // count),
        ("inner_dim", width), ("embed_dim", width), ("attn_dim", width),
    ):  # fmt: skip
        if isinstance(getattr(owner, name, None), int):
            setattr(owner, name, value)
