"""Model -> ATen graph, by torch.export."""

import contextlib
import gc
import io
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.export
import torch.export._trace  # else imported by the first export, half a second into the training
from torch import nn
from torch._ops import HigherOrderOperator
from torch.export.graph_signature import InputKind
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ExportError


@contextlib.contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Puts the training mode of every module and the values of all buffers back, and leaves the RNG untouched.

    Within, what torch.compile compiled runs as it is written: nothing is compiled at widths that don't last.

    Within, SyncBatchNorm normalises this rank's data by itself: it waits for no other rank, whatever data that has.
    """
    modes = {module: module.training for module in model.modules()}
    owned = {module: dict(module._buffers) for module in modes}  # forward() may put others in their place
    values = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    devices = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    synchronised = [module for module in modes if isinstance(module, nn.SyncBatchNorm)]
    for module in synchronised:
        module.forward = partial(_BatchNorm.forward, module)
    try:
        with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for module in synchronised:
            del module.forward
        for module, mode in modes.items():
            module.training = mode
            module._buffers.clear()
            module._buffers.update(owned[module])
        with torch.no_grad():
            for buffer, value in values.items():
                buffer.copy_(value)


@contextlib.contextmanager
def rehearsing(model: nn.Module) -> Iterator[None]:
    """What forward() writes into its modules' attributes on tensors without data (a cache, a flag) goes again."""
    before = {module: dict(vars(module)) for module in model.modules()}
    try:
        yield
    finally:
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


class _Count(int):
    """How many batches a batch norm has seen, in place of a tensor."""

    def add_(self, _: int) -> "_Count":
        return self


class _BatchNorms(TorchDispatchMode):
    """What a batch norm gives is like its input: torch would find that out by two dozen ops for every new shape."""

    supports_higher_order_operators = True
    _TRAINING = torch.ops.aten._native_batch_norm_legit.default
    _EVAL = torch.ops.aten._native_batch_norm_legit_no_training.default

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # torch.cond and its like compile their branches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (self._TRAINING, self._EVAL):
            return func(*args, **(kwargs or {}))
        saved = args[0].new_empty(args[0].shape[1] if func is self._TRAINING else 0)
        return torch.empty_like(args[0]), saved, saved


@contextlib.contextmanager
def _cheaply(model: nn.Module) -> Iterator[None]:
    """Within `rehearsing` and `preserved`, export of the model takes less time, and gives the channels no less.

    The batches that a batch norm counts are no input of the graph, and counting them is no op. The garbage collector
    rests: it would go through the growing graph.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module._buffers.pop("num_batches_tracked", None) is not None:
            vars(module)["num_batches_tracked"] = _Count(1)
    collects = gc.isenabled()
    gc.disable()
    try:
        with _BatchNorms():
            yield
    finally:
        if collects:
            gc.enable()


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], modes: tuple[bool, ...] = (True, False)
) -> torch.export.ExportedProgram:
    """The model's graph in training mode or, where that can't be exported, in eval mode; `modes`: which are tried.

    A forward() that prepares its parameters once for each mode (RWKV scales weights for inference) does so only where
    the mode changes: the graph of the mode in which it doesn't is taken.

    Raises:
        ExportError: no mode could be exported; the message says what was tried and how each try failed.
    """
    failures, programs = [], []
    for training in modes:
        output = io.StringIO()  # a failing export prints its whole graph
        with (
            rehearsing(model), preserved(model), _cheaply(model),
            contextlib.redirect_stdout(output), contextlib.redirect_stderr(output),
        ):  # fmt: skip
            model.train(training)
            try:
                programs.append(torch.export.export(model, args, kwargs, strict=False))
            except Exception as error:  # export raises whatever the user's forward raises
                text = next((line for line in str(error).splitlines() if line.strip()), "no message")
                failures.append(f"in {'train' if training else 'eval'}(): {type(error).__name__}: {text.strip()[:300]}")
                continue
        if not _prepares_parameters(programs[-1]):
            return programs[-1]
    if programs:
        return programs[0]
    raise ExportError(
        f"`model` ({type(model).__name__}) could not be captured by torch.export(strict=False); tried\n  "
        + "\n  ".join(failures)
        + "\nMake forward() free of data-dependent Python control flow, or apply apoptosis to a submodule."
    )


def _prepares_parameters(program: torch.export.ExportedProgram) -> bool:
    """Does a parameter enter a block of code with a graph of its own (torch.no_grad())?"""
    kinds = {spec.arg.name: spec.kind for spec in program.graph_signature.input_specs}
    return any(
        kinds.get(used.name) == InputKind.PARAMETER
        for node in program.graph.nodes
        if isinstance(node.target, HigherOrderOperator)
        for used in node.all_input_nodes
    )
