"""Save a shrunk model, and load it into one that is built at full size. Nothing is ever unpickled.

A checkpoint is a directory: `manifest.json` (names, shapes, dtypes, ties, module attributes, apoptosis state) and
the safetensors file, or the directory of them, that it names. The manifest is replaced last and in one step, so that
the directory holds the old checkpoint or the new one, whenever a save is interrupted.
"""

import json
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from apoptorch import tensor_files
from apoptorch.distributed import Ranks, unwrapped
from apoptorch.errors import CheckpointError, SurgeryError
from apoptorch.surgery import Surgery, attributes, layout, named_tensors
from apoptorch.tensor_files import differences, dtype_name
from apoptorch.training_state import (
    decoded,
    encoded,
    loaded,
    own_batches,
    pooled_batches,
    random_state,
    set_random_state,
    state_of,
)

__all__ = ["load", "save"]

_MANIFEST, _FORMAT, _VERSION, _MAX_BYTES = "manifest.json", "apoptorch", 1, 1 << 28
_GATHERED, _TRAINING, _RANDOM = "apoptosis/", "training/", "random numbers"


class _HasState(Protocol):
    def state_dict(self) -> dict[str, Any]: ...


class _Resumable(Protocol):
    def resuming(self, state: dict[str, Any]) -> AbstractContextManager[None]: ...


def save(model: nn.Module, path: str | os.PathLike[str], apoptosis: _HasState | None = None, **training: Any) -> None:
    """Write `model`, at the widths that it has now, and what is given of its training to the directory `path`.

    Args:
        model: the model, also inside DDP or torch.compile, or after fully_shard. All ranks that train it call this.
        path: made if need be; a checkpoint that is there is replaced in one step.
        apoptosis: its state goes into the manifest.
        training: what else a resumed run needs, by any names: objects with a state_dict (optimizer, scheduler, scaler)
            and plain data (epoch=3). With any of them, the generators of random numbers are saved too.

    Raises:
        CheckpointError: `path` is a file, or something has state that is neither tensors nor plain data.
        AbandonedError: the same, on some of several ranks.
    """
    model, ranks = unwrapped(model)
    state = None if apoptosis is None else pooled_batches(apoptosis.state_dict(), ranks)
    extras = {name: state_of(item) for name, item in training.items()}
    extras |= {_RANDOM: ranks.gather(random_state())} if training else {}
    path, name = Path(path), ranks.first(f"model-{uuid.uuid4().hex}{'.safetensors' if ranks.alone else ''}")
    with ranks.together("saving"):
        manifest, tensors = _manifest(model, path, name, state, extras)
        text = json.dumps(manifest, indent=1)
        path.mkdir(parents=True, exist_ok=True)
    with ranks.together("saving"):
        tensor_files.write(tensors, path / name, ranks)
    with ranks.together("saving"):
        if ranks.rank == 0:
            _publish(path, name, text)


