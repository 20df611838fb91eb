"""What calibration batches say of the groups: moments at their consumers' inputs.

Shapes: N inputs in all batches, n channels of a group. A consumer reads n channels at every position (pixels of a
convolution, entries of a flattened block); positions count as samples of the second moment and as terms of the loss.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from .batches import Batch, LossFn
from .distributed import ALONE, Ranks
from .graph import preserved
from .plan import ChannelGroup, Slot
from .reading import Reader, Reading, Recorder


@dataclass(frozen=True)
class Moments:
    """A group at its consumers' inputs, averaged over samples and positions, in the precision that they were summed in.

    Attributes:
        second: E[a a^T].
        mean: E[a], or None where a consumer can't take a constant exactly.
        metric: Q, such that 1/2 tr(Q S) is the predicted loss increase when S is the residual second moment.
        shares: positions that were averaged: one number, or that of each expert. `second` and `mean` are then those of
            each expert's own positions, and 0 between experts; `metric` and `energy` are weighted by how often it
            reads, so that what they say of a residual is the loss over all positions.
        energy: V^T V summed over consumers and taps: tr(energy second) is the consumers' mean squared output.
        slope, cross: the loss's gradient in a constant added to a, and in a matrix that multiplies a: E[u] and E[u a^T]
            with u the gradient of an input's loss, summed over its positions. 0 without a loss.
        readers: where consumers read different tensors, (second, mean) of each; else empty.
        sources: where they do, (a reader's index, cross, slope) of each tensor that is read; their sums are as above.
        damping: share of `energy` in `metric` that is damping.
        noise: squared standard error of the first-order change of the loss, over the undamped second-order change; 0
            without a loss.
        linear: is everything that reads the channels a linear layer?
    """

    second: Float[Tensor, "n n"]
    mean: Float[Tensor, " n"] | None
    metric: Float[Tensor, "n n"]
    energy: Float[Tensor, "n n"]
    shares: tuple[int, ...]
    slope: Float[Tensor, " n"]
    cross: Float[Tensor, "n n"]
    readers: tuple[tuple[Float[Tensor, "n n"], Float[Tensor, " n"] | None], ...] = ()
    sources: tuple[tuple[int, Float[Tensor, "n n"], Float[Tensor, " n"]], ...] = ()
    damping: float = 0.0
    noise: float = 0.0
    linear: bool = False

    @property
    def samples(self) -> int:
        """Positions that were averaged, of all experts."""
        return sum(self.shares)

    @property
    def undamped(self) -> Float[Tensor, "n n"]:
        """The metric without its damping: the second moment of the loss's gradient, scaled to its curvature."""
        return self.metric - self.damping * self.energy

    @property
    def half_damped(self) -> Float[Tensor, "n n"]:
        """The metric with half its damping: what a removal is predicted to cost, not what it is chosen by."""
        return self.metric - self.damping / 2 * self.energy


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Dropout off, batch norm as in training if the model trains; modes, buffers and RNG come back as they were."""
    with preserved(model), parametrize.cached():
        for module in model.modules():
            module.training = module.training and isinstance(module, nn.modules.batchnorm._BatchNorm)
        yield


def weight_of(model: nn.Module, name: str) -> Tensor:
    """The weight that the forward pass uses: through its parametrization, if it has one."""
    path, parametrized, rest = name.partition(".parametrizations.")
    attribute = rest.split(".")[0]
    if not parametrized:
        path, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(path), attribute)


_FEW_OUTPUTS = 16


class _Sums:
    """Running sums of one group's moments, in the activations' own precision (at least float32).

    `second` and `mean` are kept for each set of consumers that read the same tensor.
    """

    def __init__(self, group: ChannelGroup, like: Tensor):
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.group, size = group, group.width // group.experts
        self.parts = [slice(i * size, (i + 1) * size) for i in range(group.experts)]
        self.zeros = partial(torch.zeros, dtype=dtype, device=like.device)
        self.metric, self.energy = self.zeros(group.width, group.width), self.zeros(group.width, group.width)
        self.curvature, self.linear = self.zeros(()), True
        # consumers -> sums of a a^T, a, u a^T and u; number of positions, for each expert
        self.sources: dict[tuple[int, ...], tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = {}

    def add_columns(self, weight: Tensor, slot: Slot, paired: bool) -> None:
        self.linear &= not paired and weight.ndim == (2 if len(self.parts) == 1 else 3)
        if paired:  # what is read is what is made; an expert that no token takes costs nothing, damped or not
            self.energy.diagonal().add_(1.0 if self.group.gate is None else 0.0)
            return
        index = slot.index(self.group.width).to(weight.device)
        columns = slot.opened(weight.detach()).movedim(slot.dim, 0)[index].flatten(1)
        for part in self.parts:
            _add_gram(self.energy[part, part], columns[part].mT.to(self.energy.dtype), 1.0)

    def add(
        self, readings: Sequence[Reading], gradient: Tensor | None, output_gradients: Sequence[Tensor | None],
        terms: float, inputs: float,
    ) -> None:  # fmt: skip
        """One tensor, and the consumers that read it; no gradient where nothing that the loss sees depends on it."""
        first, n = readings[0], len(self.metric)
        key = tuple(sorted({reading.reader.index for reading in readings}))
        if key not in self.sources:
            counts = torch.zeros(len(self.parts), dtype=torch.int64, device=self.metric.device)
            self.sources[key] = self.zeros(n, n), self.zeros(n), self.zeros(n, n), self.zeros(n), counts
        second, mean, cross, slope, counts = self.sources[key]
        gradients = dict(first.channels(gradient)) if gradient is not None else {}
        for expert, entries in first.channels(first.source):
            part, a = self.parts[expert], entries.to(self.metric.dtype)
            own = a.any(1) if len(self.parts) > 1 else slice(None)  # rows of zeros: tokens of other experts
            a = a[own]
            _add_gram(second[part, part], a, 1.0)
            mean[part].add_(a.sum(0))
            counts[expert] += len(a)
            if gradient is None:
                continue
            u = gradients[expert].to(self.metric.dtype)[own]
            if self.group.gate is not None:
                a, u = torch.ones_like(a), of_experts(a, u, self.group.gate)
            _add_gram(self.metric[part, part], u, terms)
            if inputs:
                slope[part].add_(u.sum(0), alpha=inputs)
                cross[part, part].addmm_(u.mT, a, alpha=inputs)
        if gradient is None:
            return
        for reading, output_gradient in zip(readings, output_gradients, strict=True):
            if output_gradient is not None:
                self.curvature += terms * output_gradient.square().sum() / _outputs(reading)

    def moments_(self, scale: float, inputs: float, damping: float, noise: float) -> Moments:
        """The averages; the sums are used up."""
        consumers, inputs, curvature = self.group.consumers, max(1.0, inputs), float(self.curvature)
        keys, sums = sorted(self.sources), [self.sources[key] for key in sorted(self.sources)]
        counts = _sum([each[-1] for each in sums])
        if len(self.parts) > 1:
            self.energy.mul_(self.spread(counts / counts.sum().clamp(min=1)))
        metric = self.metric.add_(self.energy, alpha=damping * curvature).mul_(scale)
        means = [(cross.div_(inputs), slope.div_(inputs)) for _, _, cross, slope, _ in sums]
        sources = tuple((key[0], *mean) for key, mean in zip(keys, means, strict=True))
        several, readers = len(sources) > 1, []
        for i, consumer in enumerate(consumers if several else ()):
            own = [each for key, each in zip(keys, sums, strict=True) if i in key] or sums
            readers.append(self.averages(own, constant=consumer.bias is not None))
        second, mean = self.averages(sums, constant=all(consumer.bias for consumer in consumers))
        if self.group.gate is not None:  # nothing stands for an expert
            second, mean = torch.eye(len(second)).to(second), None
            sources = tuple((i, cross.diag().diag(), slope) for i, cross, slope in sources)
        return Moments(
            second, mean, self.mirror_(metric), self.mirror_(self.energy), tuple(counts.tolist()),
            _sum([slope for *_, slope in sources]), _sum([cross for _, cross, _ in sources]), tuple(readers),
            sources if several else (),
            damping=scale * damping * curvature, noise=noise, linear=self.linear,
        )  # fmt: skip

    def averages(
        self, sums: Sequence[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]], *, constant: bool
    ) -> tuple[Float[Tensor, "n n"], Float[Tensor, " n"] | None]:
        number = self.spread(_sum([each[-1] for each in sums]).clamp(min=1))
        second, mean = _sum([each[0] for each in sums]), _sum([each[1] for each in sums])
        return self.mirror_(second / number), mean / number if constant else None

    def spread(self, each: Float[Tensor, " experts"]) -> Float[Tensor, " n"]:
        """One number for each channel, that of its expert."""
        return each.to(self.metric.dtype).repeat_interleave(len(self.metric) // len(each))

    def mirror_(self, total: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        for part in self.parts:
            _mirror_(total[part, part])
        return total


def of_experts(logits: Float[Tensor, "m n"], gradient: Float[Tensor, "m n"], taken: int) -> Float[Tensor, "m n"]:
    """The loss's gradient in numbers that multiply a token's experts, 1 while they are there and 0 once they are not
    (Statement 21), from that in a router's logits; `taken`: how many a token takes, 0: all.

    A token whose whole weight is with one expert says nothing of the others: it counts as much as a loss of 1.
    """
    if taken:
        logits = logits.masked_fill(logits < logits.topk(taken).values[:, -1:], -math.inf)
    others = 1 - logits.softmax(1)
    return torch.where(others > 0, gradient / others, 1.0)


def _outputs(reading: Reading) -> int:
    """How many numbers a layer makes of what it reads."""
    weight, slot, experts = reading.reader.weight, reading.reader.slot, reading.reader.experts
    return weight.shape[0] if experts == 1 else weight.numel() // (experts * weight.shape[slot.dim])


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([*tensors]).sum(0) if len(tensors) > 1 else tensors[0]


def _add_gram(total: Float[Tensor, "n n"], x: Float[Tensor, "m n"], weight: float) -> None:
    """total += weight x^T x on the blocks that hold its upper triangle; those below may stay as they are."""
    for rows in _strips(len(total)):
        total[rows, rows.start :].addmm_(x[:, rows].mT, x[:, rows.start :], alpha=weight)


def _mirror_(total: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    for rows in _strips(len(total)):
        total[rows.stop :, rows] = total[rows, rows.stop :].mT
    return total


def _strips(n: int, parts: int = 4) -> Iterator[slice]:
    step = max(64, -(-n // parts))
    return (slice(start, min(n, start + step)) for start in range(0, n, step))


@dataclass
class _Totals:
    """Sums over the batches of one rank: moments of every group, inputs, curvature and Fisher trace of the loss."""

    groups: dict[str, _Sums]
    samples: float = 0.0
    curvature: float = 0.0
    fisher: float = 0.0
    lost: set[str] = field(default_factory=set)

    def pooled_(self, ranks: Ranks) -> None:
        for name in self.groups:
            sums = self.groups[name]
            parts = [tensor for key in sorted(sums.sources) for tensor in sums.sources[key]]
            ranks.total_([sums.metric, sums.curvature, *parts])
        self.samples, self.curvature, self.fisher = ranks.total([self.samples, self.curvature, self.fisher])

    @property
    def matched(self) -> float:
        """What the mean squared gradients lack, as a factor, to the curvature of the loss."""
        return self.curvature / self.fisher if self.curvature > 0 and self.fisher > 0 else 1.0


def measure(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Sequence[Batch], loss_fn: LossFn | None, damping: float,
    ranks: Ranks = ALONE, backward: float = 1.0,
) -> dict[str, Moments]:  # fmt: skip
    """Moments of every group that is read, by entry, from one forward and one backward pass to the activations a batch.

    The backward passes, for all that gradients tell, are left out after the first share `backward` of the batches.

    With a loss, gradients are weighted (empirical Fisher) such that their trace at the output is that of the loss's
    Hessian: the two differ once examples are fitted, as the gradients vanish before the curvature does.
    `damping` d adds d mean(diag G) V^T V to the metric Q = V^T G V (K-FAC's damping of the consumer's curvature G).
    Without `loss_fn` the "loss" is the relative mean squared change of the model's output. Groups that are read in
    training mode only (by an auxiliary head), or in a way that can't be followed, have none.
    """
    groups = [group.by_entry() for group in groups]
    with ranks.together("measuring the activations"):
        totals = _totals(model, groups, batches, loss_fn, damping, ranks, math.ceil(backward * len(batches)))
    totals.pooled_(ranks)
    scale = totals.matched / max(1.0, totals.samples)
    noise = 2 / (totals.matched * totals.samples) if loss_fn and totals.matched * totals.samples > 0 else 0.0
    return {
        group.name: totals.groups[group.name].moments_(scale, totals.samples, damping, noise)
        for group in groups
        if group.name in totals.groups and totals.groups[group.name].sources and group.name not in totals.lost
    }


def _totals(
    model: nn.Module, groups: Sequence[ChannelGroup], batches: Sequence[Batch], loss_fn: LossFn | None, damping: float,
    ranks: Ranks, sent_back: int,
) -> _Totals:  # fmt: skip
    totals = _Totals({})
    generator = torch.Generator(next(model.parameters()).device).manual_seed(ranks.rank)  # a resumed run draws the same
    consumers: dict[str, list[tuple[ChannelGroup, int, Slot]]] = {}
    for group in groups:
        for i, consumer in enumerate(group.consumers[: 1 if group.paired else None]):
            seen = group.producers[0] if consumer.paired else consumer.weight
            consumers.setdefault(seen.tensor, []).append((group, i, seen))
    with calibrating(model), torch.enable_grad():
        readers: dict[int, list[Reader]] = {}
        for name, weight in ranks.weights(consumers, partial(weight_of, model)):
            for group, i, slot in consumers[name]:
                reader = Reader(group.name, i, slot, group.width, weight, group.paired, group.experts)
                readers.setdefault(id(weight), []).append(reader)
                totals.groups.setdefault(group.name, _Sums(group, weight)).add_columns(weight, slot, group.paired)
        for i, batch in enumerate(batches):
            with ranks.in_step("measuring the activations"):
                _measure_(totals, model, readers, batch, loss_fn, generator, damped=damping > 0, back=i < sent_back)
    return totals


def _measure_(
    totals: _Totals, model: nn.Module, readers: dict[int, list[Reader]], batch: Batch, loss_fn: LossFn | None,
    generator: torch.Generator, *, damped: bool, back: bool,
) -> None:  # fmt: skip
    """Adds one batch; `back`: gradients too."""
    with Recorder(readers) as recorder, torch.set_grad_enabled(back):
        output = model(*batch.args, **batch.kwargs)
    totals.lost |= recorder.lost
    if not back:
        for (group, _), pairs in _by_source(recorder.readings).items():
            totals.groups[group].add(pairs, None, (), 0, 0)
        return
    leaves, gradients, terms, curvature = _output_gradients(output, batch, loss_fn, generator)
    totals.samples += batch.size
    totals.curvature += batch.size * curvature
    totals.fisher += batch.size * terms * sum(g.square().sum().item() for g in gradients)
    counted = batch.size if loss_fn else 0  # probes are no gradients
    _accumulate(totals.groups, recorder.readings, leaves, gradients, batch.size * terms, counted, damped=damped)


def _accumulate(
    sums: dict[str, _Sums], readings: list[Reading], leaves: list[Tensor], gradients: list[Tensor], terms: float,
    inputs: float, *, damped: bool,
) -> None:  # fmt: skip
    sources = {id(reading.source): reading.source for reading in readings}
    wanted = [*sources.values(), *(reading.output for reading in readings if damped)]
    sent = leaves and wanted  # nothing to send where nothing is read, or nothing read reaches the output
    found = torch.autograd.grad(leaves, wanted, gradients, allow_unused=True) if sent else [None] * len(wanted)
    of_source = dict(zip(sources, found, strict=False))
    of_output = found[len(sources) :] if damped else [None] * len(readings)
    of_reading = dict(zip(readings, of_output, strict=True))
    for (group, source), together in _by_source(readings).items():  # two consumers of one tensor: its gradient has both
        sums[group].add(together, of_source[source], [of_reading[reading] for reading in together], terms, inputs)


def _by_source(readings: Sequence[Reading]) -> dict[tuple[str, int], list[Reading]]:
    """What consumers of a group read in one tensor, by group and tensor."""
    together: dict[tuple[str, int], list[Reading]] = {}
    for reading in readings:
        together.setdefault((reading.reader.group, id(reading.source)), []).append(reading)
    return together


def _output_gradients(
    output: Any, batch: Batch, loss_fn: LossFn | None, generator: torch.Generator
) -> tuple[list[Tensor], list[Tensor], int, float]:
    """Output tensors, the vectors to send back from them, the number of terms that the loss averages, its curvature.

    With a loss: its gradient, and the trace of its Hessian at the output. Without: Gaussian probes, and 0 (unknown).
    """
    leaves = [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf) and leaf.requires_grad]
    if loss_fn is None:
        scale = math.sqrt(sum(leaf.detach().double().square().sum().item() for leaf in leaves) / 2) or 1.0
        probes = [torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device) for x in leaves]
        return leaves, [probe / scale for probe in probes], 1, 0.0
    fresh = {id(leaf): leaf.detach().requires_grad_() for leaf in leaves}
    loss = loss_fn(tree_map(lambda leaf: fresh.get(id(leaf), leaf), output), batch.targets)
    found = torch.autograd.grad(loss, list(fresh.values()), create_graph=True, allow_unused=True)
    used = [(leaf, g) for leaf, g in zip(leaves, found, strict=True) if g is not None]
    curvature = sum(_trace(g, fresh[id(leaf)], generator) for leaf, g in used if g.requires_grad)
    return [leaf for leaf, _ in used], [g.detach() for _, g in used], _loss_terms(batch), curvature


def _trace(gradient: Tensor, at: Tensor, generator: torch.Generator) -> float:
    """Trace of the Hessian: exact for few outputs an input (which the loss treats one by one), else by random signs."""
    entries = gradient[0].numel() if gradient.ndim else 1
    if entries <= _FEW_OUTPUTS:
        basis = torch.eye(entries, dtype=gradient.dtype, device=gradient.device)
        probes = [row.view(gradient.shape[1:]).expand_as(gradient) for row in basis]
    else:
        probes = [torch.randint(2, gradient.shape, generator=generator, device=gradient.device).to(gradient) * 2 - 1]
    trace = 0.0
    for probe in probes:
        try:
            product = torch.autograd.grad(gradient, at, probe, retain_graph=True, allow_unused=True)[0]
        except RuntimeError:  # a loss whose second derivative torch doesn't know (CTC)
            return 0.0
        trace += 0.0 if product is None else (probe * product).sum().item()
    return trace


def _loss_terms(batch: Batch) -> int:
    """How many terms a mean loss averages: one for each class label, else one for each input."""
    labels = [leaf for leaf in tree_leaves(batch.targets) if torch.is_tensor(leaf) and not leaf.is_floating_point()]
    return labels[0].numel() if len(labels) == 1 else batch.size
