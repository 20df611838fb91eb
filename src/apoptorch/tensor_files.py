"""The tensors of a checkpoint on the disk: a safetensors file or, written by several ranks, a directory of them.

A directory is written and read by torch.distributed.checkpoint: each rank writes what it alone has and its share of
what all have, and any number of ranks reads it.
"""

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from apoptorch.distributed import Ranks
from apoptorch.errors import CheckpointError
from apoptorch.sharding import empty_shard, is_sharded


def entry_of(tensor: Tensor) -> dict[str, Any]:
    """What a manifest says of a tensor."""
    whole = {"shape": list(tensor.shape), "dtype": dtype_name(tensor)}
    return {**whole, "sharded": True} if is_sharded(tensor) else whole


def write(tensors: Mapping[str, Tensor], path: Path, ranks: Ranks) -> None:
    """Write `tensors` to `path`, and wait until they are on the disk. On several ranks a collective.

    Raises:
        CheckpointError: it failed, on all ranks.
    """
    if ranks.alone:
        copies = {n: t.to("cpu", copy=True, memory_format=torch.contiguous_format) for n, t in whole(tensors).items()}
        save_file(copies, path)
        sync(path)
        return
    try:
        writer = HuggingFaceStorageWriter(str(path), save_distributed=True)
        save(dict(tensors), storage_writer=writer, process_group=ranks.group)
    except CheckpointException as error:
        raise CheckpointError(
            f"`{path.name}` must be written by all ranks, got {' '.join(str(error).split())}."
        ) from error
    if ranks.rank == 0:
        sync(path)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Tensors that one rank has all of."""
    return {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in tensors.items()}


def read(path: Path, entries: Mapping[str, Any], ranks: Ranks) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a file or directory that holds exactly what the manifest's entries say, or the problems.

    Where the ranks share out a model, what was sharded when it was written is again.
    """
    try:
        values, problems = (_of_directory if path.is_dir() else _of_file)(path, entries, ranks)
    except (OSError, SafetensorError, CheckpointException, KeyError, ValueError) as error:
        got = " ".join(str(error).split())
        return {}, [f"`{path.name}` must be a safetensors file, or a directory of them, got {got}. It is damaged."]
    dtypes = {name: entry["dtype"] for name, entry in entries.items()}
    found = {name: dtype_name(value) for name, value in values.items()}
    return values, problems or [*differences(f"dtype, in {path.name}, of", dtypes, found)]


def _of_file(path: Path, entries: Mapping[str, Any], ranks: Ranks) -> tuple[dict[str, Tensor], list[str]]:
    with safe_open(path, framework="pt") as opened:
        shapes = {name: list(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        if problems := _shape_problems(path, entries, shapes):
            return {}, problems
        return {name: opened.get_tensor(name) for name in shapes}, []


def _of_directory(path: Path, entries: Mapping[str, Any], ranks: Ranks) -> tuple[dict[str, Tensor], list[str]]:
    reader = HuggingFaceStorageReader(str(path))
    found: dict[str, Any] = reader.read_metadata().state_dict_metadata
    if problems := _shape_problems(path, entries, {name: list(entry.size) for name, entry in found.items()}):
        return {}, problems
    values = {
        name: empty_shard(ranks.sharded, found[name].size, found[name].properties.dtype)
        if ranks.sharded is not None and entry.get("sharded")
        else torch.empty(found[name].size, dtype=found[name].properties.dtype)
        for name, entry in entries.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # each rank reads by itself, so that one that fails leaves none waiting
        load(values, storage_reader=reader, no_dist=True)
    return values, []


def _shape_problems(path: Path, entries: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    expected = {name: entry["shape"] for name, entry in entries.items()}
    return [*differences(f"shape, in {path.name}, of", expected, found)]


def differences(what: str, expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*expected, *found]):
        if (a := expected.get(name, "nothing")) != (b := found.get(name, "nothing")):
            yield f"The {what} `{name}` must be {a}, as the manifest says, got {b}. Use the model that was saved."


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(path: Path) -> None:
    """Wait until `path` is on the disk; a directory can only be synced on POSIX."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