def _manifest(
    model: nn.Module, path: Path, name: str, state: Any, extras: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tied = {name: first for name, (_, first) in layout(model).items()}
    tensors = {name: tensor.detach() for name, tensor in named_tensors(model).items() if tied[name] == name}
    extra = [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]
    problems = [f"`{name}` must be a tensor, got extra state. Save it beside the checkpoint." for name in extra]
    if path.exists() and not path.is_dir():
        problems.append(f"`path` must be a directory, got a file ({path}). Choose another name.")
    _raise(problems)
    manifest = {
        "format": _FORMAT,
        "version": _VERSION,
        "file": name,
        "tied": {name: first for name, first in tied.items() if first != name},
        "attributes": _all_attributes(model),
        "apoptosis": None if state is None else _without_tensors(state, tensors),
        "training": {name: encoded(item, tensors, f"{_TRAINING}{name}") for name, item in extras.items()},
    }
    manifest["tensors"] = {name: tensor_files.entry_of(tensor) for name, tensor in tensors.items()}
    return manifest, tensors


def _publish(path: Path, name: str, text: str) -> None:
    """From here on the directory holds the new checkpoint."""
    new = path / f"{name}.json"
    new.write_text(text, encoding="utf-8")
    tensor_files.sync(new)
    os.replace(new, path / _MANIFEST)
    tensor_files.sync(path)
    for old in path.glob("model-*"):
        if old.name != name:
            tensor_files.remove(old)


def load(
    model: nn.Module, path: str | os.PathLike[str], apoptosis: _Resumable | None = None, **training: Any
) -> dict[str, Any] | None:
    """Narrow a model that is built at full size to the widths of the checkpoint at `path`, and fill it.

    To resume a run, build all as at its start and give `load` what `save` was given: `apoptosis` narrows its optimizers
    and followers, every object of `training` loads its own state (plain data comes back in the result), and the
    generators of random numbers go on. The number of ranks may be another one. Without them, load before the optimizer
    is built: `load(model, path)`, `Adam(model.parameters())`, `optimizer.load_state_dict(...)`.

    Returns:
        The state of the apoptosis that was saved with it, None if there was none; with `training`, its plain data.

    Raises:
        CheckpointError: every reason why the checkpoint can't be read or doesn't fit; nothing was changed.
        AbandonedError: it can't be read on some of several ranks; nothing was changed on any.
    """
    model, ranks = unwrapped(model)
    with ranks.together("reading the checkpoint"):
        manifest, values, gathered, extras = _read(model, Path(path), apoptosis, training, ranks)
    saved = _with_tensors(manifest["apoptosis"], gathered)
    with ranks.rebuilding(), ExitStack() as transaction:
        if apoptosis is not None:
            transaction.enter_context(apoptosis.resuming(own_batches(saved, ranks)))
        surgery = transaction.enter_context(Surgery(model, ranks=ranks))
        surgery.narrow_({name: list(value.shape) for name, value in values.items()})
        surgery.resize_(_unlike(model, manifest["attributes"]))
        surgery.fill_(values)
        with ranks.together("resuming"):
            for name, item in training.items():
                if hasattr(item, "load_state_dict"):
                    transaction.enter_context(loaded(name, item, extras.pop(name)))
                    ranks.share_state_(item)
            if training:
                set_random_state(extras.pop(_RANDOM), ranks)
    return extras if training else saved


def _read(
    model: nn.Module, path: Path, apoptosis: Any, training: dict[str, Any], ranks: Ranks
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """The manifest; the tensors of the model and of the apoptosis; what else was saved. The model is left as it was."""
    manifest = _read_manifest(path)
    shapes = {name: entry["shape"] for name, entry in _of_model(manifest).items()}
    values, problems = tensor_files.read(path / manifest["file"], manifest["tensors"], ranks)
    gathered = {name: values.pop(name) for name in [*values] if name.startswith(_GATHERED)}
    others = {name: values.pop(name) for name in [*values] if name.startswith(_TRAINING)}
    problems += _name_problems(model, manifest)
    saved = manifest.get("training", {})
    if apoptosis is not None and manifest["apoptosis"] is None:
        problems.append("`apoptosis` must be None, as the checkpoint has none, got one. Load without it.")
    for name in dict.fromkeys([*training, _RANDOM] if training else ()):
        if name not in saved or (name == _RANDOM and name in training):
            known = ", ".join(sorted(saved.keys() - {_RANDOM})) or "nothing"
            problems.append(f"`{name}` must be in the checkpoint, got only {known}. Load what was saved.")
    known = named_tensors(model)
    try:
        with Surgery(model, ranks=ranks) as surgery:
            surgery.narrow_({name: shape for name, shape in shapes.items() if name in known})
            if not problems:
                surgery.resize_(_unlike(model, manifest["attributes"]))
                problems += differences("attributes of", manifest["attributes"], _all_attributes(model))
            surgery.undo_()
    except SurgeryError as error:
        problems += str(error).split("\n")
    _raise(problems)
    try:
        return manifest, values, gathered, {name: decoded(item, others) for name, item in saved.items()}
    except RecursionError as error:
        raise CheckpointError("`training` must be what `save` wrote, got a deeper one. It is damaged.") from error


def _of_model(manifest: dict[str, Any]) -> dict[str, Any]:
    return {n: entry for n, entry in manifest["tensors"].items() if not n.startswith((_GATHERED, _TRAINING))}


def _without_tensors(state: Any, found: dict[str, Tensor]) -> Any:
    """`state` as JSON, its tensors (a calibration set half gathered) moved to `found`."""
    if isinstance(state, Tensor):
        name = f"{_GATHERED}{len(found)}"
        found[name] = state
        return name
    if isinstance(state, dict):
        return {key: _without_tensors(value, found) for key, value in state.items()}
    return [_without_tensors(value, found) for value in state] if isinstance(state, list | tuple) else state


def _with_tensors(state: Any, found: dict[str, Tensor]) -> Any:
    if isinstance(state, dict):
        return {key: _with_tensors(value, found) for key, value in state.items()}
    if isinstance(state, list):
        return [_with_tensors(value, found) for value in state]
    return found.get(state, state) if isinstance(state, str) else state


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / _MANIFEST
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"`{file}` must have at most {_MAX_BYTES} bytes, got {file.stat().st_size}.")
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"`path` must be a directory that `save` wrote, got {path}: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"`{file}` must be JSON, got {error}. The checkpoint is damaged.") from error
    _raise(_manifest_problems(manifest))
    return manifest


def _manifest_problems(manifest: Any) -> Iterator[str]:
    """What is wrong with a manifest by itself."""
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT or manifest.get("version") != _VERSION:
        yield f"`{_MANIFEST}` must be of format {_FORMAT}, version {_VERSION}, got another. Update apoptorch."
        return
    file = manifest.get("file")
    if not isinstance(file, str) or not re.fullmatch(r"model-[0-9a-f]{32}(\.safetensors)?", file):
        yield f"`file` must be the name of a file that `save` wrote, got {file!r}."
    for key in ("tensors", "tied", "attributes"):
        if not isinstance(manifest.get(key), dict):
            yield f"`{key}` must be an object, got {type(manifest.get(key)).__name__}."
    if not isinstance(manifest.get("apoptosis", ""), dict | None):
        yield f"`apoptosis` must be an object or null, got {manifest.get('apoptosis', 'nothing')!r}."
    if not isinstance(manifest.get("training", {}), dict):
        yield f"`training` must be an object, got {manifest['training']!r}."
    tensors = manifest.get("tensors")
    for name, entry in tensors.items() if isinstance(tensors, dict) else ():
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(shape, list) or any(type(size) is not int or size < 0 for size in shape):
            yield f"`shape` of `{name}` must be a list of sizes, got {shape!r}."
        elif not isinstance(entry.get("dtype"), str):
            yield f"`dtype` of `{name}` must be a name, got {entry.get('dtype')!r}."


def _name_problems(model: nn.Module, manifest: dict[str, Any]) -> Iterator[str]:
    """Names, ties and dtypes must be those of the model."""
    tied = {name: first for name, (_, first) in layout(model).items()}
    saved = {name: name for name in _of_model(manifest)} | manifest["tied"]
    yield from differences("name or tie of", saved, tied)
    for name, tensor in named_tensors(model).items():
        if (entry := manifest["tensors"].get(name)) and entry["dtype"] != dtype_name(tensor):
            rule = f"must be {entry['dtype']}, as it was saved"
            yield f"`{name}` {rule}, got {dtype_name(tensor)}. Cast the model first: model.to(...)."


def _all_attributes(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {name: sizes for name, module in model.named_modules() if (sizes := attributes(module))}


def _unlike(model: nn.Module, saved: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Saved attributes that the shapes of the model's tensors don't tell."""
    modules = dict(model.named_modules())
    known = {path: attributes(module) for path, module in modules.items()}
    return {
        path: {name: value for name, value in sizes.items() if name not in known[path]}
        for path, sizes in saved.items()
        if path in modules and isinstance(sizes, dict)
    }


def _raise(problems: Any) -> None:
    if len(lines := list(problems)) == 1:
        raise CheckpointError(lines[0])
    if lines:
        numbered = "\n".join(f"  {i}. {line}" for i, line in enumerate(lines, 1))
        raise CheckpointError(f"{len(lines)} problems, nothing was changed:\n{numbered}")
