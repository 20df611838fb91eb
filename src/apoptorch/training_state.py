"""Optimizers, schedulers, scalers and generators of random numbers as JSON beside tensors, and back.

Encoded: plain values, lists and dicts with text keys as they are; all else as {"!": kind, "of": content}.
"""

import copy
import math
import random
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apoptorch.batches import Batch, joined
from apoptorch.distributed import Ranks
from apoptorch.errors import CheckpointError

_KIND = "!"
_MAPPINGS: dict[str, type] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}


def encoded(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    """`value` as JSON; its tensors go to `tensors`, under names that begin with `where`.

    Raises:
        CheckpointError: something in it is neither plain data nor a tensor.
    """
    if isinstance(value, Tensor):
        name = f"{where}#{len(tensors)}"
        tensors[name] = value.detach()
        return {_KIND: "tensor", "of": name}
    if isinstance(value, float) and not math.isfinite(value):
        return {_KIND: "float", "of": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        items = [encoded(item, tensors, f"{where}/{i}") for i, item in enumerate(value)]
        return items if type(value) is list else {_KIND: "tuple", "of": items}
    if type(value).__name__ in _MAPPINGS and isinstance(value, dict):
        plain = type(value) is dict and all(type(key) is str for key in value) and _KIND not in value
        pairs = [
            [encoded(key, tensors, f"{where}/key{i}"), encoded(item, tensors, f"{where}/{i if not plain else key}")]
            for i, (key, item) in enumerate(value.items())
        ]
        return dict(pairs) if plain else {_KIND: type(value).__name__, "of": pairs}
    if (scalar := getattr(value, "item", None)) and getattr(value, "shape", None) == ():  # numpy's
        return encoded(scalar(), tensors, where)
    raise CheckpointError(
        f"`{where}` must be numbers, text, lists, dicts or tensors, got {type(value).__name__}. Leave it out of `save`."
    )


def decoded(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encoded` was given.

    Raises:
        CheckpointError: `value` isn't what `encoded` writes.
    """
    if isinstance(value, list):
        return [decoded(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if _KIND not in value:
        return {key: decoded(item, tensors) for key, item in value.items()}
    kind: Any = value[_KIND]
    content: Any = value.get("of")
    try:
        if kind == "tensor":
            return tensors[content]
        if kind == "float":
            return float(content)
        if kind == "tuple":
            return tuple(decoded(item, tensors) for item in content)
        return _MAPPINGS[kind]({decoded(key, tensors): decoded(item, tensors) for key, item in content})
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"`training` must be what `save` wrote, got {kind!r}. The checkpoint is damaged."
        ) from error


def state_of(item: Any) -> Any:
    """The state of an optimizer, scheduler, scaler or module; plain data is its own state."""
    return item.state_dict() if hasattr(item, "state_dict") else item


@contextmanager
def loaded(name: str, item: Any, state: Any) -> Iterator[None]:
    """Within, `item` goes on from that state; if it can't, or the block fails, from its own.

    Raises:
        CheckpointError: it can't.
    """
    attributes = dict(getattr(item, "__dict__", {}))
    own = None if isinstance(item, Optimizer) else copy.deepcopy(state_of(item))  # an optimizer's is in new objects
    try:
        with _damaged(name):
            item.load_state_dict(state)
        yield
    except BaseException:
        if own is not None:
            item.load_state_dict(own)
        getattr(item, "__dict__", {}).update(attributes)
        raise


@contextmanager
def _damaged(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a user's object, or torch, makes of a state that isn't its own
        told = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        rule = "must be as it was at the start of the run that was saved"
        raise CheckpointError(f"`{name}` {rule}, got {told} when it loaded its state. Build the same.") from error


def random_state() -> dict[str, Any]:
    """The generators of this process: torch (each device), Python, and numpy where it is in use."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        state["numpy"] = (
            name,
            [int(key) for key in keys],
            *(float(x) if i == 2 else int(x) for i, x in enumerate(rest)),
        )
    return state


def set_random_state(states: list[dict[str, Any]], ranks: Ranks) -> None:
    """This rank's generators as they were; a rank that there was none of begins at its own seed.

    Raises:
        CheckpointError: these are no states; the generators are left as they are.
    """
    own = random_state()
    try:
        with _damaged("random numbers"):
            if ranks.rank < len(states):
                _set_generators(states[ranks.rank])
            else:
                torch.manual_seed(torch.initial_seed() + ranks.rank)
    except CheckpointError:
        _set_generators(own)
        raise


def _set_generators(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(_tupled(state["python"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state_all(state["cuda"])
    if "numpy" in state and (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.set_state(state["numpy"])


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value


def pooled_batches(state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The state of the apoptosis of all ranks: what each has gathered, joined step by step.

    Data that can't be joined along its first dimension is let go: it is gathered again.
    """
    if ranks.alone:
        return state
    by_rank = [[_batch(item) for item in items] for items in ranks.gather(state["batches"])]
    steps = []
    for parts in zip(*by_rank, strict=True):
        whole: Batch | None = parts[0]
        for part in parts[1:]:
            whole = None if whole is None else joined(whole, part)
        steps.append(whole)
    kept = [] if None in steps else [[list(b.args), b.kwargs, b.targets] for b in steps if b is not None]
    return {**state, "batches": kept}


def own_batches(state: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The state as this rank goes on from: its rows of what all have gathered."""
    if ranks.alone:
        return state
    own = [_batch(item).map(lambda t: t.tensor_split(ranks.size)[ranks.rank]) for item in state["batches"]]
    return {**state, "batches": [[list(b.args), b.kwargs, b.targets] for b in own]}


def _batch(item: Any) -> Batch:
    args, kwargs, targets = item
    return Batch(tuple(args), kwargs, targets)
