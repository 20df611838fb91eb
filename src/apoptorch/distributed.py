"""Several ranks that decide as one. The only file that knows process groups; on one process, the identity.

What ranks measure is pooled, what is expensive to compute is shared out, and what is decided is compared before
anything changes. Work between two collectives runs in `Ranks.together`: a rank that fails there takes the others
with it in order, instead of leaving them waiting.
"""

import hashlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import BuiltinCommHookType
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import sharding
from .errors import AbandonedError, RanksError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes that train one model; `group` None: just this one. `sharded`: the model, where they share it out.

    Every method is a collective: all ranks call it, in the same order.
    Collectives raise RanksError where a rank can't be reached.
    """

    group: Any = None
    wrapper: DistributedDataParallel | None = None
    sharded: nn.Module | None = None

    @property
    def alone(self) -> bool:
        return self.group is None

    @property
    def size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank; tensors arrive on the CPU."""
        found: list[Any] = [value]
        if self.group is not None:
            found *= self.size
            with _reaching():
                dist.all_gather_object(found, placed(value), self.group)
        return found

    def first(self, value: T) -> T:
        """The first rank's value: for what depends on clocks."""
        return self._from(0, value)

    def _from(self, source: int, value: T) -> T:
        if self.group is None:
            return value
        box = [placed(value) if source == self.rank else None]
        with _reaching():
            dist.broadcast_object_list(box, dist.get_global_rank(self.group, source), self.group)
        return value if source == self.rank else box[0]  # pyright: ignore[reportReturnType]

    def total_(self, tensors: Sequence[Tensor]) -> None:
        """Sums over ranks, in place."""
        for tensor in tensors if self.group is not None else ():
            with _reaching():
                dist.all_reduce(tensor, group=self.group)

    def total(self, values: Sequence[float]) -> list[float]:
        return [sum(column) for column in zip(*self.gather(list(values)), strict=True)]

    def longest(self, start: float) -> float:
        """Seconds since `start` (of time.perf_counter), of the slowest rank."""
        return max(self.gather(time.perf_counter() - start))

    def all_reduce_seconds(self, parameters: int, device: torch.device) -> float:
        """Seconds that one all-reduce of so many float32 gradients takes: of a sample of them, by the slowest rank."""
        if self.group is None or parameters == 0:
            return 0.0
        sample = torch.zeros(min(parameters, _SAMPLE), device=device)
        self.total_([sample])  # connections are made by the first one
        start = time.perf_counter()
        self.total_([sample])
        sample.sum().item()  # waits for the device
        return self.longest(start) * parameters / sample.numel()

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Work of one rank, without collectives: what fails on some ranks is abandoned on all.

        Raises:
            AbandonedError: the work failed on some ranks; where it failed on all, each raises its own error instead.
        """
        error = None
        try:
            yield
        except Exception as caught:  # whatever the user's code, or the allocator, raised
            if self.group is None:
                raise
            error = caught
        if self.group is None:
            return
        if error is not None and getattr(error, _AGREED, False):  # by work within this work
            raise error
        failures = self.gather(None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())}")
        if error is not None and None not in failures:
            setattr(error, _AGREED, True)
            raise error
        if failed := {rank: text for rank, text in enumerate(failures) if text is not None}:
            reasons = "; ".join(f"rank {rank}: {text[:300]}" for rank, text in failed.items())
            abandoned = AbandonedError(f"abandoned on all ranks, {doing} failed: {reasons}")
            setattr(abandoned, _AGREED, True)
            raise abandoned from error

    @contextmanager
    def in_step(self, doing: str) -> Iterator[None]:
        """Work on a sharded model, whose forward pass is a collective: no rank begins or goes on if one failed."""
        if self.sharded is None:
            yield
            return
        with self.together(doing):
            pass
        with self.together(doing):
            yield

    @contextmanager
    def whole(self, names: Iterable[str], optimizers: Sequence[Any], doing: str) -> Iterator[list["sharding.Opened"]]:
        """Within, the sharded parameters by those names are whole on every rank; if it fails on one, all keep theirs.

        Yields:
            The parameters that were opened, to be sharded again or closed by the caller.
        """
        if self.sharded is None:
            yield []
            return
        with self.together(doing):
            pass
        opened = sharding.opened_(self.sharded, names, optimizers)
        try:
            with self.together(doing):
                yield opened
        except BaseException:
            for each in opened:
                each.close_()
            raise

    def weights(self, names: Iterable[str], weight_of: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(name, `weight_of(name)`) of every name; of a sharded model, whole until the next one."""
        if self.sharded is not None:
            return sharding.whole_weights(self.sharded, names, weight_of)
        return ((name, weight_of(name)) for name in names)

    def shared(
        self, items: Mapping[str, float], work: Callable[[str], T], doing: str, device: torch.device | None = None
    ) -> dict[str, T]:
        """`work(name)` for every name, done by one rank each and sent to all; values are what each costs."""
        loads, owner = [0.0] * self.size, dict[str, int]()
        for name in sorted(items, key=lambda name: -items[name]):
            owner[name] = loads.index(min(loads))
            loads[owner[name]] += items[name]
        with self.together(doing):
            mine = {name: work(name) for name in items if owner[name] == self.rank}
        found: dict[str, T] = {}
        for source in sorted(set(owner.values())):
            found |= self._from(source, mine)
        return {name: found[name] if self.alone else placed(found[name], device) for name in items}

    def agree(self, what: str, value: Any) -> None:
        """Compares a hash of `value` (plain data, dataclasses and tensors) over ranks.

        Raises:
            AbandonedError: they differ, on all ranks.
        """
        if self.group is None:
            return
        digests = self.gather(fingerprint(value))
        if len(set(digests)) > 1:
            odd = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
            raise AbandonedError(f"abandoned on all ranks: {what} of ranks {odd} differ from those of rank 0")

    def problems(self, own: Sequence[str]) -> list[str]:
        """The problems of all ranks; what not all of them have says whose it is."""
        found = self.gather(list(own))
        by_text = {
            text: [rank for rank, texts in enumerate(found) if text in texts] for texts in found for text in texts
        }
        return [text if len(ranks) == self.size else f"{text} (ranks {ranks})" for text, ranks in by_text.items()]

    def differences(self, facts: Mapping[str, Any]) -> list[str]:
        """One problem for every fact that isn't the same on all ranks; the same text on all of them."""
        found = self.gather(dict(facts))
        names = dict.fromkeys(name for known in found for name in known)
        values = {name: [known.get(name, "nothing") for known in found] for name in names}
        return [
            f"`{name}` must be the same on every rank, got {', '.join(map(str, column))} (by rank). "
            "Build model, optimizer and Apoptosis alike everywhere."
            for name, column in values.items()
            if any(value != column[0] for value in column)
        ]

    @contextmanager
    def outlined(self, call: T) -> Iterator[T]:
        """Within, a sharded model is a plain one without values, and what is yielded its arguments; else as they are.

        No collective.
        """
        if self.sharded is None:
            yield call
            return
        with sharding.outlined(self.sharded, call) as outline:
            yield outline

    def share_state_(self, item: Any) -> None:
        """Optimizer state that was loaded whole, of a sharded model."""
        if self.sharded is not None and isinstance(item, Optimizer):
            sharding.share_state_(item)

    @contextmanager
    def rebuilding(self) -> Iterator[None]:
        """After surgery, also if it was undone, the DDP wrapper sees the parameters' new storage."""
        try:
            yield
        except RanksError:
            raise
        except BaseException:
            self._rebuild_()
            raise
        self._rebuild_()

    def _rebuild_(self) -> None:
        if self.wrapper is not None:
            with _reaching():
                _rebuild_(self.wrapper)


