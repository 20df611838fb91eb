"""What a node of an ATen graph is: its op, what it takes, its shape, the line of code that it comes from."""

import functools
import itertools
import operator
import os
import re
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

_TORCH = os.path.dirname(torch.__file__)
VIEWS = (
    "view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "transpose", "permute", "t", "alias", "detach",
    "select", "slice", "split", "split_with_sizes", "chunk", "unbind", "expand", "narrow",
)  # fmt: skip


def op_name(node: Node) -> str:
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__name__", str(node.target))
    return node.target._schema.name.split("::")[-1].removesuffix("_")


def writes(node: Node) -> bool:
    """Is it an op in place?"""
    return getattr(node.target, "__name__", "").partition(".")[0].endswith("_")


def is_view(node: Node) -> bool:
    """May what it gives share memory with what it takes?"""
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return node.target is operator.getitem or any(given.alias_info is not None for given in returns)


def arguments(node: Node) -> tuple[Any, ...]:
    """Positional arguments, without fx's type of everything that they might be."""
    return node.args


def argument(node: Node, index: int, name: str, default: Any = None) -> Any:
    return arguments(node)[index] if len(arguments(node)) > index else node.kwargs.get(name, default)


def nodes_of(node: Node) -> list[Node]:
    """The tensors that an elementwise op takes, as often as it takes them."""
    return [arg for arg in (*arguments(node), *node.kwargs.values()) if isinstance(arg, Node)]


def stack_of(node: Any) -> Node | None:
    """The tensor of which the node is one part along dimension 0, if it is one: x of x[3], of x.unbind()[3]."""
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if op_name(node) == "select" and argument(node, 1, "dim", 0) == 0:
        return arguments(node)[0]
    parts = arguments(node)[0] if node.target is operator.getitem else None
    if isinstance(parts, Node) and op_name(parts) == "unbind" and argument(parts, 1, "dim", 0) == 0:
        return arguments(parts)[0]
    return None


def place_in_stack(node: Any) -> Any:
    """The index of that part: an int, or what computes it."""
    index = arguments(node)[1] if node.target is operator.getitem else argument(node, 2, "index")
    stack: Any = stack_of(node)
    return index % shape(stack)[0] if isinstance(index, int) else index


def shape(node: Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple(int(size) for size in value.shape) if isinstance(value, Tensor) else ()


def code(node: Node) -> tuple[str, str]:
    """The line of code that the op comes from: ("file.py:12", "file.py", line 12, in forward: x = ...)."""
    return _code(node.meta.get("stack_trace") or "")


@functools.lru_cache  # the ops of a line come one after the other, and are asked for often
def _code(stack_trace: str) -> tuple[str, str]:
    lines = [line.strip() for line in stack_trace.splitlines() if line.strip()]
    frames = [(line, source) for line, source in itertools.pairwise(lines) if line.startswith("File ")]
    own = [frame for frame in frames if not frame[0].startswith(f'File "{_TORCH}')] or frames
    found = re.match(r'File "(.*)", line (\d+)', own[-1][0]) if own else None
    if found is None:
        return "", ""
    return f"{found[1]}:{found[2]}", f": {own[-1][0].removeprefix('File ')}: {own[-1][1]}"


def attribute(name: str) -> str:
    """A tensor's name as users know it: "0.weight" for "0.parametrizations.weight.original0"."""
    return re.sub(r"(^|\.)parametrizations\.(\w+)\..*", r"\1\2", name) if "parametrizations" in name else name
