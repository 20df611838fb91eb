"""`Apoptosis` removes redundant neurons while a network trains. The schedule lives here, and only here."""

import math
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from threading import get_ident
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from . import checks, compilation
from .batches import Batch, LossFn, split
from .discovery import discovered, positions
from .distributed import fingerprint, unwrapped, wrapper_problems
from .errors import AbandonedError, ArgumentError, RanksError
from .evaluation import evaluate, pooled
from .explain import Outlook, explained
from .network import Network
from .plan import ChannelGroup, CostTerm, Event
from .policy import POLICIES, Policy
from .removal import abandoned, remove_
from .run_state import history_and_batches
from .sharding import sharding_problems
from .surgery import Surgery, named_tensors, narrowed, sizes_of
from .timing import forward_flops, milliseconds, training_seconds


class Apoptosis:
    """Removes the neurons of `model` that its training makes redundant: call `step` after every optimizer.step().

    A model so small that nothing can be gained is not traced before its groups are asked for.

    Args:
        model: the network, also inside DistributedDataParallel or torch.compile, or after fully_shard. On several ranks
            every method but `explain`, `report` and `state_dict` is to be called on each, with its own data.
        optimizer: one, several or none.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of one training batch.
        loss_fn: `loss_fn(output, targets)` -> mean loss. Budgets are in its units; without it they are relative mean
            squared changes of the model's output.
        total_steps: number of optimizer steps of the run, where known.
        policy: "conservative", "normal", "aggressive", or a `Policy`.
        protect: names of modules whose outputs keep their width.
        followers: modules of the same architecture that shrink alike (an EMA copy, a teacher).

    Raises:
        ArgumentError: something is wrong with the arguments; all problems together.
        ExportError: the model can't be captured by torch.export.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | Iterable[Optimizer] | None = None, *, example_inputs: Any,
        loss_fn: LossFn | None = None, total_steps: int | None = None, policy: str | Policy = "normal",
        protect: Sequence[str] = (), followers: Sequence[nn.Module] = (),
    ):  # fmt: skip
        compiled = compilation.is_compiled(model)
        model, ranks = unwrapped(model)
        checks.checked(ranks.problems([*checks.model_problems(model, ranks)]))
        optimizers = _several(optimizer)
        if ranks.sharded is None:
            model = checks.uncompiled(model)
        else:
            checks.checked(ranks.problems([*sharding_problems(model, optimizers, followers)]))
        args, kwargs = checks.as_call(example_inputs)
        problems = [*checks.follower_problems(model, followers)]
        problems += checks.optimizer_problems(model, optimizers, followers if not problems else ())
        problems += checks.name_problems(model, protect)
        with ranks.outlined((args, kwargs)) as call:
            problems += checks.call_problems(model, *call)
        problems += checks.data_problems(tree_leaves((args, kwargs)), "example_inputs")
        problems += [*checks.setting_problems(loss_fn, total_steps, policy), *wrapper_problems(ranks, policy)]
        facts = {} if ranks.alone else _facts(model, optimizers, total_steps, policy)
        checks.checked([*ranks.problems(problems), *ranks.differences(facts)])
        self.policy = POLICIES[policy] if isinstance(policy, str) else policy
        self.loss_fn, self.total_steps = loss_fn, total_steps
        self.history: list[Event] = []
        self._network = Network(model, optimizers, tuple(followers), [], [], ranks)
        self._example: Batch | None = Batch(args, kwargs)  # None: the model is traced
        self._protect, self._compiled, self._graphs = tuple(protect), compiled, -1  # compiled up to the last event
        self._batch_size = self._example_size = max(1, int(ranks.total([self._example.size])[0]))
        timed = 0 if self.policy.payback == 0 else self._network.parameters
        self._reduce_seconds = ranks.all_reduce_seconds(timed, next(model.parameters()).device) / max(1, timed)
        if not self._is_small(self._example):
            self._trace_()
        self._step = 0
        self._batches: list[Batch] = []
        self._forms: set[tuple[Any, ...]] = set()  # of batches that the model and the loss are known to take
        self._event_step = self._first_event()
        self._wake = self._next_wake()
        self._scale, self._event_seconds = 1.0, 0.0
        self._fraction = 0.5  # of the FLOPs: what the next look is expected to save
        self._last_call, self._step_seconds, self._first_loss = math.nan, math.inf, math.nan
        self._looked: Event | None = None  # the last look for redundancy, also one that found nothing
        self._unpaid = False  # the last look was left out, as it would not have paid for itself
        self._thread: int | None = None  # the one that steps; known from the first step on
        self._compile_seconds, self._compiles_since = 0.0, time.perf_counter() if compiled else math.inf
        self._unmarked = self._stepped = not optimizers  # without optimizers there is nobody to mark a step
        for item in optimizers:
            item.register_step_post_hook(self._mark_stepped)

    # -- what users call -------------------------------------------------------------------------------------
    @property
    def model(self) -> nn.Module:
        """The model itself, without what is wrapped around it."""
        return self._network.model

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """The model's channel groups as they are now."""
        self._trace_()
        return tuple(self._network.groups)

    def step(self, *inputs: Any, targets: Any = None, **kwinputs: Any) -> Event | None:
        """Call once after every optimizer.step(), with the batch just trained on.

        Returns:
            The event if neurons were removed, or a removal was undone, else None.

        Raises:
            ArgumentError: called between forward and backward or from a second thread; or, at the first step and while
                data is being gathered, within autocast or inference mode, or with data that is NaN, infinite, empty, or
                that the model or the loss doesn't take. It is as if it had not been called.
            ExportError: at the first step, if only its batch shows that there is something to gain: as for the class.
        """
        step = self._step + 1
        if step < self._wake and self._stepped and self._thread == get_ident():
            self._step, self._stepped = step, self._unmarked  # nothing to do: the common case
            return None
        self._check_moment()
        idle = 1 < step < self._wake
        batch, ranks = Batch(inputs, kwinputs, targets), self._network.ranks
        problems = [] if idle else [*checks.data_problems(tree_leaves((inputs, kwinputs)))]
        if ranks.alone and not idle:  # else at the event, by all ranks together
            checks.checked(problems or self._batch_problems(batch))
        self._step, self._stepped, self._thread = step, self._unmarked, get_ident()
        if idle:
            return None
        if step == 1:
            self._compile_seconds = max(0.0, time.perf_counter() - self._compiles_since)
            with ranks.together("measuring the first loss"):
                bad = bool(problems) if ranks.sharded is None else any(ranks.gather(bool(problems)))
                own = evaluate(self._network.model, [] if bad else [batch], self.loss_fn, ranks)
            self._first_loss = pooled(own, ranks).loss
            if (size := max(1, int(ranks.total([batch.size])[0]))) != self._batch_size:  # than the example's
                self._batch_size = size
                if self._work() > _OVERHEAD:
                    self._trace_()
                self._event_step = self._first_event()
                self._wake = self._next_wake()
        return self._gather(batch) if step >= self._wake else None

    def apoptose(self, *inputs: Any, targets: Any = None, budget: float | None = None, **kwinputs: Any) -> Event:
        """One removal now, planned on three quarters of this batch and judged on the rest; survivors are not rescaled.

        Args:
            budget: what the search may predict the loss to rise by, in its units; None: what the policy's price allows.

        Raises:
            ArgumentError: as for `step`.
        """
        checks.checked(checks.moment_problems(self._thread))
        batch = Batch(inputs, kwinputs, targets)
        problems = [*checks.data_problems(tree_leaves((inputs, kwinputs))), *checks.budget_problems(budget)]
        checks.checked(self._network.ranks.problems(problems))
        checks.checked(self._batch_problems(batch) if self._network.ranks.alone else ())
        self._trace_()
        calibration, held_out = split(batch)
        return self._remove([calibration], [held_out], replace(self.policy, rebalance=False), budget)

    def explain(self) -> str:
        """Why each group did or did not shrink and what to try, one line each: "name: sentence"."""
        looked = self._looked or (self.history[-1] if self.history else None)
        next_look = None if self._wake == _NEVER else self._event_step
        outlook = Outlook(looked, next_look, self._unpaid, self.policy.floor)
        return "\n".join(f"{name}: {words}" for name, words in explained(self.groups, self.history, outlook).items())

    def report(self, path: str, curves: Mapping[str, Sequence[tuple[int, float]]] | None = None) -> None:
        """Writes the run as one self-contained HTML file; `curves`: (step, value) by name, as of the loss."""
        from .report import Record, write_html

        write_html(Record.of(self, curves), path)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: plain data, but for the tensors of a calibration set half gathered."""
        self._trace_()
        return {
            "step": self._step, "event_step": self._event_step, "wake": self._wake, "scale": self._scale,
            "batch_size": self._batch_size, "total_steps": self.total_steps,
            "first_loss": None if math.isnan(self._first_loss) else self._first_loss,
            "fraction": self._fraction, "event_seconds": self._event_seconds,
            "widths": self._network.widths, "full_widths": {g.name: g.full_width for g in self.groups},
            "experts": {group.name: group.experts for group in self.groups if group.experts > 1},
            "history": [event.to_json() for event in self.history],
            "shapes": self._shapes(),
            "batches": [[list(b.args), b.kwargs, b.targets] for b in self._batches],
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume. Narrows model, optimizers and followers to the saved widths; load their own states after that.

        Raises:
            ArgumentError: the state is damaged, or of another model; nothing was changed.
            SurgeryError: the shapes don't fit; nothing was changed.
        """
        with self.resuming(state):
            pass

    @contextmanager
    def resuming(self, state: dict[str, Any]) -> Iterator[None]:
        """`load_state_dict` as a transaction: an exception in the block puts everything back."""
        self._trace_()
        network, now = self._network, self._network.widths
        history, batches = history_and_batches(state, self.groups, self._shapes())
        widths, full, before = state["widths"], state["full_widths"], (network.groups, network.costs, dict(vars(self)))
        widths = {name: widths.get(name, width) for name, width in now.items()}
        try:
            surgery = Surgery(network.model, network.optimizers, network.followers, network.ranks)
            with network.ranks.rebuilding(), surgery:
                surgery.narrow_(state["shapes"])
                groups = narrowed(self.groups, widths)
                surgery.resize_(sizes_of(groups, widths))
                network.costs = network.narrowed(groups).costs
                network.groups = [replace(group, full_width=full.get(group.name, group.width)) for group in groups]
                self._step, self._event_step, self._wake = state["step"], state["event_step"], state["wake"]
                self._first_loss = math.nan if state["first_loss"] is None else state["first_loss"]
                self._scale, self._fraction, self._batch_size = state["scale"], state["fraction"], state["batch_size"]
                self._event_seconds, self.history, self._batches = state["event_seconds"], history, batches
                self._thread, self._last_call, self._step_seconds = None, math.nan, math.inf
                if state["total_steps"] != self.total_steps and not batches:  # a longer run has looks to come
                    self._event_step = max(self._event_step, self._step + self._batches_wanted())
                    self._wake = self._next_wake()
                yield
        except BaseException:
            network.groups, network.costs = before[:2]
            vars(self).update(before[2])
            raise

    def _shapes(self) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in named_tensors(self._network.model).items()}

    # -- tracing ---------------------------------------------------------------------------------------------
    def _is_small(self, example: Batch) -> bool:
        """Is a step mostly overhead, whatever the widths? The network then has a single cost, which none changes."""
        network = self._network  # without costs yet: only its parameters are work
        if self.policy.payback == 0 or self._compiled or not network.ranks.alone or self._work() > _OVERHEAD:
            return False
        network.costs = [CostTerm(forward_flops(network.model, example), None, None)]
        return self._work() <= _OVERHEAD

    def _trace_(self) -> None:
        """Finds the groups and what they cost, once."""
        if self._example is None:
            return
        network, ranks, example = self._network, self._network.ranks, self._example
        with ranks.rebuilding(), ranks.together("tracing the model"):
            with ranks.outlined((example.args, example.kwargs)) as call:
                groups, costs = discovered(network.model, *call, self._protect)
            self._positions = positions(network.model, groups, costs, example.size)
            if self.policy.cost == "milliseconds":
                costs = milliseconds(network.model, groups, costs, example)
        ranks.agree("channel groups", groups)
        network.groups, network.costs, self._example = groups, ranks.first(costs), None
        if self._compiled and ranks.sharded is None:  # shards are put together in new tensors
            compilation.follow_widths_(network.model, groups)

    # -- the schedule ----------------------------------------------------------------------------------------
    def _first_event(self) -> int:
        fewest = math.ceil(self._batches_wanted() / 4)
        return max(self.policy.first_step, round(self.policy.start * (self.total_steps or 0)), fewest)

    def _batches_wanted(self) -> int:
        policy, fewest = self.policy, float(_FEWEST)
        limited = policy.max_changed_predictions is not None or policy.max_loss_increase is not None
        for group in self._network.prunable(policy.floor):
            samples = min(policy.samples, max(4 * group.width * group.entries, policy.samples // 2))
            positions = 1.0 if limited else self._positions[group.name]  # a certificate counts inputs
            fewest = max(fewest, 1.5 * samples / (positions * self._batch_size))
        return math.ceil(fewest)

    def _next_wake(self) -> int:
        """Gathering begins in time for the event, if one can still come."""
        begin = max(self._step + 1, self._event_step - self._batches_wanted() + 1)
        worth = self.policy.payback == 0 or self._work() > _OVERHEAD
        comes = worth and self._event_step <= self.policy.last_look(self.total_steps)
        return self._network.ranks.first(begin if comes else _NEVER)

    def _gather(self, batch: Batch) -> Event | None:
        """Keeps a copy of the batch; on the event's step, removes neurons if that is expected to pay."""
        now = time.perf_counter()
        if not self._batches:
            self._step_seconds = math.inf
        elif not math.isnan(self._last_call):
            self._step_seconds = min(self._step_seconds, now - self._last_call)
        self._batches.append(batch.map(lambda tensor: tensor.detach().clone()))
        event = None
        if self._step >= self._event_step and len(self._batches) >= _FEWEST:
            batches, self._batches = self._batches, []
            self._unpaid = not self._network.ranks.first(self._pays())
            try:
                if self._unpaid:
                    self._fraction = min(1.0, 2 * self._fraction)  # the price will be higher
                else:
                    event = self._remove(batches[0::3] + batches[1::3], batches[2::3], self.policy, None)
            except Exception as error:
                if not isinstance(error, RanksError):
                    self._schedule_next_()  # a caller that goes on gathers anew
                raise
            self._schedule_next_()
        self._last_call = time.perf_counter()
        return event if event is not None and (event.changes or event.rolled_back) else None

    def _schedule_next_(self) -> None:
        self._event_step = max(self.policy.next_look(self._step, self.total_steps), self._step + _FEWEST)
        self._wake = self._next_wake()

    def _pays(self) -> bool:
        """Is the event expected to save `payback` times its cost in the steps that remain?

        Only time that follows the widths can be saved: arithmetic, memory traffic and gradients on the network, not a
        small network's overhead. Under torch.compile, an event costs what compiling took at the first step, unless
        nothing was compiled after the last one.
        """
        if self.policy.payback == 0 or math.isinf(self._step_seconds):  # inf: resumed on this step, none was timed
            return True
        remaining = (self.total_steps or 2 * self._step) - self._step
        saving = remaining * min(self._step_seconds, self._work()) * self._fraction
        cost = self._event_seconds or self._batches_wanted() * self._step_seconds + 0.03
        if self._graphs != compilation.graphs():
            cost += max(0.0, self._compile_seconds - self._step_seconds)
        return saving >= self.policy.payback * cost

    def _work(self) -> float:
        """Seconds of a training step that follow the widths."""
        device = next(self._network.model.parameters()).device
        size = self._network.parameters
        flops = self._network.flops() * (self._batch_size / self._example_size)
        return training_seconds(flops, size, device) + size * self._reduce_seconds

    def _price(self) -> float:
        return self._scale * self.policy.price_at(self._step, self.total_steps)

    def _remove(
        self, calibration: Sequence[Batch], held_out: Sequence[Batch], policy: Policy, budget: float | None
    ) -> Event:
        ranks = self._network.ranks
        try:
            with ranks.rebuilding():
                with ranks.together("checking the data"):
                    leaves = tree_leaves([(batch.args, batch.kwargs) for batch in (*calibration, *held_out)])
                    checks.checked([] if ranks.alone else checks.data_problems(leaves))
                price = self._price() if budget is None else math.inf
                event = remove_(
                    self._network, calibration, held_out, self.loss_fn, policy, budget,
                    price=price, first_loss=self._first_loss, step=self._step,
                )  # fmt: skip
        except AbandonedError as error:
            warnings.warn(str(error), stacklevel=2)
            self._looked = abandoned(self._network, self._step, str(error))
            self.history.append(self._looked)
            return self._looked
        seconds = ranks.first(self._step_seconds)
        event = replace(event, step_seconds=seconds if math.isfinite(seconds) else None)
        self._looked = event
        self.history += [event] if event.changes else []
        self._scale *= 0.3 if event.rolled_back else 1.0
        self._fraction = max(0.01, event.foreseen)  # the price will be higher, and more may have become redundant
        self._event_seconds = min(event.seconds, self._event_seconds or math.inf)  # the machine may be busy
        if self._compiled and event.changes and not event.rolled_back:
            self._graphs = compilation.graphs()
            compilation.compile_once_more_()
        return event

    # -- at each step ----------------------------------------------------------------------------------------
    def _check_moment(self) -> None:
        """Is this between two training steps, outside autocast and inference mode, on the thread that began?"""
        checks.checked(checks.moment_problems(self._thread))
        if not self._stepped:
            self._check_stepped()

    def _batch_problems(self, batch: Batch) -> Iterable[str]:
        """Tries each form of batch once."""
        if (form := checks.form(batch)) not in self._forms:
            yield from checks.batch_problems(self._network.model, batch, self.loss_fn)
            self._forms.add(form)

    def _check_stepped(self) -> None:
        """No optimizer stepped since the last call: fine if a GradScaler skipped the step, else the wrong place."""
        gradients = [p.grad for p in self._network.model.parameters() if p.grad is not None]
        skipped = (self._step > 0 and not gradients) or any(not bool(g.isfinite().all()) for g in gradients)
        if not skipped:
            raise ArgumentError([
                "`step` must be called once after every optimizer.step(), got a call without one since the last: "
                "between forward and backward nothing can be removed. Move it behind optimizer.step()."
            ])  # fmt: skip

    def _mark_stepped(self, *_: Any) -> None:
        self._stepped = True


_NEVER = 2**62
_FEWEST = 3  # batches of a look: two to plan on, one to judge by
_OVERHEAD = 5e-4  # seconds: a step with less work than this is mostly overhead, whatever the widths


def _facts(
    model: nn.Module, optimizers: Sequence[Any], total_steps: int | None, policy: str | Policy
) -> dict[str, Any]:
    """What must be alike on all ranks."""
    parameters = dict(model.named_parameters())
    return {
        "total_steps": total_steps, "policy": policy, "optimizer": [type(item).__name__ for item in optimizers],
        **{name: f"{p.dtype} {tuple(p.shape)} {p.requires_grad}" for name, p in parameters.items()},
        "values of the parameters": fingerprint(parameters)[:8],
    }  # fmt: skip


def _several(optimizer: Any) -> tuple[Any, ...]:
    if optimizer is None:
        return ()
    return tuple(optimizer) if isinstance(optimizer, list | tuple) else (optimizer,)