ALONE = Ranks()
_AGREED = "agreed_by_all_ranks"  # on an error that all ranks know of
_SAMPLE = 2**20  # 4 MiB: on a slow network, the whole would take as long as a training step


def unwrapped(model: nn.Module) -> tuple[nn.Module, Ranks]:
    """The module itself, without DDP and torch.compile around it, and the ranks that train it."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, FSDPModule) and any(sharding.is_sharded(p) for p in model.parameters()):
        sharding.reshard_(model)
        group = sharding.group_of(model)
        several = group is not None and dist.get_world_size(group) > 1
        return model, Ranks(group if several else None, sharded=model)
    if not isinstance(model, DistributedDataParallel):
        return model, ALONE
    group = model.process_group
    ranks = Ranks(group if dist.get_world_size(group) > 1 else None, model)
    return getattr(model.module, "_orig_mod", model.module), ranks


def wrapper_problems(ranks: Ranks, policy: Any) -> Iterator[str]:
    """What the DDP wrapper must not be set to, and what can't be done with a sharded model."""
    if ranks.sharded is not None and getattr(policy, "cost", "") == "milliseconds":
        yield "`policy` must count flops where the model is sharded, got cost='milliseconds'. Use cost='flops'."
    if ranks.wrapper is not None and ranks.wrapper.mixed_precision is not None:
        yield "`model` must be wrapped by DDP without mixed_precision, got it. Use torch.autocast in its place."


def _rebuild_(ddp: Any) -> None:
    """What DDP's constructor does for its buckets, on the same object (torch has no public way)."""
    name = ddp._get_ddp_logging_data().get("comm_hook", "")
    static, ddp.reducer, ddp.logger = ddp.static_graph, None, None
    parameters, sparse = ddp._build_params_for_reducer()
    ddp._module_parameters, ddp.static_graph = parameters, False
    ddp._ddp_init_helper(parameters, sparse, ddp._build_debug_param_to_name_mapping(parameters), static)
    ddp._has_rebuilt_buckets = False
    if static:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said when it was built
            ddp._set_static_graph()
    hooks, ddp._comm_hooks = ddp._comm_hooks, []
    for hook, state in hooks:
        for memory in ("error_dict", "p_memory_dict", "q_memory_dict"):  # PowerSGD's, in the old buckets' shapes
            getattr(state, memory, {}).clear()
        ddp.register_comm_hook(state, hook)
    builtin = {str(kind): kind for kind in BuiltinCommHookType.__members__.values()}
    if not hooks and name in builtin:
        ddp._register_builtin_comm_hook(builtin[name])


@contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL say in many words that somebody is gone
        raise RanksError(
            "A rank of the process group can't be reached any more (killed, or out of time): "
            f"{' '.join(str(error).split())[:300]}. Start again from the last checkpoint."
        ) from error


def placed(value: Any, device: torch.device | str | None = "cpu") -> Any:
    """The same plain data or dataclass with its tensors on `device`."""
    if is_dataclass(value) and not isinstance(value, type):
        return type(value)(**{field.name: placed(getattr(value, field.name), device) for field in fields(value)})
    if isinstance(value, dict):
        return {key: placed(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(placed(item, device) for item in value)
    return value.detach().to(device) if isinstance(value, Tensor) else value


def fingerprint(value: Any) -> str:
    """SHA-256 of plain data, dataclasses and tensors, down to the bit."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor) and sharding.is_sharded(value):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())  # each rank has other values
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif is_dataclass(value) and not isinstance(value, type):
        _feed(digest, [getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, dict):
        _feed(digest, list(value.items()))
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(f"{value!r};".encode())
