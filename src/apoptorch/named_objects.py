"""Objects and inputs as they are named on the command line: "package.module:build_model", "1x3x224x224"."""

import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from .checkpoint import load
from .errors import ArgumentError

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool,
)}  # fmt: skip


def named_object(spec: str, argument: str) -> Any:
    """The object that "package.module:name" or "path/to/file.py:name" means; the working directory is importable.

    Raises:
        ArgumentError: there is none, or its module can't be imported.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        rule = "be package.module:name or path/to/file.py:name"
        raise ArgumentError([f"`{argument}` must {rule}, got {spec!r}. Name the module and what to take from it."])
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module = _called(argument, place, lambda: _module(place))
    if not hasattr(module, name):
        public = ", ".join(key for key in vars(module) if not key.startswith("_")) or "nothing"
        raise ArgumentError([f"`{argument}` must name something in {place}, got {name!r}. It has {public[:300]}."])
    return getattr(module, name)


def built(spec: str, argument: str, kind: type, what: str) -> Any:
    """The object itself, or what it returns when it is called without arguments; of the wanted kind.

    Raises:
        ArgumentError: it is something else, or the call failed.
    """
    found = named_object(spec, argument)
    if not isinstance(found, kind) and callable(found):
        found = _called(argument, f"{spec}()", found)
    if not isinstance(found, kind):
        raise ArgumentError(
            [f"`{argument}` must be or return {what}, got {type(found).__name__} ({spec}). Return one."]
        )
    return found


def built_model(spec: str, weights: Path | None = None) -> nn.Module:
    """The model that `spec` names, filled from `weights`: what `apoptorch.save` wrote, or a .safetensors file.

    Raises:
        ArgumentError: there is no such model, or the weights don't fit.
        CheckpointError: the checkpoint doesn't fit the model.
    """
    model = built(spec, "MODEL", nn.Module, "a torch.nn.Module")
    if weights is None:
        return model
    if weights.is_dir():
        load(model, weights)
        return model
    try:
        model.load_state_dict(load_file(weights))
    except (OSError, RuntimeError, SafetensorError) as error:
        rule = "be a directory that apoptorch.save wrote, or a .safetensors file of the model's state_dict"
        text = " ".join(str(error).split())[:300]
        raise ArgumentError([f"`--weights` must {rule}, got {weights}: {text}. Save it as one of these."]) from error
    return model


def example_inputs(specs: Sequence[str]) -> Any:
    """Random tensors of the shapes named: "1x3x224x224", "2x16:int64" (zeros), "input_ids=2x16:int64" by keyword.

    Raises:
        ArgumentError: a shape can't be read, or only some have a keyword.
    """
    found = [_tensor(spec) for spec in specs]
    names = [name for name, _ in found if name]
    if names and (len(names) < len(found) or len(set(names)) < len(names)):
        raise ArgumentError([f"`--input` must have a keyword of its own each, or none, got {', '.join(specs)}."])
    return dict(found) if names else tuple(tensor for _, tensor in found)


def _tensor(spec: str) -> tuple[str, Tensor]:
    match = re.fullmatch(r"(?:([A-Za-z_]\w*)=)?(\d+(?:x\d+)*)(?::(\w+))?", spec)
    if match is None or (match[3] or "float32") not in DTYPES:
        rule = f"be like 1x3x224x224, 2x16:int64 or input_ids=2x16:int64, with a dtype of {', '.join(DTYPES)}"
        raise ArgumentError([f"`--input` must {rule}, got {spec!r}. Give one for each tensor that forward() takes."])
    shape, dtype = [int(size) for size in match[2].split("x")], DTYPES[match[3] or "float32"]
    try:
        tensor = torch.randn(shape) if dtype.is_floating_point else torch.zeros(shape)
    except RuntimeError as error:
        raise ArgumentError([f"`--input` must fit into memory, got {spec!r}. Give a smaller shape."]) from error
    return match[1] or "", tensor.to(dtype)


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    spec = importlib.util.spec_from_file_location(Path(place).stem, place)
    if spec is None or spec.loader is None:
        raise ImportError(f"no Python file {place}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[Path(place).stem] = module
    sys.path.insert(0, str(Path(place).resolve().parent))
    spec.loader.exec_module(module)
    return module


def _called(argument: str, what: str, function: Callable[[], Any]) -> Any:
    """The function's result; what goes wrong inside it is the user's code, and is told with its place."""
    try:
        return function()
    except (Exception, SystemExit) as error:  # user code raises whatever it likes
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = "" if last.filename.startswith("<") else f" ({last.filename}, line {last.lineno})"
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"
        raise ArgumentError(
            [f"`{argument}` must be importable and run, got {text} from {what}. Fix it there."]
        ) from error


def calibration_data(spec: str) -> Iterator[Any]:
    """The batches that `spec` names: something iterable, or a function that returns it. Read only as far as is asked.

    Raises:
        ArgumentError: it is something else, or reading it failed.
    """
    batches, end = iter(built(spec, "--data", Iterable, "batches (an iterable)")), object()
    while (batch := _called("--data", spec, lambda: next(batches, end))) is not end:
        yield batch
